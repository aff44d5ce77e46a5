"""Restarting under traffic, with Kong's own rules for what it sends again (tests/harness/kong.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import uvloop

from openmeter_plugin import draining, wire
from openmeter_plugin.accepting import Acceptor, Shares
from openmeter_plugin.config import parse_config, parse_object
from openmeter_plugin.connections import Connections, Link
from openmeter_plugin.draining import drain
from openmeter_plugin.instance_files import InstanceFiles, restored, without_token
from openmeter_plugin.instances import InstanceIds, Instances
from openmeter_plugin.server import Connection, Server
from openmeter_plugin.spool.writer import SpoolWriter
from syncd.sandbox.testing import running_sandbox
from tests.bench.driver import ProtoBuf
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import WIRE, Recorded, serialized
from tests.harness.service_manager import managed, unix_listener
from tests.plugin.spools import running_writer

TOKEN = "token-of-this-test"


def plugin(sandbox: str) -> PluginInstance:
    return PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "api_token": TOKEN,
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": "restarted",
        }
    )


def request(number: int) -> tuple[Recorded, str]:
    template = serialized("authenticated")
    original = template.parsed["request"]["id"].encode()
    request_id = f"{number:032x}"
    return Recorded(request_id, template.log.replace(original, request_id.encode())), request_id


def stored(sandbox: str) -> int:
    headers = {"authorization": f"Bearer {TOKEN}"}
    stats = httpx.get(f"{sandbox}/sandbox/v1/stats", headers=headers, trust_env=False).json()
    return int(stats["events_stored"])


def drive_through(
    path: Path, sandbox: str, restart: Callable[[], object], *, restarts: int = 3
) -> KongWorker:
    """Drive a server as Kong does while it is restarted so many times."""
    done = asyncio.Event()

    async def restarting(worker: KongWorker) -> None:
        for _ in range(restarts + 1):
            before = len(worker.tally.acknowledged)
            while len(worker.tally.acknowledged) < before + 200:
                await asyncio.sleep(0.005)
            if _ < restarts:
                await asyncio.to_thread(restart)
        done.set()

    def requests() -> Iterator[tuple[PluginInstance, Recorded, str]]:
        instance, number = plugin(sandbox), 0
        while not done.is_set():
            recorded, tag = request(number)
            yield instance, recorded, tag
            number += 1

    async def paced(worker: KongWorker, work: Iterator[tuple[PluginInstance, Recorded, str]]) -> None:
        """Hand over with pauses, so that connections are idle and taken again all the time."""
        for instance, recorded, tag in work:
            await worker.log(instance, recorded, tag)
            await asyncio.sleep(0.002)

    async def run() -> KongWorker:
        worker = KongWorker(path)
        work = requests()
        async with asyncio.TaskGroup() as group:
            group.create_task(restarting(worker))
            for _ in range(16):
                group.create_task(paced(worker, work))
        await worker.close()
        return worker

    return asyncio.run(run())


def assert_nothing_lost(worker: KongWorker, sandbox: str) -> None:
    tally = worker.tally
    assert (dict(tally.reasons), tally.refused_connections) == ({}, 0)
    eventually(lambda: stored(sandbox) >= len(tally.acknowledged), what="the arrival")
    assert stored(sandbox) == len(tally.acknowledged)


def test_a_restart_behind_a_held_socket_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        running_sandbox(token=TOKEN) as sandbox,
        managed(tmp_path, "--socket", str(path), plugin=unix_listener(path)) as manager,
    ):

        def restart() -> None:
            assert manager.end() == 0
            manager.start()

        worker = drive_through(path, sandbox, restart)
        assert_nothing_lost(worker, sandbox)
        assert len(manager.events("serving")) == 4


def test_a_server_that_is_replaced_by_the_next_one_loses_nothing(tmp_path: Path) -> None:
    with running_sandbox(token=TOKEN) as sandbox, ExitStack() as stack:
        running = [stack.enter_context(plugin_server(tmp_path))]

        def replace() -> None:
            serving = running[-1].log_text().count('"serving"')
            running.append(stack.enter_context(plugin_server(tmp_path)))
            eventually(lambda: running[-1].log_text().count('"serving"') > serving, what="serving")
            assert running[-2].stop() == 0

        eventually(lambda: '"serving"' in running[0].log_text(), what="serving")
        assert_nothing_lost(drive_through(running[0].socket, sandbox, replace), sandbox)


def test_connections_that_wait_for_a_server_that_was_replaced_are_served_before_it_ends(
    tmp_path: Path,
) -> None:
    with running_sandbox(token=TOKEN) as sandbox, plugin_server(tmp_path) as first:
        worker_process = eventually(lambda: first.child("worker") or 0, what="a worker")

        async def hand_over() -> KongWorker:
            worker, instance = KongWorker(first.socket), plugin(sandbox)
            assert await worker.log(instance, *request(0))
            os.kill(worker_process, signal.SIGSTOP)
            lanes = [asyncio.create_task(worker.log(instance, *request(n))) for n in range(1, 200)]
            for _turn in range(10):  # all of them have connected, to the socket of the first
                await asyncio.sleep(0.01)
            with plugin_server(tmp_path) as second:
                eventually(lambda: second.log_text().count('"serving"') == 2, what="serving")
                first.process.terminate()
                os.kill(worker_process, signal.SIGCONT)
                assert all(await asyncio.gather(*lanes))
                assert await asyncio.to_thread(first.process.wait, 20) == 0
                await worker.close()
            return worker

        worker = asyncio.run(hand_over())
        assert dict(worker.tally.reasons) == {}
        assert len(worker.tally.acknowledged) == 200


# How connections are ended


class Serving:
    """A server in this process, with connections that a test holds the other ends of."""

    def __init__(self, spool: Path, writer: SpoolWriter) -> None:
        self.loop = asyncio.get_running_loop()
        self.server = Server(Instances(InstanceIds(spool), writer), writer, self.loop)
        self.connections = Connections(self.loop, self.server.flush)
        self.instance = self.server.instances.start(b'{"ingest_endpoint": "http://127.0.0.1:9/events"}')
        self.protocol = ProtoBuf()
        self.handlers: list[Connection] = []
        call = wire.encode_bytes(2, b"log") + b"\x08" + wire.encode_varint(self.instance.id)
        self.event = b"\x08\x07" + wire.encode_bytes(36, call)

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)

        def handler(link: Link) -> Connection:
            self.handlers.append(self.server.connection(link))
            return self.handlers[-1]

        self.connections.add(ours, handler)
        return theirs

    async def expect(self, peer: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := await self.loop.sock_recv(peer, size - len(data))):
            data += part
        return data

    async def begin(self, peer: socket.socket) -> None:
        peer.send(wire.frame(self.event))
        assert await self.expect(peer, len(wire.ASK_FOR_LOG)) == wire.ASK_FOR_LOG

    async def finish(self, peer: socket.socket) -> None:
        peer.send(wire.frame(wire.encode_bytes(1, self.protocol.log(1))))
        end = wire.END_OF_EVENT + wire.encode_return(7)
        assert await self.expect(peer, len(end)) == end


def serve(tmp_path: Path, test: Callable[[Serving], Awaitable[None]]) -> None:
    async def body(writer: SpoolWriter) -> None:
        serving = Serving(tmp_path, writer)
        try:
            await asyncio.wait_for(test(serving), 20)
        finally:
            serving.connections.close()

    def tell(tokens: list[Any]) -> None:
        loop.call_soon_threadsafe(Server.committed, tokens)

    with running_writer(tmp_path, tell) as writer:
        loop = uvloop.new_event_loop()
        loop.run_until_complete(body(writer))
        loop.close()


def ended(peer: socket.socket) -> bool:
    """Return whether the stream has ended; raises ConnectionResetError where it was reset."""
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False


async def next_ended(peers: list[socket.socket]) -> list[int]:
    """Wait until a stream ends, and a little longer; return which have."""
    while not (over := [number for number, peer in enumerate(peers) if ended(peer)]):
        await asyncio.sleep(0.001)
    for _turn in range(20):
        await asyncio.sleep(0.002)
    return sorted({*over, *(number for number, peer in enumerate(peers) if ended(peer))})


def test_idle_connections_are_ended_one_by_one_beginning_with_that_used_least_lately(tmp_path: Path) -> None:
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


def test_an_event_that_comes_as_its_connection_ends_is_read_and_the_stream_just_ends(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peer, other = serving.connect(), serving.connect()
        await serving.begin(other)  # under way
        stopping = asyncio.create_task(drain(serving.server, 60.0, 60.0))
        while not serving.handlers[0]._is_shut_down:
            await asyncio.sleep(0)
        frame = wire.frame(serving.event)
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


def test_while_kong_starts_an_instance_again_no_other_connection_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "_AFTER_A_RACE", 10.0)

    async def test(serving: Serving) -> None:
        peer, other = serving.connect(), serving.connect()
        stopping = asyncio.create_task(drain(serving.server, 15.0, 15.0))
        handlers = serving.handlers
        while not any(handler._is_shut_down for handler in handlers):
            await asyncio.sleep(0)
        if handlers[1]._is_shut_down:
            peer, other, handlers = other, peer, handlers[::-1]
        peer.send(wire.frame(serving.event))
        while handlers[0].is_open:
            await asyncio.sleep(0)
        for _turn in range(5):  # Kong's log, its other workers
            await asyncio.sleep(0.002)
        body = wire.encode_bytes(1, b"openmeter") + wire.encode_bytes(2, b"{}")
        other.send(wire.frame(b"\x08\x09" + wire.encode_bytes(33, body)))
        assert (await serving.expect(other, 6))[4:] == b"\x08\x09"
        peer.close()
        other.close()
        await stopping

    serve(tmp_path, test)


def test_a_connection_on_which_an_instance_is_started_is_not_idle(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        known = asyncio.Event()

        class Others:
            async def announce(self, *_: object) -> None:
                await known.wait()

        serving.server.instance_calls._peers = Others()  # type: ignore[assignment]
        peer = serving.connect()
        body = wire.encode_bytes(1, b"openmeter") + wire.encode_bytes(2, b"{}")
        peer.send(wire.frame(b"\x08\x09" + wire.encode_bytes(33, body)))
        while not serving.handlers[0].under_way:
            await asyncio.sleep(0)
        stopping = asyncio.create_task(drain(serving.server, 15.0, 15.0))
        for _turn in range(20):
            await asyncio.sleep(0.002)
        assert not ended(peer)
        known.set()
        assert (await serving.expect(peer, 6))[4:] == b"\x08\x09"
        peer.close()
        await stopping

    serve(tmp_path, test)


def test_a_kong_that_takes_no_notice_holds_a_stop_up_no_longer_than_its_bound(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        peers = [serving.connect() for _ in range(20)]
        await serving.begin(peers[0])
        began = serving.loop.time()
        await drain(serving.server, 0.6, 0.2)
        assert 0.5 < serving.loop.time() - began < 5.0
        assert all(connection._is_shut_down for connection in serving.server.connections)
        assert all(ended(peer) for peer in peers)
        for peer in peers:
            peer.close()

    serve(tmp_path, test)


def test_many_connections_are_accepted_in_one_turn(tmp_path: Path) -> None:
    async def test(serving: Serving) -> None:
        with unix_listener(tmp_path / "s") as listener, ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "s"))
            acceptor = Acceptor(listener, serving.server, serving.connections, Shares(1), 0, serving.loop)
            acceptor.look()
            assert len(serving.connections) == 50
            acceptor.close()

    serve(tmp_path, test)


# What the next server knows


def only_file(server: PluginServer) -> Path:
    (path,) = eventually(lambda: list(server.spool.glob("instances/*.json")), what="the file")
    return path


def handed_over(server: PluginServer, instance: PluginInstance, number: int) -> KongWorker:
    async def run() -> KongWorker:
        worker = KongWorker(server.socket)
        recorded, tag = request(number)
        await drive(worker, [(instance, recorded, tag)], concurrency=1)
        await worker.close()
        return worker

    return asyncio.run(run())


def test_the_next_server_knows_the_instances_of_the_one_before_and_no_file_of_theirs_has_the_token(
    tmp_path: Path,
) -> None:
    with running_sandbox(token=TOKEN) as sandbox:
        instance = plugin(sandbox)
        with plugin_server(tmp_path) as server:
            assert handed_over(server, instance, 0).tally.lost == []
            path = only_file(server)
            assert path.stem == str(instance.instance_id)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert TOKEN not in path.read_text()
            eventually(lambda: stored(sandbox) == 1, what="the arrival")
        with plugin_server(tmp_path) as server:
            tally = handed_over(server, instance, 1).tally
            assert (tally.lost, tally.resent) == ([], 0)
            eventually(lambda: stored(sandbox) == 2, what="the arrival, with the token of before")


def test_of_an_instance_that_kong_has_closed_nothing_stays(tmp_path: Path) -> None:
    with running_sandbox(token=TOKEN) as sandbox, plugin_server(tmp_path) as server:
        instance = plugin(sandbox)
        handed_over(server, instance, 0)
        path = only_file(server)

        async def close() -> None:
            worker = KongWorker(server.socket)
            await worker.close_instance(int(path.stem))
            await worker.close()

        asyncio.run(close())
        eventually(lambda: not path.exists(), what="the removal")


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"\xff", b'{"config": {}, "keeps_token": true}', b"[]"]
)
def test_where_the_file_of_an_instance_cannot_be_used_kong_starts_it_again(
    tmp_path: Path, content: bytes | None
) -> None:
    with running_sandbox(token=TOKEN) as sandbox:
        instance = plugin(sandbox)
        with plugin_server(tmp_path) as server:
            handed_over(server, instance, 0)
            path = only_file(server)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with plugin_server(tmp_path) as server:
            tally = handed_over(server, instance, 1).tally
            assert (tally.lost, tally.resent) == ([], 1)


def test_what_is_kept_of_a_configuration_makes_the_same_rules() -> None:
    recorded = orjson.loads((WIRE / "start-instance-full-schema.json").read_bytes())
    for config in (
        recorded,
        {"ingest_endpoint": "http://a.example/", "$refs": {"api_token": "{vault://e/t}"}},
    ):
        raw = orjson.dumps(config | {"ingest_endpoint": "http://a.example/", "api_token": TOKEN})
        kept = without_token(raw)
        assert kept is not None
        known = restored(kept)
        assert known is not None
        assert known[1]
        assert parse_config(parse_object(known[0]))[1] == parse_config(parse_object(raw))[1]
        assert TOKEN.encode() not in kept


def test_a_configuration_that_cannot_be_used_is_not_kept() -> None:
    assert without_token(b'{"ingest_endpoint": 7, "secret": "s"}') is None
    assert without_token(b"no JSON") is None


def test_files_that_no_server_has_touched_for_long_are_removed_and_those_in_use_are_not(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        files = InstanceFiles(tmp_path, asyncio.get_running_loop())
        files.start()
        for number in (1, 2, 3):
            files.keep(number, b'{"ingest_endpoint": "http://a.example/"}')
        files.close(10)
        for number in (1, 2):
            os.utime(tmp_path / "instances" / f"{number}.json", (0, 0))
        files = InstanceFiles(tmp_path, asyncio.get_running_loop())
        files.start()
        files.sweep([1, 9])
        files.close(10)

    asyncio.run(body())
    left = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "instances").iterdir()}
    assert left == {"1.json": 0o600, "3.json": 0o600}
