"""Sockets and rounds: writes arrive however slowly the peer reads; a hung disk or peer blocks no other."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.kong import codec
from openmeter_plugin.kong.connections import Connections, Link
from openmeter_plugin.kong.server import Server
from openmeter_plugin.spool.writer import SpoolWriter
from tests.bench.driver import ProtoBuf
from tests.plugin.spools import Disk, running_writer


class Echo:
    """Answers with `times` the received bytes, and notes the end of the connection."""

    def __init__(self, link: Link, times: int = 1) -> None:
        self.link = link
        self.times = times
        self.gone = False
        self.parts: list[bytes] = []

    def received(self, data: bytes) -> None:
        self.parts.append(data)
        self.link.write(data * self.times)

    def lost(self) -> None:
        assert not self.gone
        self.gone = True


def run(test: Callable[[Connections, list[int]], Awaitable[None]]) -> None:
    """Run a test on a loop with connections; the list counts the rounds."""

    async def body() -> None:
        rounds: list[int] = []
        connections = Connections(asyncio.get_running_loop(), lambda: rounds.append(1))
        try:
            await asyncio.wait_for(test(connections, rounds), 20)
        finally:
            connections.close()

    uvloop.run(body())


def pair(connections: Connections, times: int = 1) -> tuple[socket.socket, Echo]:
    ours, theirs = socket.socketpair()
    made: list[Echo] = []

    def handler(link: Link) -> Echo:
        made.append(Echo(link, times))
        return made[0]

    connections.add(ours, handler)
    theirs.setblocking(False)
    return theirs, made[0]


async def read(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(peer, 65536)
        if not part:
            break
        data += part
    return data


def test_bytes_come_and_go() -> None:
    async def test(connections: Connections, rounds: list[int]) -> None:
        peer, _ = pair(connections)
        with peer:
            peer.send(b"hello")
            assert await read(peer, 5) == b"hello"
            assert rounds

    run(test)


def test_a_peer_that_reads_late_gets_everything_and_does_not_delay_others() -> None:
    async def test(connections: Connections, _: list[int]) -> None:
        slow, _handler = pair(connections, times=150_000)
        quick, _handler = pair(connections)
        with slow, quick:
            slow.send(b"abc")
            quick.send(b"1")
            assert await read(quick, 1) == b"1"
            slow.send(b"d")
            quick.send(b"2")
            assert await read(quick, 1) == b"2"
            data = await read(slow, 600_000)
            assert data == b"abc" * 150_000 + b"d" * 150_000

    run(test)


def test_the_length_of_a_frame_and_its_content_are_taken_together_when_both_are_there() -> None:
    async def test(connections: Connections, _: list[int]) -> None:
        peer, handler = pair(connections)
        with peer:
            peer.send(b"\x05\x00\x00\x00")
            peer.send(b"hello")
            await read(peer, 9)
            assert handler.parts == [b"\x05\x00\x00\x00hello"]

    run(test)


@pytest.mark.parametrize("how", ["closed", "half-closed", "broken"])
def test_the_end_of_a_connection_is_reported_once(how: str) -> None:
    async def test(connections: Connections, _: list[int]) -> None:
        peer, handler = pair(connections)
        if how == "half-closed":
            peer.shutdown(socket.SHUT_WR)
        else:
            if how == "broken":
                handler.link.write(b"unread")  # so that closing it is a reset
            peer.close()
        while not handler.gone:
            await asyncio.sleep(0)
        handler.link.write(b"too late")
        handler.link.close()
        assert len(connections) == 0
        peer.close()

    run(test)


def test_connections_that_are_always_ready_do_not_starve_the_event_loop() -> None:
    async def test(connections: Connections, _: list[int]) -> None:
        ours, theirs = socket.socketpair()

        class Endless(Echo):
            def received(self, data: bytes) -> None:
                theirs.send(b"x")  # there are always more bytes

        connections.add(ours, Endless)
        theirs.send(b"x")
        for _turn in range(20):
            await asyncio.sleep(0.001)
        theirs.close()

    run(test)


class Kong:
    """Kong's side of one connection, on the same event loop."""

    def __init__(self, connections: Connections, server: Server) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        connections.add(ours, server.connection)
        self.protocol = ProtoBuf()

    async def exchange(self, data: bytes, answer: int) -> bytes:
        """Send bytes and return the answer of `answer` bytes."""
        self.socket.send(data)
        return await read(self.socket, answer)


async def hand_over(kong: Kong, event: bytes, number: int, end: int) -> bytes:
    query = await kong.exchange(event, len(codec.QUERY_LOG))
    assert query == codec.QUERY_LOG
    return await kong.exchange(codec.frame(codec.encode_bytes(1, kong.protocol.log(number))), end)


def test_a_disk_that_hangs_delays_no_answer_for_long_and_answers_no_event_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path)
    monkeypatch.setattr("os.write", disk.write)

    async def body(writer: SpoolWriter, notify: list[Any]) -> None:
        loop = asyncio.get_running_loop()

        def hangs() -> bool:
            return writer.stalled

        notify.append(lambda tokens: loop.call_soon_threadsafe(Server.committed, tokens))
        server = Server(Instances(InstanceIds(tmp_path), writer), writer, loop)
        connections = Connections(loop, server.flush)
        instance = server.instances.start(b'{"ingest_endpoint": "http://127.0.0.1:9/events"}')
        body = codec.encode_bytes(
            36, codec.encode_bytes(2, b"log") + b"\x08" + codec.encode_varint(instance.id)
        )
        event = codec.frame(b"\x08\x07" + body)
        end = codec.END_OF_EVENT + codec.encode_return(7)
        kong = Kong(connections, server)
        assert await hand_over(kong, event, 1, len(end)) == end

        disk.open_gate.clear()
        writer._disk_speed.observe(1)  # so that the thread writes, not this one
        hanging = asyncio.create_task(hand_over(kong, event, 2, len(end)))
        while not hangs():
            await asyncio.sleep(0)
        assert not hanging.done()
        server.check_disk()
        assert await hanging == end
        assert await hand_over(kong, event, 3, len(end)) == end
        # The next event is under way when the disk recovers: late confirmations are not for it.
        assert await kong.exchange(event, len(codec.QUERY_LOG)) == codec.QUERY_LOG
        disk.open_gate.set()
        while hangs():
            await asyncio.sleep(0)
        server.check_disk()
        for _turn in range(100):
            await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            kong.socket.recv(100)
        answer = codec.frame(codec.encode_bytes(1, kong.protocol.log(4)))
        assert await kong.exchange(answer, len(end)) == end
        kong.socket.close()
        connections.close()

    notify: list[Any] = []

    def committed(tokens: list[Any]) -> None:
        notify[0](tokens)

    with running_writer(tmp_path, committed, stalled_after=0.05) as writer:
        uvloop.run(asyncio.wait_for(body(writer, notify), 20))
    spooled = b"".join(path.read_bytes() for path in tmp_path.glob("queues/*/*.seg"))
    assert [spooled.count(b'"id":"%032x"' % number) for number in range(1, 5)] == [1, 1, 1, 1]
