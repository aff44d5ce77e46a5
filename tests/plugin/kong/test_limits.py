"""What processes that are not Kong can take from a worker: bounded memory, and no room that Kong needs."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson
import pytest

from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.kong import codec
from openmeter_plugin.kong.acceptor import Acceptor, ConnectionCounts
from tests.bench.beside import hand_over
from tests.bench.driver import ProtoBuf
from tests.bench.driver import connect as connect_as_kong
from tests.harness.process import plugin_server
from tests.harness.service_manager import unix_listener
from tests.plugin.serving import Serving, serve
from tests.plugin.spools import running_writer

KIB = 1024


async def until_held(serving: Serving, size: int) -> None:
    while sum(connection.held for connection in serving.server.connections) != size:
        await asyncio.sleep(0.001)


def test_incomplete_frames_of_all_connections_together_are_bounded_and_the_largest_goes(
    tmp_path: Path,
) -> None:
    async def test(serving: Serving) -> None:
        kong, *others = [serving.connect() for _ in range(4)]
        await serving.begin(kong)
        log = codec.frame(codec.encode_bytes(1, serving.protocol.log(1)))
        kong.send(log[:100])
        frame = codec.frame(bytes(60 * KIB))
        for other, size in zip(others, (30, 20, 10), strict=True):
            other.send(frame[: size * KIB])
        await until_held(serving, 60 * KIB + 100)
        others[1].send(frame[: 9 * KIB])  # 69 KiB of 64
        assert await serving.loop.sock_recv(others[0], 1) == b"", "the largest is closed"
        await until_held(serving, 39 * KIB + 100)
        kong.send(log[100:])
        end = codec.END_OF_EVENT + codec.encode_return(7)
        assert await serving.expect(kong, len(end)) == end
        for peer in (kong, *others):
            peer.close()
        await until_held(serving, 0)

    serve(tmp_path, test, max_incomplete=64 * KIB)


def test_a_frame_that_stays_incomplete_ends_its_connection_and_one_that_goes_on_does_not(
    tmp_path: Path,
) -> None:
    async def test(serving: Serving) -> None:
        stuck, slow = serving.connect(), serving.connect()
        for peer in (stuck, slow):
            peer.send(codec.frame(serving.event)[:9])
        await until_held(serving, 18)
        serving.server.close_stale()
        slow.send(codec.frame(serving.event)[9:])
        assert await serving.expect(slow, len(codec.QUERY_LOG)) == codec.QUERY_LOG
        slow.send(codec.frame(codec.encode_bytes(1, serving.protocol.log(1)))[:50])  # the next frame
        await until_held(serving, 59)
        serving.server.close_stale()
        assert await serving.loop.sock_recv(stuck, 1) == b""
        await until_held(serving, 50)
        stuck.close()
        slow.close()

    serve(tmp_path, test)


def test_a_connection_without_any_call_is_closed_and_an_idle_one_of_kong_is_not(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        silent, kong, late = (serving.connect() for _ in range(3))
        await serving.begin(kong)
        await serving.finish(kong)
        serving.server.close_stale()
        late.send(codec.frame(serving.event))  # unread at the second check
        serving.server.close_stale()
        assert await serving.loop.sock_recv(silent, 1) == b""
        assert await serving.expect(late, len(codec.QUERY_LOG)) == codec.QUERY_LOG
        for _ in range(3):
            serving.server.close_stale()
        await serving.begin(kong)
        for peer in (silent, kong, late):
            peer.close()

    serve(tmp_path, test)


def test_only_small_calls_are_remembered(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peer = serving.connect()
        instance = b"\x08" + codec.encode_varint(serving.instance.id)
        for size in (3, 5_000_000):
            call = codec.encode_bytes(2, b"x" * size) + instance
            await serving.loop.sock_sendall(peer, codec.frame(b"\x08\x07" + codec.encode_bytes(36, call)))
            assert await serving.expect(peer, len(codec.QUERY_LOG)) == codec.QUERY_LOG
            await serving.finish(peer)
        assert max(map(len, serving.server.event_calls)) < 100
        peer.close()

    serve(tmp_path, test)


@pytest.mark.slow
def test_a_peer_that_never_reads_its_answers_is_closed(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peer = serving.connect()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4608)
        close = codec.frame(b"\x08\x07" + codec.encode_bytes(35, b"\x08\x01"))
        with peer:
            while serving.server.connections:
                try:
                    await asyncio.wait_for(serving.loop.sock_sendall(peer, close * 5_000), 5)
                except ConnectionError:
                    break

    serve(tmp_path, test)


def test_instances_are_bounded_and_the_oldest_is_forgotten(tmp_path: Path) -> None:
    config = orjson.dumps({"ingest_endpoint": "http://a.example/"})
    with running_writer(tmp_path) as writer:
        instances = Instances(InstanceIds(tmp_path), writer, limit=3)
        started = [instances.start(config) for _ in range(5)]
        assert [instances.get(one.id) is one for one in started] == [False, False, True, True, True]


def test_silent_connections_make_room_for_those_of_kong(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        with unix_listener(tmp_path / "s") as listener, ExitStack() as stack:
            acceptor = Acceptor(
                listener,
                serving.server,
                serving.connections,
                ConnectionCounts(1),
                0,
                serving.loop,
                max_connections=40,
            )

            def connect() -> socket.socket:
                peer = stack.enter_context(socket.socket(socket.AF_UNIX))
                peer.connect(str(tmp_path / "s"))
                peer.setblocking(False)
                return peer

            kong = connect()
            await serving.begin(kong)
            await serving.finish(kong)
            for _ in range(200):
                connect()
                acceptor.accept_pending()
                assert len(serving.connections) <= 40
            for peer in (kong, connect()):
                await serving.begin(peer)
                await serving.finish(peer)
            acceptor.close()

    serve(tmp_path, test)


def test_what_others_do_not_accept_is_accepted_all_at_once(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        with unix_listener(tmp_path / "s") as listener, ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "s"))
            counts = ConnectionCounts(2)  # the second worker is stopped
            acceptor = Acceptor(listener, serving.server, serving.connections, counts, 0, serving.loop)
            began = time.monotonic()
            while len(serving.connections) < 400:
                await asyncio.sleep(0.001)
            assert time.monotonic() - began < 2.5, "10 ms for each is 4 s"
            acceptor.close()

    serve(tmp_path, test)


@contextmanager
def many_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_thousands_of_pending_connections_do_not_delay_an_event_of_kong(tmp_path: Path) -> None:
    protocol = ProtoBuf()
    config = {"ingest_endpoint": "http://127.0.0.1:9/events", "__plugin_id": "many"}
    with (
        plugin_server(tmp_path, "--workers", "2") as server,
        many_open_files(),
        ExitStack() as silent,
    ):
        with connect_as_kong(server.socket) as kong:
            protocol.start(kong, config)
        for _ in range(4_000):
            silent.enter_context(socket.socket(socket.AF_UNIX)).connect(str(server.socket))
        with connect_as_kong(server.socket) as kong:
            began = time.monotonic()
            hand_over(kong, protocol, 1)
            assert time.monotonic() - began < 1.5, "an exact balance between the workers took 2.5 s and more"
