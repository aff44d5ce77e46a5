"""Connection handoff: connections outlive the worker that served them."""

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
from openmeter_plugin.process.handoff import Handoff
from openmeter_plugin.spool.writer import SpoolWriter
from tests.bench.driver import ProtoBuf
from tests.plugin.spools import running_writer

CONFIG = b'{"ingest_endpoint": "http://127.0.0.1:9/events"}'
INSTANCE = 7


def forked(handoff: Handoff) -> Handoff:
    """Return the copy that a child process has."""
    child = copy.copy(handoff)
    child._supervisor_end, child._worker_end = handoff._supervisor_end.dup(), handoff._worker_end.dup()
    child._held = {slot: os.dup(descriptor) for slot, descriptor in handoff._held.items()}
    return child


class Worker:
    """A worker in this process; `die` ends it as kill -9 would."""

    def __init__(self, spool: Path, writer: SpoolWriter, handoff: Handoff) -> None:
        loop = asyncio.get_running_loop()
        instances = Instances(InstanceIds(spool), writer)
        instances.adopt(INSTANCE, CONFIG)
        self.server = Server(instances, writer, loop)
        self.handoff = handoff
        self.connections = Connections(loop, self.server.flush, handoff)
        self.taken_over = self.connections.take_over(self.server.connection)

    def accept(self) -> socket.socket:
        """Return Kong's end of a new connection."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.connections.add(ours, self.server.connection)
        return theirs

    def die(self) -> None:
        """Close all that the process had open, as the kernel does."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.connections._epoll.fileno())
        self.connections._epoll.close()
        for link in self.connections._links.values():
            link.socket.close()
        self.connections._links.clear()
        self.handoff.close()


class Kong:
    """Kong's side of the protocol."""

    def __init__(self) -> None:
        self.protocol = ProtoBuf()
        call = codec.encode_bytes(2, b"log") + b"\x08" + codec.encode_varint(INSTANCE)
        self.event = codec.frame(b"\x08\x07" + codec.encode_bytes(36, call))
        self.log = codec.frame(codec.encode_bytes(1, self.protocol.log(1)))
        self.end = codec.END_OF_EVENT + codec.encode_return(7)

    async def expect(self, peer: socket.socket, expected: bytes) -> None:
        """Wait for exactly these bytes."""
        data = b""
        while len(data) < len(expected):
            part = await asyncio.get_running_loop().sock_recv(peer, len(expected) - len(data))
            assert part, "the stream ended"
            data += part
        assert data == expected

    async def send_event(self, peer: socket.socket) -> None:
        """Hand an event over."""
        peer.send(self.event)
        await self.expect(peer, codec.QUERY_LOG)
        peer.send(self.log)
        await self.expect(peer, self.end)


def serve(
    tmp_path: Path,
    test: Callable[[Callable[[], Worker], Handoff, Kong], Awaitable[None]],
    limit: int = 1000,
    per_message: int = 250,
) -> None:
    """Run a test with a function that creates the next worker, and with the supervisor's side."""

    async def body(writer: SpoolWriter) -> None:
        handoff = Handoff(limit, per_message=per_message)
        workers: list[Worker] = []

        def worker() -> Worker:
            handoff.receive()
            workers.append(Worker(tmp_path, writer, forked(handoff)))
            return workers[-1]

        try:
            await asyncio.wait_for(test(worker, handoff, Kong()), 20)
        finally:
            workers[-1].connections.close()
            workers[-1].handoff.close()
            handoff.close()

    def committed(tokens: list[Any]) -> None:
        loop.call_soon_threadsafe(Server.committed, tokens)

    with running_writer(tmp_path, committed) as writer:
        loop = uvloop.new_event_loop()
        loop.run_until_complete(body(writer))
        loop.close()


def test_an_idle_connection_is_served_by_the_next_worker(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], _: Handoff, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.send_event(peer)
        for _turn in range(2):
            first.die()
            first = worker()
            assert first.taken_over == {"idle": 1}
            await kong.send_event(peer)
        peer.close()

    serve(tmp_path, test)


def test_a_call_that_kong_wrote_between_two_workers_is_answered_by_the_next(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], _: Handoff, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.send_event(peer)
        first.die()
        peer.send(kong.event)
        assert worker().taken_over == {"idle": 1}
        await kong.expect(peer, codec.QUERY_LOG)
        peer.send(kong.log)
        await kong.expect(peer, kong.end)
        peer.close()

    serve(tmp_path, test)


