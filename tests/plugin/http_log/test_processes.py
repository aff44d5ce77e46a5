"""`openmeter-plugin serve --http-log` as real processes, up to the metering API."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.harness.books import total_counts
from tests.harness.kong import KongWorker, PluginInstance
from tests.harness.process import PluginServer, children_of, eventually, plugin_server
from tests.harness.recordings import SECRETS, Recorded, serialized
from tests.plugin.http_log_posts import (
    ALICE,
    ENDPOINT,
    SECRET,
    TOKEN,
    batch,
    configuration,
    post,
    recorded_posts,
)

pytestmark = pytest.mark.slow

BOB = "consumer:def4f7d3-9863-5ad2-8fa9-c949bf26f55e"
APPLICATION = "app:b15e2460-ba40-431d-9df0-4957fcffacda"


@pytest.fixture
def sandbox() -> Iterator[str]:
    with running_sandbox(token=TOKEN) as url:
        yield url


@contextmanager
def serving(
    directory: Path, sandbox: str, *arguments: str, port: int = 0
) -> Iterator[tuple[PluginServer, int]]:
    """Run a plugin server with both inputs; yields it and the port of http-log."""
    file = directory / "openmeter-plugin.yaml"
    file.write_text(configuration(f"{sandbox}/api/v1/events"))
    file.chmod(0o600)
    inputs = ("--http-log", f"127.0.0.1:{port}", "--http-log-config", str(file))
    with plugin_server(directory, *inputs, *arguments) as server:
        yield server, eventually(lambda: port_of(server), what="listening")


def port_of(server: PluginServer) -> int:
    """Return the port that it listens on, 0 until it is in the log."""
    for entry in map(json.loads, server.log_text().splitlines()):
        if entry["event"] == "listening" and entry["pid"] == server.process.pid:
            return int(entry["on"][1].rpartition(":")[2])
    return 0


def over_the_wire(port: int, request: bytes) -> bytes:
    """Send a request as recorded and return the head of the answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def get(url: str) -> Any:
    """Return the sandbox's answer; without loading certificates, which takes seconds."""
    return httpx.get(url, headers={"authorization": f"Bearer {TOKEN}"}, verify=False).json()


def stats(sandbox: str) -> dict[str, Any]:
    answer: dict[str, Any] = get(f"{sandbox}/sandbox/v1/stats")
    return answer


def arrived(sandbox: str, count: int) -> list[dict[str, Any]]:
    """Return the events in the metering API once there are `count`."""
    eventually(lambda: stats(sandbox)["events_stored"] >= count, what=f"the arrival of {count} events")
    return [item["event"] for item in get(f"{sandbox}/api/v1/events?limit=100")]


def spool_bytes(server: PluginServer) -> bytes:
    """Return everything in the spool except the token files, which have to hold the token."""
    files = [p for p in server.spool.rglob("*") if p.is_file() and "tokens" not in p.parts]
    return b"".join(path.read_bytes() for path in files)


def test_the_recorded_posts_become_their_events_and_posted_twice_are_billed_once(
    tmp_path: Path, sandbox: str
) -> None:
    with serving(tmp_path, sandbox) as (server, port):
        for post in recorded_posts() * 2:
            assert over_the_wire(port, post).startswith(b"HTTP/1.1 200 ")
        events = {event["id"]: event for event in arrived(sandbox, 6)}
        eventually(lambda: total_counts(server.spool).get(("requests", "")) == 8, what="the books")
        books = total_counts(server.spool)
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


