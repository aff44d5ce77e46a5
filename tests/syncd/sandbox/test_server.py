"""The server around the API: start, stop, token, persistence, and how it identifies itself."""

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.syncd.sandbox.support import create_customer, event, ok, refused, send, stored_ids

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@contextmanager
def sandbox_process(db: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "syncd.sandbox", "--port", "0", "--db", str(db), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline()
        finally:
            process.kill()


def test_the_command_says_where_it_listens_and_that_it_is_for_development(tmp_path: Path) -> None:
    with sandbox_process(tmp_path / "db", "--no-subjects", "--token", "t") as (_, line):
        match = re.fullmatch(r"sandbox: (http://127\.0\.0\.1:\d+) \(development only\)\n", line)
        assert match, line
        authorized = {"authorization": "Bearer t"}
        ok(httpx.get(f"{match[1]}/api/v1/meters", headers=authorized))
        refused(httpx.get(f"{match[1]}/api/v1/subjects", headers=authorized), 404)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_quietly_and_with_success(tmp_path: Path, number: signal.Signals) -> None:
    with sandbox_process(tmp_path / "db") as (process, _):
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_sender_killed_mid_batch_is_not_an_error(tmp_path: Path) -> None:
    with sandbox_process(tmp_path / "db") as (process, line):
        url = httpx.URL(line.split()[1])
        with socket.create_connection((url.host, url.port)) as sender:
            sender.sendall(b"POST /api/v1/events HTTP/1.1\r\nHost: any\r\nContent-Length: 1000\r\n\r\n[")
        with httpx.Client(base_url=url) as api:
            assert stored_ids(api) == set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_acknowledged_data_survive_a_kill(tmp_path: Path) -> None:
    with sandbox_process(tmp_path / "db") as (process, line):
        with httpx.Client(base_url=line.split()[1]) as api:
            assert send(api, event("a")).status_code == 204
            customer = create_customer(api)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    with running_sandbox(tmp_path / "db") as url, httpx.Client(base_url=url) as api:
        assert stored_ids(api) == {"a"}
        assert ok(api.get(f"/api/v1/customers/{customer['id']}")) == customer
        assert len(ok(api.get("/api/v1/meters"))) == 3


def test_a_restart_on_the_same_port_looks_like_the_same_server(tmp_path: Path) -> None:
    db = tmp_path / "db"
    with running_sandbox(db) as url, httpx.Client(base_url=url) as api:
        send(api, event("a"))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
    port = httpx.URL(url).port
    assert port
    with running_sandbox(db, port=port) as again, httpx.Client(base_url=url) as api:
        assert again == url
        assert stored_ids(api) == {"a"}


def test_a_port_in_use_is_an_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="in use"),
        running_sandbox(port=taken.getsockname()[1]),
    ):
        pass


def test_a_file_that_is_not_a_sandbox_is_left_alone(tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("not a database, but something worth keeping" * 100)
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE precious (x)")
    connection.close()
    for db in (text, other):
        before = db.read_bytes()
        with pytest.raises(sqlite3.DatabaseError), running_sandbox(db):
            pass
        assert db.read_bytes() == before


def test_every_answer_says_that_it_comes_from_the_sandbox(api: httpx.Client) -> None:
    for path in ("/healthz", "/api/v1/nothing"):
        assert api.get(path).headers["x-kong-openmeter"] == "sandbox"
    assert "not OpenMeter" in ok(api.get("/openapi.json"))["info"]["title"]


def test_an_unknown_path_or_method_is_a_problem_too(api: httpx.Client) -> None:
    refused(api.get("/api/v1/nothing"), 404)
    refused(api.patch("/api/v1/events"), 405)


def test_every_request_except_the_health_check_needs_the_token() -> None:
    with running_sandbox(token="s3cret") as url, httpx.Client(base_url=url) as api:
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            for path in ("/api/v1/meters", "/sandbox/v1/stats", "/openapi.json", "/nothing"):
                refused(api.get(path, headers=wrong), 401)
        assert ok(api.get("/healthz")) == {"status": "ok"}
        ok(api.get("/api/v1/meters", headers={"authorization": "Bearer s3cret"}))


def test_the_statistics_count_received_and_unattributed_events(api: httpx.Client) -> None:
    create_customer(api, key="alice")
    send(
        api,
        event("a", subject="alice"),
        event("b", subject="x"),
        event("c", subject="x"),
        event("d", subject="y"),
    )
    ok(api.get("/api/v1/customers/alice"))
    stats = ok(api.get("/sandbox/v1/stats"))
    assert stats["unattributed"] == {"events": 3, "subjects": ["x", "y"]}
    assert stats["customers"] == 1
    assert stats["requests_by_endpoint"]["POST /api/v1/events"] == 1
    assert stats["requests_by_endpoint"]["GET /api/v1/customers/{id_or_key}"] == 1


def test_a_reset_leaves_only_the_standard_meters(api: httpx.Client) -> None:
    create_customer(api, key="alice")
    send(api, event("a"))
    api.delete("/api/v1/meters/kong_api_requests")
    api.post("/sandbox/v1/faults", json={"path": "/api/v1/meters"})
    assert api.post("/sandbox/v1/reset").status_code == 204
    assert len(ok(api.get("/api/v1/meters"))) == 3
    assert stored_ids(api) == set()
    create_customer(api, key="alice")
