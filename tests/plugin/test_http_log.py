"""`openmeter-plugin serve --http-log`: what Kong's http-log plugin posts, and what others try."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import uvloop
import yaml

from openmeter_plugin import http_log, http_log_spooling
from openmeter_plugin.config import ConfigError
from openmeter_plugin.http_log import HttpLog
from openmeter_plugin.http_log_config import CREDENTIAL, SECRET_VARIABLE, TOKEN_VARIABLE, load
from openmeter_plugin.http_log_records import MEMBERS
from openmeter_plugin.http_log_spooling import Post, _Piece
from openmeter_plugin.listening import listen_for_http_log
from openmeter_plugin.outcome import Spooled
from openmeter_plugin.server import Server
from openmeter_plugin.spool.destination import destination_id
from openmeter_plugin.spool.queue import Item
from openmeter_plugin.spool.segment import Record
from openmeter_plugin.spool.writer import SpoolWriter
from syncd.sandbox.testing import running_sandbox
from tests.harness.books import read_counts
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import SECRETS, WIRE, Recorded, serialized
from tests.plugin.spools import Disk, items

TOKEN = "token-of-this-test"
SECRET = "shared-secret-of-the-recording"
ENDPOINT = "http://127.0.0.1:9/api/v1/events"  # where nobody listens
QUEUE = destination_id(ENDPOINT, CREDENTIAL)
HEADERS = {"x-metering-key": SECRET, "content-type": "application/json"}

ALICE = "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"
BOB = "consumer:def4f7d3-9863-5ad2-8fa9-c949bf26f55e"
APPLICATION = "application:b15e2460-ba40-431d-9df0-4957fcffacda"


# What Kong posts


def recorded_posts() -> list[bytes]:
    """Return the two recorded requests, byte for byte."""
    lines = (WIRE / "http-log-posts.jsonl").read_text().splitlines()
    return [(p["request_head"] + p["body"]).encode() for p in map(json.loads, lines)]


def recorded_logs() -> list[dict[str, Any]]:
    """Return the logs of the first recorded post: a consumer's, an application's and a language model's."""
    logs: list[dict[str, Any]] = json.loads(recorded_posts()[0].partition(b"\r\n\r\n")[2])
    return logs


def log_of(request_id: str) -> bytes:
    """Return a consumer's log with another request id."""
    log = recorded_logs()[0]
    log["request"]["id"] = request_id
    return json.dumps(log, separators=(",", ":")).encode()


def batch(*request_ids: str) -> bytes:
    """Return what http-log posts for so many requests."""
    template, middle, end = log_of("REQUEST").partition(b"REQUEST")
    assert middle
    return b"[" + b",".join(template + request_id.encode() + end for request_id in request_ids) + b"]"


def configuration(endpoint: str = ENDPOINT, *, plugin: str = "", http_log: str = "") -> str:
    return f"""
ingest_endpoint: {endpoint}
api_token: {TOKEN}
queue:
  max_coalescing_delay: 0.05
{plugin}
http_log:
  secret: {SECRET}
{http_log}
"""


# The receiver in this process: its answers, and what is in the spool then


