"""Connections that outlive the worker that served them."""

from __future__ import annotations

import asyncio
import copy
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.kong import codec
from openmeter_plugin.kong.connections import Connections
from openmeter_plugin.kong.server import Server
from openmeter_plugin.process.handoff import Kept
from openmeter_plugin.spool.writer import SpoolWriter
from tests.bench.driver import ProtoBuf
from tests.plugin.spools import running_writer

CONFIG = b'{"ingest_endpoint": "http://127.0.0.1:9/events"}'
INSTANCE = 7


def forked(kept: Kept) -> Kept:
    """Return what a child process has of it."""
    child = copy.copy(kept)
    child._supervisors, child._workers = kept._supervisors.dup(), kept._workers.dup()
    child._held = {slot: os.dup(descriptor) for slot, descriptor in kept._held.items()}
    return child


class Worker:
    """A worker's serving, in this process; it `dies` as one that is killed does."""

    def __init__(self, spool: Path, writer: SpoolWriter, kept: Kept) -> None:
        loop = asyncio.get_running_loop()
        instances = Instances(InstanceIds(spool), writer)
        instances.adopt(INSTANCE, CONFIG)
        self.server = Server(instances, writer, loop)
        self.kept = kept
        self.connections = Connections(loop, self.server.flush, kept)
        self.taken_over = self.connections.take_over(self.server.connection)

    def accept(self) -> socket.socket:
        """Return Kong's end of a new connection."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.connections.add(ours, self.server.connection)
        return theirs

    def die(self) -> None:
        """Have the kernel close what the process had open."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.connections._epoll.fileno())
        self.connections._epoll.close()
        for link in self.connections._links.values():
            link.socket.close()
        self.connections._links.clear()
        self.kept.close()


class Kong:
    """What Kong says, and what it hears."""

    def __init__(self) -> None:
        self.protocol = ProtoBuf()
        call = codec.encode_bytes(2, b"log") + b"\x08" + codec.encode_varint(INSTANCE)
        self.event = codec.frame(b"\x08\x07" + codec.encode_bytes(36, call))
        self.log = codec.frame(codec.encode_bytes(1, self.protocol.log(1)))
        self.end = codec.END_OF_EVENT + codec.encode_return(7)

    async def hears(self, peer: socket.socket, expected: bytes) -> None:
        """Wait for exactly these bytes."""
        data = b""
        while len(data) < len(expected):
            part = await asyncio.get_running_loop().sock_recv(peer, len(expected) - len(data))
            assert part, "the stream ended"
            data += part
        assert data == expected

    async def event_on(self, peer: socket.socket) -> None:
        """Hand an event over."""
        peer.send(self.event)
        await self.hears(peer, codec.QUERY_LOG)
        peer.send(self.log)
        await self.hears(peer, self.end)


def serve(
    tmp_path: Path, test: Callable[[Callable[[], Worker], Kept, Kong], Awaitable[None]], most: int = 1000
) -> None:
    """Run a test with what makes workers one after the other, and with what the supervisor has."""

    async def body(writer: SpoolWriter) -> None:
        kept = Kept(most)
        workers: list[Worker] = []

        def worker() -> Worker:
            kept.take_in()
            workers.append(Worker(tmp_path, writer, forked(kept)))
            return workers[-1]

        try:
            await asyncio.wait_for(test(worker, kept, Kong()), 20)
        finally:
            workers[-1].connections.close()
            workers[-1].kept.close()
            kept.close()

    def tell(tokens: list[Any]) -> None:
        loop.call_soon_threadsafe(Server.committed, tokens)

    with running_writer(tmp_path, tell) as writer:
        loop = uvloop.new_event_loop()
        loop.run_until_complete(body(writer))
        loop.close()


def test_an_idle_connection_is_served_on_by_the_next_worker(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], _: Kept, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.event_on(peer)
        for _turn in range(2):
            first.die()
            first = worker()
            assert first.taken_over == {"idle": 1}
            await kong.event_on(peer)
        peer.close()

    serve(tmp_path, test)


def test_what_kong_wrote_while_nobody_served_is_answered_by_the_next_worker(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], _: Kept, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.event_on(peer)
        first.die()
        peer.send(kong.event)
        assert worker().taken_over == {"idle": 1}
        await kong.hears(peer, codec.QUERY_LOG)
        peer.send(kong.log)
        await kong.hears(peer, kong.end)
        peer.close()

    serve(tmp_path, test)