def test_both_inputs_make_the_same_event_of_the_same_request(tmp_path: Path, sandbox: str) -> None:
    request = serialized("authenticated")
    plugin = PluginInstance(
        {
            "ingest_endpoint": f"{sandbox}/api/v1/events",
            "api_token": TOKEN,
            "queue": {"max_coalescing_delay": 0.05},
            "__plugin_id": "the-other-input",
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


def test_posts_with_a_200_arrive_even_if_the_receiver_is_killed_again_and_again(
    tmp_path: Path, sandbox: str
) -> None:
    batches = [[f"{number}-{n}" for n in range(40)] for number in range(100)]
    refused: list[Exception] = []
    done: list[int] = []

    def kong() -> None:
        """Post as Kong's queue does: each batch until it is accepted."""
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
            os.kill(eventually(lambda: server.child("http-log") or 0), signal.SIGKILL)
        sender.join(60)
        assert not refused
        eventually(lambda: stats(sandbox)["events_stored"] >= 4000, what="the arrival")
        assert stats(sandbox)["events_stored"] == 4000


def test_a_post_during_which_the_receiver_dies_has_no_answer_and_is_posted_again(
    tmp_path: Path, sandbox: str
) -> None:
    request = recorded_posts()[0]
    with serving(tmp_path, sandbox) as (server, port):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(recorded_posts()[1])  # now the receiver has this connection
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            connection.sendall(request[:-500])
            log_size = len(server.log_text())
            os.kill(eventually(lambda: server.child("http-log") or 0), signal.SIGKILL)
            eventually(lambda: "process_ended" in server.log_text()[log_size:], what="the end")
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
    print(f"{len(waits)} requests during the post, the longest took {max(waits) * 1000:.1f} ms")
    assert len(waits) >= 8  # two or three if they had to wait for the post


def test_a_killed_receiver_leaves_the_workers_connections_alone(tmp_path: Path, sandbox: str) -> None:
    plugin = PluginInstance({"ingest_endpoint": ENDPOINT, "__plugin_id": "beside"})
    template = serialized("authenticated").log

    async def requests(server: PluginServer, port: int) -> None:
        worker = KongWorker(server.socket)
        assert await worker.log(plugin, Recorded("before", template))
        log_size = len(server.log_text())
        os.kill(eventually(lambda: server.child("http-log") or 0), signal.SIGKILL)
        for _ in range(20):
            assert await worker.log(plugin, Recorded("during", template))
        eventually(lambda: '"serving"' in server.log_text()[log_size:], what="the next receiver")
        assert post(port, batch("after")) == 200
        assert not worker.tally.lost
        await worker.close()

    with serving(tmp_path, sandbox) as (server, port):
        asyncio.run(requests(server, port))


def test_a_hung_receiver_is_replaced_and_counted_in_the_metrics(tmp_path: Path, sandbox: str) -> None:
    api = tmp_path / "a"
    with serving(tmp_path, sandbox, "--hang-timeout", "5", "--api", f"unix:{api}") as (server, port):
        transport = httpx.HTTPTransport(uds=str(api))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:

            def get(path: str) -> httpx.Response:
                try:
                    return client.get(path)
                except httpx.HTTPError:
                    return httpx.Response(0)

            eventually(lambda: get("/readyz").status_code == 200, what="readiness")
            hung = eventually(lambda: server.child("http-log") or 0)
            os.kill(hung, signal.SIGSTOP)
            label = 'openmeter_plugin_process_restarts_total{child="http-log"} 1.0'
            eventually(lambda: label in get("/metrics").text, what="the replacement")
            eventually(lambda: get("/readyz").status_code == 200, what="readiness again")
        assert "process_hung" in server.log_text()
        assert post(port, batch("after")) == 200


def test_each_input_has_its_process(tmp_path: Path, sandbox: str) -> None:
    with serving(tmp_path, sandbox) as (server, _):
        eventually(lambda: server.child("http-log") and server.child("worker"), what="both")
    (tmp_path / "plugin").mkdir()
    with plugin_server(tmp_path / "plugin", "--workers", "2") as server:
        eventually(lambda: server.log_text().count('"serving"') == 2, what="the workers")
        assert len(server.children()) == 3
        assert server.child("http-log") is None


def test_the_next_server_takes_over_the_same_port(tmp_path: Path, sandbox: str) -> None:
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


def test_http_log_alone_is_served_on_a_unix_socket_which_is_removed_at_the_end(
    tmp_path: Path, sandbox: str
) -> None:
    (tmp_path / "openmeter-plugin.yaml").write_text(configuration(f"{sandbox}/api/v1/events"))
    socket_path, spool = tmp_path / "h", tmp_path / "spool"
    command = [sys.executable, "-m", "openmeter_plugin", "serve", "--http-log", f"unix:{socket_path}"]
    process = subprocess.Popen([*command, "--spool", str(spool)], cwd=tmp_path)
    try:
        eventually(socket_path.exists, what="listening")
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(socket_path))
            connection.sendall(recorded_posts()[1])
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert len(arrived(sandbox, 1)) == 1
        assert len(children_of(process.pid)) == 2  # the receiver and the delivery
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not socket_path.exists()