@pytest.mark.parametrize("read", [3, 11, None], ids=["a part of its length", "a part of it", "all of it"])
def test_a_connection_with_a_call_under_way_ends_without_a_reset(tmp_path: Path, read: int | None) -> None:
    async def test(worker: Callable[[], Worker], _: Handoff, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.send_event(peer)
        peer.send(kong.event[:read])
        if read is None:
            await kong.expect(peer, codec.QUERY_LOG)
        else:
            while not first.connections._links or not all(
                connection._chunks for connection in first.server.connections
            ):
                await asyncio.sleep(0)
        first.die()
        assert worker().taken_over == {"ended": 1}
        if read is not None:
            peer.send(kong.event[read:])  # Kong's sends fail only if no process holds the connection
        peer.send(kong.log)
        assert await asyncio.get_running_loop().sock_recv(peer, 1) == b""
        await asyncio.sleep(0)
        peer.send(kong.log)
        peer.close()

    serve(tmp_path, test)


def test_a_connection_is_idle_once_its_start_of_an_instance_is_answered(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        body = codec.encode_bytes(1, b"openmeter") + codec.encode_bytes(2, CONFIG)
        peer.send(codec.frame(b"\x08\x09" + codec.encode_bytes(33, body)))
        assert await asyncio.get_running_loop().sock_recv(peer, 1000)
        peer.send(codec.frame(b"\x08\x0a" + codec.encode_bytes(35, b"\x08" + codec.encode_varint(999))))
        assert await asyncio.get_running_loop().sock_recv(peer, 1000)
        first.die()
        assert worker().taken_over == {"idle": 1}
        await kong.send_event(peer)
        peer.close()

    serve(tmp_path, test)


def test_a_connection_is_busy_until_kong_has_read_the_answer(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.send_event(peer)
        (link,) = first.connections._links.values()
        handoff.states[link.slot] = 1
        link.write(bytes(800_000))
        assert link.has_unsent
        link.finish(b"end")
        first.die()
        assert worker().taken_over == {"ended": 1}
        peer.close()

    serve(tmp_path, test)


def test_kong_sees_at_once_that_a_worker_closes_a_connection_that_the_supervisor_holds(
    tmp_path: Path,
) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        await kong.send_event(peer)
        await until_held(handoff, 1)
        (connection,) = first.server.connections
        connection.close()
        assert await asyncio.get_running_loop().sock_recv(peer, 1) == b""
        await until_held(handoff, 0)
        peer.close()

    serve(tmp_path, test)


async def until_held(handoff: Handoff, connections: int) -> None:
    """Have the supervisor receive until it holds `connections`."""
    while len(handoff) != connections:
        handoff.receive()
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("per_message", [1, 7, 250])
def test_connections_that_the_supervisor_has_no_room_for_are_sent_later(
    tmp_path: Path, per_message: int
) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        handoff._worker_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        first = worker()
        peers = []
        for _ in range(60):
            peers.append(first.accept())
            await asyncio.sleep(0.001)  # a turn of the loop for each
        assert not first.handoff.send()
        await until_held(handoff, 60)
        for peer in peers[::2]:
            peer.close()
        await until_held(handoff, 30)
        first.die()
        assert worker().taken_over == {"idle": 30}
        for peer in peers[1::2]:
            await kong.send_event(peer)
            peer.close()

    serve(tmp_path, test, per_message=per_message)


def test_a_connection_that_closes_before_it_is_sent_is_never_sent(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        peer = first.accept()
        (connection,) = first.server.connections
        connection.close()
        assert first.handoff.send()
        assert not handoff.receive()
        peer.close()

    serve(tmp_path, test)


def test_connections_are_served_even_if_the_kernel_passes_no_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = socket.send_fds

    def refusing(to: socket.socket, data: list[bytes], descriptors: list[int]) -> int:
        if descriptors:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return send(to, data, descriptors)

    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        before = first.accept()
        await kong.send_event(before)
        await until_held(handoff, 1)
        monkeypatch.setattr(socket, "send_fds", refusing)
        peer = first.accept()
        await kong.send_event(peer)
        before.close()
        await until_held(handoff, 0)
        peer.close()

    serve(tmp_path, test)


def test_many_connections_at_once_fit_in_few_messages_to_the_supervisor(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        handoff._worker_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        first = worker()
        peers = [first.accept() for _ in range(200)]
        await asyncio.sleep(0.001)
        assert first.handoff.send()
        handoff.receive()
        assert len(handoff) == 200
        for peer in peers:
            peer.close()
        await until_held(handoff, 0)

    serve(tmp_path, test)


def slots(worker: Worker) -> list[int]:
    """Return the slots of its connections."""
    return sorted(link.slot for link in worker.connections._links.values())


def test_a_slot_is_reused_once_the_supervisor_knows_that_its_connection_is_closed(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        for _ in range(3):
            peer = first.accept()
            await kong.send_event(peer)
            assert slots(first) == [1]
            peer.close()
            while not first.handoff._free:
                await asyncio.sleep(0)
        peer = first.accept()
        await until_held(handoff, 1)
        first.die()
        assert worker().taken_over == {"idle": 1}
        await kong.send_event(peer)
        peer.close()

    serve(tmp_path, test)


def test_a_late_answer_does_not_mark_the_next_connection_in_its_slot_as_idle(
    tmp_path: Path,
) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        gone = first.accept()
        (connection,) = first.server.connections
        gone.close()
        while not first.handoff._free:
            await asyncio.sleep(0)
        peer = first.accept()
        assert slots(first) == [1]
        await until_held(handoff, 1)
        peer.send(kong.event)
        await kong.expect(peer, codec.QUERY_LOG)
        connection.finish(kong.end)  # its record was on its way to the disk
        first.die()
        assert worker().taken_over == {"ended": 1}
        peer.close()

    serve(tmp_path, test)


def test_the_next_worker_assigns_no_slot_that_is_in_use(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        peers = [first.accept() for _ in range(4)]
        await until_held(handoff, 4)
        peers[1].close()
        await until_held(handoff, 3)
        first.die()
        second = worker()
        assert slots(second) == [1, 3, 4]
        peers += [second.accept(), second.accept()]
        assert slots(second) == [1, 2, 3, 4, 5]
        for peer in peers:
            peer.close()

    serve(tmp_path, test)


def test_a_connection_above_the_limit_is_served_and_not_held(tmp_path: Path) -> None:
    async def test(worker: Callable[[], Worker], handoff: Handoff, kong: Kong) -> None:
        first = worker()
        peers = [first.accept(), first.accept()]
        for peer in peers:
            await kong.send_event(peer)
        assert slots(first) == [0, 1]
        await until_held(handoff, 1)
        for peer in peers:
            peer.close()

    serve(tmp_path, test, limit=1)


def test_the_limit_of_open_files_is_raised_and_leaves_room_for_other_files(tmp_path: Path) -> None:
    code = """
import resource
from openmeter_plugin.process.handoff import raise_connection_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 2000))
print(raise_connection_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
print(raise_connection_limit())
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["1744 2000 2000", "1"]