@dataclass
class Receiving:
    """A receiver at work."""

    port: int
    spool: Path
    client: httpx.AsyncClient

    async def post(self, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
        """Post a body as http-log does."""
        given = HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/ingest", content=body, headers=given)

    def records(self) -> list[Record]:
        """The records in the spool."""
        return [item for item in items(self.spool, QUEUE) if isinstance(item, Record)]

    def ids(self) -> list[str]:
        """The ids of the events in the spool, in their order."""
        events = b",".join(record.events for record in self.records() if record.kind == b"E")
        return [event["id"] for event in orjson.loads(b"[" + events + b"]")]


@asynccontextmanager
async def receiving(directory: Path, *, http_log: str = "", plugin: str = "") -> AsyncIterator[Receiving]:
    """Run a receiver with its spool below a directory."""
    file = directory / "openmeter-plugin.yaml"
    file.write_text(configuration(http_log=http_log, plugin=plugin))
    file.chmod(0o600)
    spool = directory / "spool"
    spool.mkdir()
    loop = asyncio.get_running_loop()

    def notify(tokens: list[Any]) -> None:
        loop.call_soon_threadsafe(Server.committed, tokens)

    writer = SpoolWriter(spool, notify)
    writer.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        receiver = HttpLog(socket.socket(fileno=os.dup(listener.fileno())), load(file, {}), writer)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                yield Receiving(port, spool, client)
        finally:
            await receiver.stop()
            await asyncio.to_thread(writer.close, 5)


def run(test: Any) -> None:
    """Run an async test on the loop that the worker has."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test)


async def bytes_answered(port: int, request: bytes) -> bytes:
    """Send bytes and return everything that comes back until the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def test_a_single_log_without_an_array_is_taken_as_with_a_batch_size_of_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            answer = await receiver.post(log_of("one"), content_type="application/json; charset=utf-8")
            assert (answer.status_code, answer.json()) == (200, {"requests": 1, "bad_records": 0})
            assert receiver.ids() == ["one"]

    run(test())


def test_a_post_has_its_200_only_when_all_of_it_is_on_disk(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for number in range(20):
                ids = [f"{number}-{n}" for n in range(50)]
                assert (await receiver.post(batch(*ids))).status_code == 200
                assert receiver.ids()[-50:] == ids

    run(test())


def test_every_method_that_http_log_knows_is_served_at_any_path(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for method in ("POST", "PUT", "PATCH"):
                answer = await receiver.client.request(method, "/a/b", content=batch("x"), headers=HEADERS)
                assert answer.status_code == 200
            assert (await receiver.client.get("/a/b", headers=HEADERS)).status_code == 405

    run(test())


def test_without_the_secret_nothing_is_taken(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for wrong in ("", SECRET[:-1], SECRET + "x"):
                answer = await receiver.post(batch("x"), x_metering_key=wrong)
                assert answer.status_code == 401
                assert "x-metering-key" in answer.json()["message"]
            without = {"content-type": "application/json"}
            assert (await receiver.client.post("/", content=b"[]", headers=without)).status_code == 401
            twice = [*HEADERS.items(), ("x-metering-key", SECRET)]
            assert (await receiver.client.post("/", content=b"[]", headers=twice)).status_code == 401
            assert receiver.records() == []

    run(test())


def test_several_secrets_are_good_at_a_time_so_that_one_can_be_replaced(tmp_path: Path) -> None:
    text = configuration().replace(f"secret: {SECRET}", f"secret: [{SECRET}, the-secret-of-tomorrow]")
    (tmp_path / "c.yaml").write_text(text)
    secrets = load(tmp_path / "c.yaml", {}).settings.secret
    assert [secret.get_secret_value() for secret in secrets] == [SECRET, "the-secret-of-tomorrow"]

    async def test() -> None:
        more = f"  header: X-Other-Key\n  secret: [{SECRET}, the-secret-of-tomorrow]"
        async with receiving(tmp_path, http_log=more) as receiver:
            for secret in (SECRET, "the-secret-of-tomorrow"):
                assert (await receiver.post(batch(secret), x_other_key=secret)).status_code == 200
            assert (await receiver.post(batch("x"), x_other_key="the-secret-of-yesterday")).status_code == 401

    run(test())


def test_what_is_no_json_is_400_and_says_so(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for body in (b"", b"nonsense", b"17", b'"text"', b"[", b'[{"a":1}', b'{"a":1', b"[]]"):
                answer = await receiver.post(body)
                assert answer.status_code == 400, body
                assert answer.json()["message"].startswith("the body is not what http-log posts: ")
            assert receiver.records() == []

    run(test())


def test_another_content_type_and_a_compressed_body_are_415(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            assert (await receiver.post(batch("x"), content_type="text/plain")).status_code == 415
            assert (await receiver.post(batch("x"), content_encoding="gzip")).status_code == 415

    run(test())


def test_a_bad_entry_is_counted_and_the_good_ones_beside_it_are_taken(tmp_path: Path) -> None:
    too_deep = b'{"a":' * 2000 + b"1" + b"}" * 2000
    bad = [b"null", b"17", b"[]", b'"text"', b"nonsense", b'{"a":oops}', too_deep]

    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for entry in bad:
                answer = await receiver.post(b"[" + b",".join([log_of("a"), entry, log_of("b")]) + b"]")
                assert (answer.status_code, answer.json()) == (200, {"requests": 3, "bad_records": 1}), entry
            assert receiver.ids() == ["a", "b"] * len(bad)
            assert [r.body for r in receiver.records() if r.kind == b"S"] == [b"bad_record"] * len(bad)

    run(test())


def test_bytes_of_a_header_that_are_no_utf_8_cost_no_event(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            body = batch("a", "b", "c").replace(b"curl/7.88.1", b"caf\xe9 \xff},{", 2)
            assert b"\xff},{" in body
            assert (await receiver.post(body)).status_code == 200
            assert receiver.ids() == ["a", "b", "c"]

    run(test())


def test_a_log_without_a_request_id_has_the_same_one_when_its_batch_comes_again(tmp_path: Path) -> None:
    async def test() -> None:
        log = recorded_logs()[0]
        del log["request"]["id"]
        async with receiving(tmp_path) as receiver:
            for _ in range(2):
                assert (await receiver.post(json.dumps([log, log]).encode())).status_code == 200
            first, second, *again = receiver.ids()
            assert again == [first, second]
            assert first != second

    run(test())


def test_the_application_is_taken_where_the_plugin_would_have_asked_for_it(tmp_path: Path) -> None:
    async def test() -> None:
        always = "application_context: always"
        async with receiving(tmp_path, plugin=always) as receiver:
            log = recorded_logs()[0] | {"application_context": {"application_id": "an-app"}}
            assert (await receiver.post(json.dumps(log).encode())).status_code == 200
            (event,) = orjson.loads(b"[" + receiver.records()[0].events + b"]")
            assert (event["subject"], event["data"]["application_id"]) == (ALICE, "an-app")

    run(test())


def test_a_named_part_of_the_path_is_taken_from_the_log(tmp_path: Path) -> None:
    async def test() -> None:
        attribute = "{source: path_capture, look_up_value_in: tenant, event_property_name: tenant}"
        async with receiving(tmp_path, plugin=f"attributes: [{attribute}]") as receiver:
            log = recorded_logs()[0] | {"uri_captures": {"named": {"tenant": "t-1"}}}
            assert (await receiver.post(json.dumps(log).encode())).status_code == 200
            (event,) = orjson.loads(b"[" + receiver.records()[0].events + b"]")
            assert event["data"]["tenant"] == "t-1"

    run(test())


def test_a_body_over_the_limit_is_413_whether_its_length_is_told_or_not(tmp_path: Path) -> None:
    async def test() -> None:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(9):
                yield b" " * 16 * 1024

        async with receiving(tmp_path, http_log="  max_body: 64KiB") as receiver:
            for body in (b" " * 150_000, pieces()):
                answer = await receiver.post(body)
                assert answer.status_code == 413
                assert "64.0KiB" in answer.json()["message"]
            assert (await receiver.post(batch("fits"))).status_code == 200

    run(test())


def test_a_head_that_does_not_end_closes_the_connection(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  read_timeout: 0.2") as receiver:
            for head in (b"", b"POST / HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nx: " + b"y" * 100_000):
                assert (await bytes_answered(receiver.port, head))[:12] in (b"", b"HTTP/1.1 400")

    run(test())


def test_a_body_that_does_not_end_is_408_and_nothing_of_it_is_taken(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  read_timeout: 0.2") as receiver:
            head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\nx-metering-key: {SECRET}\r\n"
            request = head.encode() + b"Content-Type: application/json\r\n\r\n" + batch("a", "b")
            assert (await bytes_answered(receiver.port, request)).startswith(b"HTTP/1.1 408")
            assert receiver.records() == []

    run(test())


def test_whoever_only_holds_connections_open_keeps_nobody_out(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  max_connections: 4") as receiver:
            held = [await asyncio.open_connection("127.0.0.1", receiver.port) for _ in range(20)]
            assert (await receiver.post(batch("x"))).status_code == 200
            for _, writer in held:
                writer.close()

    run(test())


def test_a_disk_that_hangs_is_503_in_time_and_nothing_piles_up_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  write_timeout: 0.2") as receiver:
            assert (await receiver.post(batch("before"))).status_code == 200
            disk = Disk(receiver.spool)
            monkeypatch.setattr(os, "write", disk.write)
            disk.open_gate.clear()
            for number in range(3):
                answer = await receiver.post(batch(f"during {number}"))
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
            disk.open_gate.set()
            assert (await receiver.post(batch("after"))).status_code == 200
            assert receiver.ids() == ["before", "during 0", "after"]

    run(test())


def test_a_full_disk_is_503_until_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with receiving(tmp_path, http_log="  write_timeout: 0.3") as receiver:
            disk = Disk(receiver.spool)
            disk.room = 0
            monkeypatch.setattr(os, "write", disk.write)
            for _ in range(3):
                assert (await receiver.post(batch("a"))).status_code == 503
            assert receiver.ids() == []
            disk.room = None
            async with asyncio.timeout(10):
                while (await receiver.post(batch("a"))).status_code != 200:
                    pass
            assert set(receiver.ids()) == {"a"}

    run(test())


# The whole of it: processes, delivery, the metering API


@pytest.fixture
def sandbox() -> Iterator[str]:
    with running_sandbox(token=TOKEN) as url:
        yield url


@contextmanager
def serving(
    directory: Path, sandbox: str, *arguments: str, port: int = 0
) -> Iterator[tuple[PluginServer, int]]:
    """Run a plugin server with both ways in; yields it and the port of the second."""
    file = directory / "openmeter-plugin.yaml"
    file.write_text(configuration(f"{sandbox}/api/v1/events"))
    file.chmod(0o600)
    ways = ("--http-log", f"127.0.0.1:{port}", "--http-log-config", str(file))
    with plugin_server(directory, *ways, *arguments) as server:
        yield server, eventually(lambda: port_of(server), what="listening")


def port_of(server: PluginServer) -> int:
    """Return the port that it listens on, 0 as long as it has not said."""
    for entry in map(json.loads, server.log_text().splitlines()):
        if entry["event"] == "listening" and entry["pid"] == server.process.pid:
            return int(entry["on"][-1].rpartition(":")[2])
    return 0


def over_the_wire(port: int, request: bytes) -> bytes:
    """Send a request as recorded and return the head of the answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def get(url: str) -> Any:
    """Return what the sandbox answers; without the seconds that loading certificates takes."""
    return httpx.get(url, headers={"authorization": f"Bearer {TOKEN}"}, verify=False).json()


def stats(sandbox: str) -> dict[str, Any]:
    answer: dict[str, Any] = get(f"{sandbox}/sandbox/v1/stats")
    return answer


def arrived(sandbox: str, count: int) -> list[dict[str, Any]]:
    """Return the events in the metering API once there are so many."""
    eventually(lambda: stats(sandbox)["events_stored"] >= count, what=f"the arrival of {count} events")
    return [item["event"] for item in get(f"{sandbox}/api/v1/events?limit=100")]


def counted(spool: Path) -> dict[tuple[str, str], int]:
    """Return delivery's books, all queues together."""
    totals: dict[tuple[str, str], int] = {}
    for counts in read_counts(spool).values():
        for key, value in counts.items():
            totals[key] = totals.get(key, 0) + value
    return totals


def spool_bytes(server: PluginServer) -> bytes:
    """Return everything in the spool but the token files, which are there to hold the token."""
    files = [p for p in server.spool.rglob("*") if p.is_file() and "tokens" not in p.parts]
    return b"".join(path.read_bytes() for path in files)


def test_the_recorded_posts_become_their_events_and_posted_twice_are_billed_once(
    tmp_path: Path, sandbox: str
) -> None:
    with serving(tmp_path, sandbox) as (server, port):
        for post in recorded_posts() * 2:
            assert over_the_wire(port, post).startswith(b"HTTP/1.1 200 ")
        events = {event["id"]: event for event in arrived(sandbox, 6)}
        eventually(lambda: counted(server.spool).get(("requests", "")) == 8, what="the books")
        books = counted(server.spool)
        assert (books["metered", ""], books["resent", ""]) == (4, 4)
    assert stats(sandbox)["events_stored"] == 6
    assert {event_id: (e["type"], e["subject"], e["time"]) for event_id, e in events.items()} == {
        "e3ef4c32e12b3966396bfb56ba6e4d66": ("kong.api_request", ALICE, "2026-11-22T07:01:05Z"),
        "1f03c104d475e9409ae71c28499ce322": ("kong.api_request", APPLICATION, "2026-11-22T07:01:05Z"),
        "45d3be67f50bfc1355d8e663d6367541": ("kong.api_request", BOB, "2026-11-22T07:01:05Z"),
        "45d3be67f50bfc1355d8e663d6367541:proxy:input": (*("kong.llm_request", BOB, "2026-11-22T07:01:05Z"),),
        "45d3be67f50bfc1355d8e663d6367541:proxy:output": (
            *("kong.llm_request", BOB, "2026-11-22T07:01:05Z"),
        ),
        "0c28a515eb4dce198f46f33e45fdc50b": ("kong.api_request", ALICE, "2026-11-22T07:01:07Z"),
    }
    tokens = {e["data"]["type"]: e["data"]["tokens"] for e in events.values() if "tokens" in e["data"]}
    assert tokens == {"input": 12, "output": 30}
    assert events["1f03c104d475e9409ae71c28499ce322"]["data"] == {
        "request_method": "GET",
        "status": 200,
        "response_source": "upstream",
        "request_bytes": 82,
        "response_bytes": 364,
        "latency_ms": 1,
        "upstream_latency_ms": 0,
        "route_name": "app",
        "route_id": "cdb182a0-642c-5cdd-bb23-f6f02010ac40",
        "service_name": "echo",
        "service_id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
        "application_id": "b15e2460-ba40-431d-9df0-4957fcffacda",
        "workspace": "default",
    }


def test_both_ways_in_make_the_same_event_of_the_same_request(tmp_path: Path, sandbox: str) -> None:
    request = serialized("authenticated")
    plugin = PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "api_token": TOKEN,
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": "the-other-way",
        }
    )

    async def over_the_socket(server: PluginServer) -> None:
        worker = KongWorker(server.socket)
        assert await worker.log(plugin, request)
        await worker.close()

    with serving(tmp_path, sandbox) as (server, port):
        asyncio.run(over_the_socket(server))
        (first,) = arrived(sandbox, 1)
        assert post(port, request.log) == 200
        eventually(lambda: stats(sandbox)["duplicates_received"] == 1, what="the same event again")
    with serving(tmp_path, sandbox) as (_, port):
        assert post(port, request.log.replace(first["id"].encode(), b"again")) == 200
        (second,) = [event for event in arrived(sandbox, 2) if event["id"] == "again"]
        assert second == first | {"id": "again"}


def post(port: int, body: bytes, *, seconds: float = 10.0) -> int:
    """Post a body and return the status, 0 where there was no answer."""
    try:
        url = f"http://127.0.0.1:{port}/"
        return httpx.post(url, content=body, headers=HEADERS, timeout=seconds, verify=False).status_code
    except httpx.ConnectError:
        raise
    except httpx.HTTPError:
        return 0


def test_no_secret_reaches_the_events_the_spool_or_the_log(tmp_path: Path, sandbox: str) -> None:
    with serving(tmp_path, sandbox) as (server, port):
        for request in recorded_posts():
            assert over_the_wire(port, request).startswith(b"HTTP/1.1 200 ")
        for wrong in (b"nonsense alice-key", b'[{"a":alice-key}]', b'["alice-key"'):
            post(port, wrong)
        over_the_wire(port, recorded_posts()[0].replace(b"\r\nx-metering-key: ", b"\r\nx-metering-key: x"))
        over_the_wire(port, f"{SECRET} alice-key\r\n\r\n".encode())
        everything = spool_bytes(server) + json.dumps(arrived(sandbox, 6)).encode()
        server.stop()
        everything += spool_bytes(server) + server.log_text().encode()
    assert ALICE.encode() in everything
    for secret in (*SECRETS, TOKEN):
        assert secret.encode() not in everything, secret


def test_what_had_its_200_arrives_though_the_worker_is_killed_again_and_again(
    tmp_path: Path, sandbox: str
) -> None:
    batches = [[f"{number}-{n}" for n in range(40)] for number in range(100)]
    refused: list[Exception] = []
    done: list[int] = []

    def kong() -> None:
        """Post as Kong's queue does: each batch until it is taken."""
        for number, ids in enumerate(batches):
            try:
                while post(port, batch(*ids)) != 200:
                    pass
            except httpx.ConnectError as error:
                refused.append(error)
                return
            done.append(number)

    with serving(tmp_path, sandbox) as (server, port):
        sender = threading.Thread(target=kong)
        sender.start()
        for kill in range(4):
            eventually(lambda at=10 + kill * 20: len(done) >= at, what="the posts")  # type: ignore[misc]
            os.kill(eventually(lambda: server.child("worker") or 0), signal.SIGKILL)
        sender.join(60)
        assert not refused
        eventually(lambda: stats(sandbox)["events_stored"] >= 4000, what="the arrival")
        assert stats(sandbox)["events_stored"] == 4000


def test_a_post_that_the_worker_dies_in_has_no_answer_and_comes_again(tmp_path: Path, sandbox: str) -> None:
    request = recorded_posts()[0]
    with serving(tmp_path, sandbox) as (server, port):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(recorded_posts()[1])  # which the worker has then
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            connection.sendall(request[:-500])
            time_of_death = len(server.log_text())
            os.kill(eventually(lambda: server.child("worker") or 0), signal.SIGKILL)
            eventually(lambda: "process_ended" in server.log_text()[time_of_death:], what="the end")
            with suppress(ConnectionError):
                connection.sendall(request[-500:])
                assert connection.recv(1) == b""
        assert over_the_wire(port, request).startswith(b"HTTP/1.1 200 ")
        assert len(arrived(sandbox, 6)) == 6


def test_requests_over_the_socket_are_answered_while_a_huge_post_is_received(
    tmp_path: Path, sandbox: str
) -> None:
    body = batch(*(f"huge {n}" for n in range(6000)))
    plugin = PluginInstance({"ingest_endpoint": ENDPOINT, "__plugin_id": "beside"})
    waits: list[float] = []

    async def requests(server: PluginServer, huge: threading.Thread) -> None:
        worker = KongWorker(server.socket)
        template = serialized("authenticated").log
        assert await worker.log(plugin, Recorded("first", template))
        huge.start()
        while huge.is_alive():
            start = time.perf_counter()
            assert await worker.log(plugin, Recorded("beside", template))
            waits.append(time.perf_counter() - start)
        await worker.close()

    with serving(tmp_path, sandbox) as (server, port):
        statuses: list[int] = []
        huge = threading.Thread(target=lambda: statuses.append(post(port, body, seconds=30)))
        asyncio.run(requests(server, huge))
        assert statuses == [200]
    print(f"{len(waits)} requests beside the post, the longest took {max(waits) * 1000:.1f} ms")
    assert len(waits) >= 8  # two or three, if they had to wait for it


HUGE: dict[str, Callable[[], bytes]] = {
    "many logs": lambda: batch(*(f"huge {n}" for n in range(6000))),
    "a plain text": lambda: huge_log("x" * 14_000_000),
    "JSON in a text": lambda: huge_log('{"role": "user"}, ' * 600_000),
    "small values": lambda: huge_log([{"n": n} for n in range(1_000_000)]),
}


def huge_log(payload: object) -> bytes:
    """Return a post of one log with an enormous field."""
    return orjson.dumps([orjson.loads(log_of("huge")) | {"payload": payload}])


@pytest.mark.parametrize("kind", HUGE)
def test_no_turn_of_the_event_loop_computes_for_20_ms_while_14_mb_are_received(
    tmp_path: Path, kind: str
) -> None:
    """Measured in CPU time of the loop's own thread, so that a busy machine does not decide."""
    request = HUGE[kind]()
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(request)}\r\nx-metering-key: {SECRET}\r\n"
    answers: list[bytes] = []

    def client(port: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + request)
            answers.append(connection.recv(4096))

    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            sending = threading.Thread(target=client, args=(receiver.port,))
            sending.start()
            longest = 0.0
            while sending.is_alive():
                began = time.thread_time()
                await asyncio.sleep(0)
                longest = max(longest, time.thread_time() - began)
            assert answers[0].startswith(b"HTTP/1.1 200 ")
            assert longest < 0.020
            assert len(receiver.ids()) == (6000 if kind == "many logs" else 1)

    gc.freeze()  # as prepare_process does: what the tests have imported is not what is measured
    try:
        run(test())
    finally:
        gc.unfreeze()


def test_others_have_their_turn_when_a_slice_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[object] = []
    add = Post.add

    def counted(post: Post, spooled: Spooled, *, bad: bool) -> None:
        taken.append(spooled)
        add(post, spooled, bad=bad)

    monkeypatch.setattr(Post, "add", counted)
    monkeypatch.setattr(http_log, "_SLICE", 0.0)  # over after each log

    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            posting = asyncio.create_task(receiver.post(batch(*map(str, range(200)))))
            between: set[int] = set()  # how many logs were taken at the turns that others had
            while not posting.done():
                between.add(len(taken))
                await asyncio.sleep(0)
            assert (await posting).status_code == 200
            assert between >= set(range(1, 200))

    run(test())


def test_a_huge_post_goes_to_the_disk_in_pieces_each_after_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[tuple[int, int]] = []
    under_way: list[int] = []
    append_all = SpoolWriter.append_all

    def watched(writer: SpoolWriter, given: Sequence[Item]) -> None:
        pieces.append((len(given), sum(len(item[1] or b"") for item in given)))
        under_way.append(len(pieces) - 1 - len(committed))
        append_all(writer, given)

    committed: list[object] = []
    answer = _Piece.answer

    def answered(piece: _Piece) -> None:
        committed.append(piece)
        answer(piece)

    monkeypatch.setattr(SpoolWriter, "append_all", watched)
    monkeypatch.setattr(_Piece, "answer", answered)

    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            assert (await receiver.post(batch(*(f"n {n}" for n in range(4000))))).status_code == 200
            assert receiver.ids() == [f"n {n}" for n in range(4000)]
            of_nobody = await receiver.post(b"[" + b",".join([b"{}"] * 4000) + b"]")
            assert of_nobody.json() == {"requests": 4000, "bad_records": 0}

    run(test())
    assert sum(count for count, _ in pieces) == 8000
    assert max(count for count, _ in pieces) <= 1000
    assert max(size for _, size in pieces) <= 600_000
    assert max(under_way) == 0


def test_the_room_that_posts_take_in_memory_is_bounded_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_log_spooling, "_MOST_BYTES_HELD", 20_000)  # some 20 records

    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            for number in range(20):
                assert (await receiver.post(batch(*(f"{number}-{n}" for n in range(10))))).status_code == 200
                answer = await receiver.post(batch(*(f"too many {n}" for n in range(100))))
                assert (answer.status_code, "retry-after" in answer.headers) == (503, True)
            assert len(receiver.ids()) == 200

    run(test())


def test_a_log_that_is_larger_than_is_parsed_in_one_go_is_metered_all_the_same(tmp_path: Path) -> None:
    async def test() -> None:
        async with receiving(tmp_path) as receiver:
            huge = huge_log("x" * 1_000_000)[1:-1]
            body = b"[" + b",".join([log_of("before"), huge, log_of("after")]) + b"]"
            answer = await receiver.post(body)
            assert (answer.status_code, answer.json()) == (200, {"requests": 3, "bad_records": 0})
            assert receiver.ids() == ["before", "huge", "after"]

    run(test())


def test_two_workers_take_posts_at_one_address(tmp_path: Path, sandbox: str) -> None:
    with serving(tmp_path, sandbox, "--workers", "2") as (server, port):
        for number in range(40):
            assert post(port, batch(f"{number}")) == 200
        eventually(lambda: stats(sandbox)["events_stored"] == 40, what="the arrival")
        assert server.stop() == 0


def test_the_next_generation_takes_over_at_the_same_port(tmp_path: Path, sandbox: str) -> None:
    (tmp_path / "new").mkdir()
    with serving(tmp_path, sandbox) as (old, port):
        assert post(port, batch("old")) == 200
        with serving(tmp_path / "new", sandbox, port=port) as (new, same):
            assert same == port
            eventually(lambda: '"serving"' in new.log_text(), what="serving")
            old.stop()
            for number in range(20):
                assert post(port, batch(f"new {number}")) == 200
            eventually(lambda: stats(sandbox)["events_stored"] == 21, what="the arrival")


def test_it_serves_alone_behind_a_unix_socket_which_goes_with_it(tmp_path: Path, sandbox: str) -> None:
    (tmp_path / "openmeter-plugin.yaml").write_text(configuration(f"{sandbox}/api/v1/events"))
    way_in, spool = tmp_path / "h", tmp_path / "spool"
    command = [sys.executable, "-m", "openmeter_plugin", "serve", "--http-log", f"unix:{way_in}"]
    process = subprocess.Popen([*command, "--spool", str(spool)], cwd=tmp_path)
    try:
        eventually(way_in.exists, what="listening")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(way_in))
            connection.sendall(recorded_posts()[1])
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert len(arrived(sandbox, 1)) == 1
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not way_in.exists()


def test_a_server_without_it_imports_no_web_server() -> None:
    code = """
import sys
import openmeter_plugin.cli, openmeter_plugin.worker
print(sorted({"uvicorn", "starlette", "fastapi", "yaml"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


# Starting


def serve(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", "serve", "--spool", "spool", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=directory,
        env=os.environ | environment,
    )


def test_without_any_way_in_the_error_names_both(tmp_path: Path) -> None:
    result = serve(directory=tmp_path)
    assert result.returncode == os.EX_USAGE
    assert "--socket" in result.stderr
    assert "--http-log" in result.stderr


@pytest.mark.parametrize("address", ["8095", ":8095", "127.0.0.1:", "127.0.0.1:x", "::1:8095", "unix:"])
def test_an_address_that_is_none_is_told_apart(address: str) -> None:
    with pytest.raises(ValueError, match="is neither host:port"):
        listen_for_http_log(address, 0o660)


def test_an_address_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    result = serve("--http-log", "8095", directory=tmp_path)
    assert result.returncode == os.EX_USAGE
    assert "--http-log: 8095 is neither" in result.stderr


def test_a_bad_file_ends_the_start_with_the_name_of_the_field(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(configuration().replace("http://", "ftp://"))
    result = serve(
        *("--http-log", "127.0.0.1:0", "--http-log-config", "c.yaml", "--socket", "s"), directory=tmp_path
    )
    assert result.returncode == 1
    assert "c.yaml: ingest_endpoint: " in result.stderr
    assert not (tmp_path / "s").exists()


def test_an_address_that_others_reach_needs_a_secret(tmp_path: Path) -> None:
    text = configuration().replace(f"  secret: {SECRET}", "  header: x-key")
    (tmp_path / "openmeter-plugin.yaml").write_text(text)
    result = serve("--http-log", "0.0.0.0:0", directory=tmp_path)
    assert result.returncode == 1
    assert "http_log.secret: is required" in result.stderr


WRONG: list[tuple[str, str]] = [
    ("subjet: there is no such setting", configuration(plugin="subjet: x")),
    ("subject.feild: there is no such setting", configuration(plugin="subject: {feild: id}")),
    ("attributes.0.x: there is no such setting", configuration(plugin="attributes: [{x: 1}]")),
    ("subject.look_up_value_in: ", configuration(plugin="subject: {look_up_value_in: cookie}")),
    ("ingest_endpoint: ", configuration().replace("ingest_endpoint", "# ingest_endpoint")),
    ("api_token: a vault reference", configuration().replace(TOKEN, '"{vault://env/token}"')),
    ("http_log.secret: ", configuration().replace(SECRET, "short")),
    ("http_log.secret: ", configuration().replace(SECRET, '"{vault://env/metering-key}"')),
    ("http_log.secret: ", configuration().replace(SECRET, '"sixteen letters and spaces"')),
    ("http_log.header: ", configuration(http_log="  header: Content-Type")),
    ("http_log.max_body: ", configuration(http_log="  max_body: 1GiB")),
    ("http_log.max_boddy: ", configuration(http_log="  max_boddy: 1MiB")),
    ("http_log: must be a mapping", configuration().replace("http_log:", "http_log: []\nqueue:")),
    ("must be a mapping", "[]"),
    ("must be a mapping", ""),
    ("is not YAML, line 2", "a: 1\n\tb: token-of-this-test"),
]


@pytest.mark.parametrize(("problem", "text"), WRONG, ids=[f"{n} {p}" for n, (p, _) in enumerate(WRONG)])
def test_what_is_wrong_in_the_file_is_named_and_no_secret_shown(
    tmp_path: Path, problem: str, text: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml", {})
    assert str(caught.value).startswith(f"{tmp_path}/c.yaml: ")
    assert problem in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_the_files_of_the_documentation_are_right(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "http-log.md").read_text()
    settings, kong = (block.partition("```")[0] for block in text.split("```yaml\n")[1:])
    (tmp_path / "c.yaml").write_text(settings)
    secrets = load(tmp_path / "c.yaml", {}).settings
    (plugin,) = yaml.safe_load(kong)["plugins"]
    assert secrets.header in plugin["config"]["headers"]
    assert secrets.write_timeout < plugin["config"]["timeout"] / 1000
    assert set(plugin["config"]["custom_fields_by_lua"]) == set(MEMBERS.values())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read: No such file"):
        load(tmp_path / "c.yaml", {})


def test_the_environment_overrides_the_secrets_and_an_empty_one_is_no_way_around(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(configuration())
    environment = {
        TOKEN_VARIABLE: "from-outside\n",
        SECRET_VARIABLE: "first-secret-of-two second-secret-of-two",
    }
    config = load(file, environment)
    assert orjson.loads(config.plugin)["api_token"] == "from-outside"
    secrets = [secret.get_secret_value() for secret in config.settings.secret]
    assert secrets == ["first-secret-of-two", "second-secret-of-two"]
    assert TOKEN not in repr(config)
    assert secrets[0] not in repr(config)
    with pytest.raises(ConfigError, match=r"http_log\.secret: "):
        load(file, {SECRET_VARIABLE: " "})
    assert orjson.loads(load(file, {TOKEN_VARIABLE: ""}).plugin)["api_token"] == TOKEN