@pytest.mark.parametrize("read", [3, 11, None], ids=["a part of its length", "a part of it", "all of it"])
def test_a_connection_with_a_call_under_way_just_ends_and_is_not_reset(
    tmp_path: Path, read: int | None
) -> None:
    async def test(worker: Callable[[], Worker], _: Kept, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.event_on(peer)
        peer.send(kong.event[:read])
        if read is None:
            await kong.hears(peer, codec.QUERY_LOG)
        else:
            while not first.connections._links or not all(
                connection._chunks for connection in first.server.connections
            ):
                await asyncio.sleep(0)
        first.die()
        assert worker().taken_over == {"ended": 1}
        if read is not None:
            peer.send(kong.event[read:])  # Kong's sends fail only where nobody has the connection
        peer.send(kong.log)
        assert await asyncio.get_running_loop().sock_recv(peer, 1) == b""
        await asyncio.sleep(0)
        peer.send(kong.log)
        peer.close()

    serve(tmp_path, test)


def test_a_connection_on_which_an_instance_was_started_is_idle_once_that_is_answered(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        body = codec.encode_bytes(1, b"openmeter") + codec.encode_bytes(2, CONFIG)
        peer.send(codec.frame(b"\x08\x09" + codec.encode_bytes(33, body)))
        assert await asyncio.get_running_loop().sock_recv(peer, 1000)
        peer.send(codec.frame(b"\x08\x0a" + codec.encode_bytes(35, b"\x08" + codec.encode_varint(999))))
        assert await asyncio.get_running_loop().sock_recv(peer, 1000)
        first.die()
        assert worker().taken_over == {"idle": 1}
        await kong.event_on(peer)
        peer.close()

    serve(tmp_path, test)


def test_an_answer_that_kong_has_not_taken_yet_is_under_way(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.event_on(peer)
        (link,) = first.connections._links.values()
        kept.states[link.slot] = 1
        link.write(bytes(8_000_000))
        assert link.has_unsent
        link.finish(b"end")
        first.die()
        assert worker().taken_over == {"ended": 1}
        peer.close()

    serve(tmp_path, test)


def test_kong_sees_at_once_that_we_close_a_connection_that_the_supervisor_holds(
    tmp_path: Path,
) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.event_on(peer)
        await until_held(kept, 1)
        (connection,) = first.server.connections
        connection.close()
        assert await asyncio.get_running_loop().sock_recv(peer, 1) == b""
        await until_held(kept, 0)
        peer.close()

    serve(tmp_path, test)


async def until_held(kept: Kept, connections: int) -> None:
    """Have the supervisor take in what comes until it holds so many."""
    while len(kept) != connections:
        kept.take_in()
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("in_a_message", [1, 7, 250])
def test_what_the_supervisor_has_no_room_for_is_sent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_message: int
) -> None:
    monkeypatch.setattr("openmeter_plugin.process.handoff._IN_A_MESSAGE", in_a_message)

    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        kept._workers.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        first = worker()
        peers = []
        for _ in range(60):
            peers.append(first.accept())
            await asyncio.sleep(0.001)  # a turn of the loop for each
        assert not first.kept.send()
        await until_held(kept, 60)
        for peer in peers[::2]:
            peer.close()
        await until_held(kept, 30)
        first.die()
        assert worker().taken_over == {"idle": 30}
        for peer in peers[1::2]:
            await kong.event_on(peer)
            peer.close()

    serve(tmp_path, test)


def test_of_a_connection_that_was_gone_before_it_was_sent_the_supervisor_never_hears(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        (connection,) = first.server.connections
        connection.close()
        assert first.kept.send()
        assert not kept.take_in()
        peer.close()

    serve(tmp_path, test)


def test_where_the_kernel_passes_no_descriptors_connections_are_served_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = socket.send_fds

    def refusing(to: socket.socket, data: list[bytes], descriptors: list[int]) -> int:
        if descriptors:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return send(to, data, descriptors)

    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        before = first.accept()
        await kong.event_on(before)
        await until_held(kept, 1)
        monkeypatch.setattr(socket, "send_fds", refusing)
        peer = first.accept()
        await kong.event_on(peer)
        before.close()
        await until_held(kept, 0)
        peer.close()

    serve(tmp_path, test)


def test_many_connections_at_once_take_little_room_on_their_way_to_the_supervisor(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        kept._workers.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        first = worker()
        peers = [first.accept() for _ in range(200)]
        await asyncio.sleep(0.001)
        assert first.kept.send()
        kept.take_in()
        assert len(kept) == 200
        for peer in peers:
            peer.close()
        await until_held(kept, 0)

    serve(tmp_path, test)


def slots(worker: Worker) -> list[int]:
    """The slots of its connections."""
    return sorted(link.slot for link in worker.connections._links.values())


def test_a_slot_is_given_again_once_the_supervisor_knows_that_its_connection_is_gone(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        for _ in range(3):
            peer = first.accept()
            await kong.event_on(peer)
            assert slots(first) == [1]
            peer.close()
            while not first.kept._free:
                await asyncio.sleep(0)
        peer = first.accept()
        await until_held(kept, 1)
        first.die()
        assert worker().taken_over == {"idle": 1}
        await kong.event_on(peer)
        peer.close()

    serve(tmp_path, test)


def test_an_answer_that_comes_after_its_connection_says_nothing_of_the_one_that_has_its_slot(
    tmp_path: Path,
) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        gone = first.accept()
        (connection,) = first.server.connections
        gone.close()
        while not first.kept._free:
            await asyncio.sleep(0)
        peer = first.accept()
        assert slots(first) == [1]
        await until_held(kept, 1)
        peer.send(kong.event)
        await kong.hears(peer, codec.QUERY_LOG)
        connection.finish(kong.end)  # its record was on its way to the disk
        first.die()
        assert worker().taken_over == {"ended": 1}
        peer.close()

    serve(tmp_path, test)


def test_the_next_worker_gives_no_slot_that_is_taken(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        peers = [first.accept() for _ in range(4)]
        await until_held(kept, 4)
        peers[1].close()
        await until_held(kept, 3)
        first.die()
        second = worker()
        assert slots(second) == [1, 3, 4]
        peers += [second.accept(), second.accept()]
        assert slots(second) == [1, 2, 3, 4, 5]
        for peer in peers:
            peer.close()

    serve(tmp_path, test)


def test_a_connection_too_many_is_served_and_not_kept(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], kept: Kept, kong: Kong) -> None:
        first = worker()
        peers = [first.accept(), first.accept()]
        for peer in peers:
            await kong.event_on(peer)
        assert slots(first) == [0, 1]
        await until_held(kept, 1)
        for peer in peers:
            peer.close()

    serve(tmp_path, test, most=1)


def test_the_limit_of_open_files_is_raised_and_leaves_room_for_other_files(tmp_path: Path) -> None:
    code = """
import resource
from openmeter_plugin.process.handoff import room_for_connections
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 2000))
print(room_for_connections(), *resource.getrlimit(resource.RLIMIT_NOFILE))
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
print(room_for_connections())
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["1744 2000 2000", "1"]
