"""Shutdown of connections while Kong may write to them at that very moment."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from contextlib import ExitStack
from pathlib import Path

from openmeter_plugin.instances.worker_sync import Mailboxes, WorkerSync
from openmeter_plugin.kong import codec, shutdown
from openmeter_plugin.kong.acceptor import Acceptor, ConnectionCounts
from openmeter_plugin.kong.shutdown import drain
from tests.harness.service_manager import unix_listener
from tests.plugin.serving import Serving, serve


def ended(peer: socket.socket) -> bool:
    """Return whether the stream has ended; raises ConnectionResetError if it was reset."""
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False


async def next_ended(peers: list[socket.socket]) -> list[int]:
    """Wait until a stream ends, and a little longer; return the numbers of those that ended."""
    while not (over := [number for number, peer in enumerate(peers) if ended(peer)]):
        await asyncio.sleep(0.001)
    for _turn in range(20):
        await asyncio.sleep(0.002)
    return sorted({*over, *(number for number, peer in enumerate(peers) if ended(peer))})


def test_idle_connections_are_ended_one_by_one_beginning_with_the_least_recently_used(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peers = [serving.connect() for _ in range(4)]
        for number in (2, 0, 3, 1):
            await serving.begin(peers[number])
            await serving.finish(peers[number])
        stopping = asyncio.create_task(drain(serving.server, 15.0, 15.0))
        left = dict(enumerate(peers))
        for expected in (2, 0, 3, 1):
            over = await next_ended(list(left.values()))
            assert [list(left)[number] for number in over] == [expected]
            left.pop(expected).close()
        await stopping
        assert not serving.server.connections

    serve(tmp_path, test)


def test_a_call_that_is_answered_during_the_shutdown_ends_its_connection_with_the_answer(
    tmp_path: Path,
) -> None:
    async def test(serving: Serving) -> None:
        idle, used = serving.connect(), serving.connect()
        await serving.begin(used)
        stopping = asyncio.create_task(drain(serving.server, 15.0, 15.0))
        while not ended(idle):  # Kong does not react to it, so the shutdown of idle ones waits
            await asyncio.sleep(0)
        late = serving.connect()  # as accepted from the socket that ends with this server
        for peer in (used, late):
            if peer is late:
                await serving.begin(late)
            await serving.finish(peer)
            assert ended(peer)
        for peer in (idle, used, late):
            peer.close()
        await stopping

    serve(tmp_path, test)


def test_an_event_that_arrives_during_the_shutdown_is_read_and_the_stream_ends_without_a_reset(
    tmp_path: Path,
) -> None:
    async def test(serving: Serving) -> None:
        peer, other = serving.connect(), serving.connect()
        await serving.begin(other)  # under way
        stopping = asyncio.create_task(drain(serving.server, 60.0, 60.0))
        while not serving.handlers[0].is_shut_down:
            await asyncio.sleep(0)
        frame = codec.frame(serving.event)
        peer.send(frame[:4])
        await asyncio.sleep(0.02)
        peer.send(frame[4:])  # neither fails: Kong's sends raise what it does not catch
        assert await serving.loop.sock_recv(peer, 100) == b""  # nor is it reset
        while serving.handlers[0].is_open:  # although Kong closes its side only when it is done elsewhere
            await asyncio.sleep(0.001)
        assert await serving.loop.sock_recv(peer, 100) == b""
        await serving.finish(other)
        while not ended(other):
            await asyncio.sleep(0.001)
        other.close()
        await stopping
        peer.close()

    serve(tmp_path, test)


def test_while_kong_starts_an_instance_again_no_other_connection_is_ended(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peer, other = serving.connect(), serving.connect()
        stopping = asyncio.create_task(drain(serving.server, 15.0, 15.0, race_pause=10.0))
        handlers = serving.handlers
        while not any(handler.is_shut_down for handler in handlers):
            await asyncio.sleep(0)
        if handlers[1].is_shut_down:
            peer, other, handlers = other, peer, handlers[::-1]
        peer.send(codec.frame(serving.event))
        while handlers[0].is_open:
            await asyncio.sleep(0)
        for _turn in range(5):  # Kong's log, its other workers
            await asyncio.sleep(0.002)
        body = codec.encode_bytes(1, b"openmeter") + codec.encode_bytes(2, b"{}")
        other.send(codec.frame(b"\x08\x09" + codec.encode_bytes(33, body)))
        assert (await serving.expect(other, 6))[4:] == b"\x08\x09"
        peer.close()
        other.close()
        await stopping

    serve(tmp_path, test)


def test_a_connection_on_which_an_instance_is_started_is_not_idle(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peer = serving.connect()
        body = codec.encode_bytes(1, b"openmeter") + codec.encode_bytes(2, b"{}")
        peer.send(codec.frame(b"\x08\x09" + codec.encode_bytes(33, body)))
        while not serving.handlers[0].awaits_instance:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(drain(serving.server, 15.0, 15.0))
        for _turn in range(20):
            await asyncio.sleep(0.002)
        assert not ended(peer)
        known.set()
        assert (await serving.expect(peer, 6))[4:] == b"\x08\x09"
        peer.close()
        await stopping

    known = asyncio.Event()

    class SlowSync(WorkerSync):
        async def announce(self, instance_id: int, config: bytes) -> None:
            await known.wait()

    mailboxes = Mailboxes(2)
    others = SlowSync(mailboxes, 0, on_start=lambda *_: None, on_close=lambda _: None)
    serve(tmp_path, test, worker_sync=others)
    for pair in mailboxes.pairs:
        for inbox in pair:
            inbox.close()


def test_a_kong_that_does_not_react_delays_a_stop_no_longer_than_its_bound(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peers = [serving.connect() for _ in range(20)]
        await serving.begin(peers[0])
        began = serving.loop.time()
        await drain(serving.server, 0.6, 0.2)
        assert 0.5 < serving.loop.time() - began < 5.0
        assert all(connection.is_shut_down for connection in serving.server.connections)
        assert all(ended(peer) for peer in peers)
        for peer in peers:
            peer.close()

    serve(tmp_path, test)


def test_many_connections_are_accepted_in_few_turns(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        with unix_listener(tmp_path / "s") as listener, ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "s"))
            acceptor = Acceptor(
                listener, serving.server, serving.connections, ConnectionCounts(1), 0, serving.loop
            )
            turns = 0
            while len(serving.connections) < 50:
                acceptor.accept_pending()  # ends early on a busy machine: a turn has a limit in time
                turns += 1
            assert turns < 25
            acceptor.close()

    serve(tmp_path, test)


def test_a_connection_on_which_kong_has_just_called_is_not_ended(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peers = [serving.connect() for _ in range(3)]
        called, idle, _ = serving.handlers
        pool = shutdown.Pool(0.0)
        pool.connections = [called, idle]
        peers[0].send(codec.frame(serving.event))  # unread in the socket: the event loop gets no turn
        for _turn in range(3):
            pool.step(serving.loop.time(), 0.0)
        assert [called.is_shut_down, idle.is_shut_down] == [False, True]
        for peer in peers:
            peer.close()

    serve(tmp_path, test)


def test_connections_that_others_do_not_accept_go_to_the_worker_with_more_than_its_share(
    tmp_path: Path,
) -> None:
    async def test(serving: Serving) -> None:
        with unix_listener(tmp_path / "s") as listener, ExitStack() as stack:
            counts = ConnectionCounts(2)  # the second worker accepts none
            acceptor = Acceptor(listener, serving.server, serving.connections, counts, 0, serving.loop)
            for number in range(1, 4):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "s"))
                while len(serving.connections) < number:
                    await asyncio.sleep(0.001)
            acceptor.close()

    serve(tmp_path, test)


def test_without_free_descriptors_connections_wait_and_nothing_spins(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with unix_listener(tmp_path / "s") as listener, ExitStack() as stack:
            acceptor = Acceptor(
                listener,
                serving.server,
                serving.connections,
                ConnectionCounts(1),
                0,
                serving.loop,
                retry_seconds=0.05,
            )
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "s"))
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
            try:
                acceptor.accept_pending()
                watched = serving.loop.remove_reader(listener)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert not watched
            assert len(serving.connections) == 0
            while not len(serving.connections):
                await asyncio.sleep(0.001)
            acceptor.close()

    serve(tmp_path, test)
