"""The HTTP API of the delivery, over real HTTP to real processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from openmeter_plugin.operations.access import TOKEN_VARIABLE
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.plugin.deliveries import record, rejects, skip, spooled
from tests.plugin.events_server import Answer, EventsServer, serving, take_all
from tests.plugin.spools import QUEUE, destination
from tests.plugin.test_spool_cli import run

ADMIN_TOKEN = "token-of-whoever-may-use-the-api"
EVENTS_TOKEN = "token-for-the-metering-api"
OLD, NEW = "2026-11-20T05:49:03.779Z", "2026-11-22T07:00:00.000Z"

METRICS = {
    "openmeter_plugin_build_info": "gauge",
    "openmeter_plugin_books_readable": "gauge",
    "openmeter_plugin_requests": "counter",
    "openmeter_plugin_requests_metered": "counter",
    "openmeter_plugin_requests_skipped": "counter",
    "openmeter_plugin_requests_quarantined": "gauge",
    "openmeter_plugin_requests_resent": "counter",
    "openmeter_plugin_requests_lost": "counter",
    "openmeter_plugin_events_accepted": "counter",
    "openmeter_plugin_events_delivered": "counter",
    "openmeter_plugin_events_redelivered": "counter",
    "openmeter_plugin_ledger_events_pruned": "counter",
    "openmeter_plugin_events_waiting": "gauge",
    "openmeter_plugin_oldest_waiting_event_age_seconds": "gauge",
    "openmeter_plugin_dead_letters": "gauge",
    "openmeter_plugin_damaged_bytes": "counter",
    "openmeter_plugin_segments_unreadable": "counter",
    "openmeter_plugin_spool_bytes": "gauge",
    "openmeter_plugin_disk_free_bytes": "gauge",
    "openmeter_plugin_disk_size_bytes": "gauge",
    "openmeter_plugin_destination_info": "gauge",
    "openmeter_plugin_delivery_retries": "counter",
    "openmeter_plugin_delivery_failures_in_a_row": "gauge",
    "openmeter_plugin_delivery_post_duration_seconds": "histogram",
    "openmeter_plugin_process_restarts": "counter",
}


@dataclass
class Api:
    """A running plugin server with its API."""

    client: httpx.Client
    server: PluginServer
    events: EventsServer
    url: str

    def get(self, path: str, **parameters: str | int) -> Any:
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def metrics(self) -> dict[str, float]:
        """The samples by their names and labels."""
        text = self.client.get("/metrics").text
        found = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in found}


def address_of(server: PluginServer) -> str:
    """Where the API listens, from the log."""
    pattern = r'"on": ?\[[^]]*"(127\.0\.0\.1:\d+)"'
    return f"http://{eventually(lambda: re.findall(pattern, server.log_text()), what='listening')[0]}"


@contextmanager
def api(directory: Path, *arguments: str, history: bool = True) -> Iterator[Api]:
    """Run a server with an API on a spool that has a history: 5 events delivered, 1 refused, 2 skipped."""
    with serving(EventsServer(rejects({"event-000003"}))) as events:
        spool = directory / "spool"
        write_destination(spool, destination(events.url, token=EVENTS_TOKEN))
        if history:
            spooled(spool, [*(record(n, time=OLD) for n in range(4)), skip(), skip("status_excluded")])
            spooled(spool, [record(4, 5, time=NEW, subject="consumer:bob")])
        environment = {TOKEN_VARIABLE: ADMIN_TOKEN}
        with plugin_server(directory, "--api", "127.0.0.1:0", *arguments, environment=environment) as server:
            url = address_of(server)
            headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
            with httpx.Client(base_url=url, headers=headers, timeout=15) as client:
                found = Api(client, server, events, url)
                if history:
                    eventually(lambda: found.get("/v1/spool")["total"]["books"]["dead_lettered"] == 1)
                    eventually(lambda: found.get("/v1/spool")["total"]["depth"] == 0)
                yield found


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One for all tests that change nothing."""
    with api(tmp_path_factory.mktemp("api")) as running:
        yield running


# Off by default, and who may use it


def test_without_the_option_nothing_of_the_api_is_even_loaded(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.operations.running import run
run(DeliveryOptions(Path({str(tmp_path)!r})), None, until_empty=True)
print(sorted({{"fastapi", "starlette", "uvicorn", "prometheus_client", "pydantic"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "token", "says"),
    [
        ("serve", ["--api", "127.0.0.1:0"], None, "over TCP a token is required"),
        ("deliver", ["--api", "127.0.0.1:0"], None, "over TCP a token is required"),
        ("serve", ["--api", "0.0.0.0:0"], None, "over TCP a token is required"),
        ("serve", ["--api", "127.0.0.1:0"], "", f"{TOKEN_VARIABLE} is empty"),
        ("serve", ["--api", "unix:{dir}/api"], "", f"{TOKEN_VARIABLE} is empty"),
        ("serve", ["--api", "127.0.0.1:0"], "short", "must have at least 16"),
        ("serve", ["--api", "8096"], ADMIN_TOKEN, "neither host:port"),
        ("serve", ["--api", "127.0.0.1:0", "--api-token-file", "{dir}/nothing"], None, "No such file"),
    ],
)
def test_what_would_be_open_to_others_is_refused_at_the_start(
    tmp_path: Path, command: str, arguments: list[str], token: str | None, says: str
) -> None:
    (tmp_path / "spool").mkdir()
    words = [word.format(dir=tmp_path) for word in arguments]
    words += ["--socket", str(tmp_path / "s")] if command == "serve" else []
    environment = os.environ | ({} if token is None else {TOKEN_VARIABLE: token})
    result = subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", command, "--spool", str(tmp_path / "spool"), *words],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
    )
    assert result.returncode != 0
    assert result.stderr.startswith("openmeter-plugin: --api: ")
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_unix_socket_needs_no_token_and_is_its_owners_alone(tmp_path: Path) -> None:
    with plugin_server(tmp_path, "--api", f"unix:{tmp_path}/api") as server:
        eventually((tmp_path / "api").exists, what="listening")
        transport = httpx.HTTPTransport(uds=str(tmp_path / "api"))
        with httpx.Client(transport=transport, base_url="http://any.name", timeout=15) as client:
            assert client.get("/v1/spool").json()["total"]["depth"] == 0
        assert (tmp_path / "api").stat().st_mode & 0o777 == 0o600
        server.stop()
        assert not (tmp_path / "api").exists()


def test_everything_but_the_probes_needs_the_token(there: Api) -> None:
    paths = there.get("/openapi.json")["paths"]
    for path, methods in paths.items():
        for method in methods:
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {ADMIN_TOKEN}"}):
                answer = httpx.request(method, there.url + path.replace("{number}", "1"), headers=given)
                if path in {"/healthz", "/readyz"}:
                    assert answer.status_code == 200
                else:
                    assert answer.status_code == 401, (method, path)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert "Authorization: Bearer" in answer.json()["detail"]


def test_the_description_itself_needs_the_token(there: Api) -> None:
    assert httpx.get(f"{there.url}/openapi.json").status_code == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8096", "127.0.0.1.evil.example", "[::2]", ""])
def test_a_page_that_has_its_own_name_for_this_address_gets_nothing(there: Api, host: str) -> None:
    for path in ("/v1/spool", "/healthz"):
        answer = there.client.get(path, headers={"host": host})
        assert answer.status_code in {400, 421}
        assert "depth" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8096", "127.0.0.1", "127.0.0.1:1", "[::1]:8096"])
def test_the_names_of_this_machine_are_taken(there: Api, host: str) -> None:
    assert there.client.get("/healthz", headers={"host": host}).status_code == 200


def test_a_token_file_that_is_replaced_counts_at_once(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "token").write_text("the-first-token-of-all\n")
    arguments = ("--api", "127.0.0.1:0", "--api-token-file", str(tmp_path / "token"))
    with plugin_server(tmp_path, *arguments) as server:
        url = address_of(server)

        def status(token: str) -> int:
            return httpx.get(
                f"{url}/v1/spool", headers={"authorization": f"Bearer {token}"}, timeout=15
            ).status_code

        assert status("the-first-token-of-all") == 200
        (tmp_path / "token").write_text("the-second-token-of-all\n")
        assert (status("the-first-token-of-all"), status("the-second-token-of-all")) == (401, 200)
        (tmp_path / "token").unlink()
        assert status("the-second-token-of-all") == 503


def test_no_answer_holds_a_secret(there: Api) -> None:
    paths = there.get("/openapi.json")["paths"]
    answers = [there.client.get(path.replace("{number}", "1")) for path in paths]
    text = "".join(answer.text + str(answer.headers) for answer in answers)
    assert ADMIN_TOKEN not in text
    assert EVENTS_TOKEN not in text
    assert ADMIN_TOKEN not in there.server.log_text()


# What it tells


def test_the_spool_is_told_as_the_command_prints_it(there: Api) -> None:
    printed = json.loads(run("status", "--json", str(there.server.spool)).stdout)
    assert there.get("/v1/spool") == printed
    assert printed["delivery_running"] is True
    assert printed["total"]["books"]["delivered"] == 5
    assert printed["total"]["books"]["skipped"] == {"status_excluded": 1, "no_consumer": 1}


def ledger_line(hour: str, subject: str, accepted: int, delivered: int, dead: int) -> dict[str, Any]:
    return {
        "destination": QUEUE,
        "hour": hour,
        "type": "kong.api_request",
        "subject": subject,
        "accepted": accepted,
        "delivered": delivered,
        "dead_lettered": dead,
        "waiting": 0,
    }


def test_the_ledger_is_told_by_hour_and_subject(there: Api) -> None:
    assert there.get("/v1/ledger") == {
        "lines": [
            ledger_line("2026-11-20T05", "consumer:alice", 4, 3, 1),
            ledger_line("2026-11-22T07", "consumer:bob", 2, 2, 0),
        ],
        "hours_with_waiting_events": [],
        "pruned_up_to": None,
        "next": None,
    }


@pytest.mark.parametrize(
    ("parameters", "subjects"),
    [
        ({"subject": "consumer:bob"}, ["consumer:bob"]),
        ({"from": "2026-11-20T05:59:59Z", "to": "2026-11-20T06:00:00Z"}, ["consumer:alice"]),
        ({"from": "2026-11-20T06:00:00Z"}, ["consumer:bob"]),
        ({"from": "2026-11-22T08:59:00+01:00", "to": "2026-11-22T08:59:00+01:00"}, ["consumer:bob"]),
        ({"to": "2026-11-22T07:00:00Z"}, ["consumer:alice"]),
        ({"limit": 1}, ["consumer:alice"]),
    ],
)
def test_the_ledger_is_cut_to_whole_hours_of_a_span(
    there: Api, parameters: dict[str, str], subjects: list[str]
) -> None:
    assert [line["subject"] for line in there.get("/v1/ledger", **parameters)["lines"]] == subjects


def test_dead_letters_are_told_page_by_page(there: Api) -> None:
    page = there.get("/v1/dead-letters", limit=1)
    (letter,) = page["dead_letters"]
    assert (letter["event_id"], letter["status"]) == ("event-000003", 400)
    assert page["next"] is None
    assert there.get("/v1/dead-letters", after=letter["id"])["dead_letters"] == []


def test_the_description_names_every_answer(there: Api) -> None:
    description = there.get("/openapi.json")
    assert set(description["paths"]) == {
        "/v1/spool",
        "/v1/ledger",
        "/v1/dead-letters",
        "/v1/dead-letters/replay",
        "/v1/redeliver",
        "/v1/redeliver/{number}",
        "/metrics",
        "/healthz",
        "/readyz",
    }
    assert description["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer"}
    }
    schemas = description["components"]["schemas"]
    assert {"SpoolStatus", "Ledger", "DeadLetters", "RedeliveryStatus", "Readiness", "Problem"} <= set(
        schemas
    )


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("GET", "/v1/nothing", None, 404, "Not Found"),
        ("GET", "/v1/redeliver/4711", None, 404, "there is no redelivery with this id"),
        ("GET", "/v1/ledger?from=2026-11-22T07:00:00", None, 422, "from: needs a time zone"),
        ("GET", "/v1/ledger?from=yesterday", None, 422, "from: "),
        ("GET", "/v1/ledger?after=bogus", None, 422, "after must be"),
        ("GET", "/v1/dead-letters?limit=0", None, 422, "limit: "),
        ("POST", "/v1/redeliver", "{}", 422, "from: Field required"),
        (
            "POST",
            "/v1/redeliver",
            '{"from": "2026-11-22T07:00:00", "to": "2026-11-23T07:00:00Z"}',
            422,
            "from: ",
        ),
        (
            "POST",
            "/v1/redeliver",
            '{"from": "2026-11-23T07:00:00Z", "to": "2026-11-22T07:00:00Z"}',
            422,
            "before",
        ),
        ("POST", "/v1/redeliver", "no json", 422, "JSON"),
        ("POST", "/v1/dead-letters/replay", "{}", 422, "either ids or all"),
        ("POST", "/v1/dead-letters/replay", '{"ids": [1], "all": true}', 422, "either ids or all"),
        ("POST", "/v1/dead-letters/replay", '{"secret": "hunter2"}', 422, "secret: Extra inputs"),
        ("POST", "/v1/dead-letters/replay", " " * (1024 * 1024 + 1), 413, "1048576 bytes"),
        ("DELETE", "/v1/spool", None, 405, "Method Not Allowed"),
    ],
)
def test_every_refusal_says_why_in_a_problem_document(
    there: Api, method: str, path: str, body: str | None, status: int, says: str
) -> None:
    answer = there.client.request(
        method, path, content=body, headers={"content-type": "application/json"} if body else None
    )
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert says in answer.json()["detail"]
    assert "hunter2" not in answer.text


def test_a_body_of_unknown_length_is_not_read(there: Api) -> None:
    answer = there.client.post("/v1/redeliver", content=iter([b"{}"]))
    assert answer.status_code == 411


def test_the_metrics_are_these(there: Api) -> None:
    text = there.client.get("/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    found = {name.removesuffix("_total") if kind == "counter" else name: kind for name, kind in kinds.items()}
    assert found == METRICS
    assert all(f"# HELP {name} " in text for name in kinds)


def test_the_metrics_say_what_the_books_say(there: Api) -> None:
    metrics = there.metrics()
    label = f'{{destination="{QUEUE}"}}'
    assert metrics[f"openmeter_plugin_requests_total{label}"] == 7
    assert metrics[f"openmeter_plugin_requests_metered_total{label}"] == 5
    assert metrics[f"openmeter_plugin_events_accepted_total{label}"] == 6
    assert metrics[f"openmeter_plugin_events_delivered_total{label}"] == 5
    assert metrics[f"openmeter_plugin_dead_letters{label}"] == 1
    assert metrics[f"openmeter_plugin_events_waiting{label}"] == 0
    assert metrics[f"openmeter_plugin_oldest_waiting_event_age_seconds{label}"] == 0
    skipped = f'openmeter_plugin_requests_skipped_total{{destination="{QUEUE}",reason="no_consumer"}}'
    assert metrics[skipped] == 1
    assert metrics[f"openmeter_plugin_delivery_post_duration_seconds_count{label}"] >= 1
    assert metrics[f"openmeter_plugin_delivery_failures_in_a_row{label}"] == 0
    assert metrics['openmeter_plugin_process_restarts_total{child="worker-0"}'] == 0
    assert metrics["openmeter_plugin_books_readable"] == 1
    disk = os.statvfs(there.server.spool)
    assert metrics["openmeter_plugin_disk_size_bytes"] == disk.f_blocks * disk.f_frsize
    assert 0 < metrics["openmeter_plugin_disk_free_bytes"] < metrics["openmeter_plugin_disk_size_bytes"]


def test_openmetrics_is_spoken_to_whoever_asks_for_it(there: Api) -> None:
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = there.client.get("/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_a_server_that_delivers_is_ready(there: Api) -> None:
    assert there.get("/healthz") == {"status": "ok"}
    eventually(lambda: there.client.get("/readyz").status_code == 200, what="readiness")
    assert there.get("/readyz") == {"ready": True, "problems": []}


# What can be asked of it


def test_retained_events_of_a_span_are_sent_again(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        wanted = {
            "from": "2026-11-22T06:00:00Z",
            "to": "2026-11-22T08:00:00+00:00",
            "subject": "consumer:bob",
        }
        before = running.events.came.copy()
        answer = running.client.post("/v1/redeliver", json=wanted)
        assert answer.status_code == 202
        asked = answer.json()
        assert answer.headers["location"] == f"/v1/redeliver/{asked['id']}"
        assert (asked["state"], asked["subject"]) == ("waiting", "consumer:bob")
        done = eventually(
            lambda: (found := running.get(f"/v1/redeliver/{asked['id']}"))["state"] == "done" and found,
            what="the redelivery",
        )
        assert done["sent"] == 2
        again = running.events.came - before
        assert again == {"event-000004": 1, "event-000005": 1}
        label = f'{{destination="{QUEUE}"}}'
        assert running.metrics()[f"openmeter_plugin_events_redelivered_total{label}"] == 2


def test_dead_letters_are_sent_again_and_taken_once_their_cause_is_mended(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        (letter,) = running.get("/v1/dead-letters")["dead_letters"]
        running.events.script = take_all
        answer = running.client.post("/v1/dead-letters/replay", json={"ids": [letter["id"]]})
        assert (answer.status_code, answer.json()) == (202, {"marked": 1})
        eventually(lambda: not running.get("/v1/dead-letters")["dead_letters"], what="the replay")
        books = running.get("/v1/spool")["total"]["books"]
        assert (books["delivered"], books["dead_lettered"]) == (6, 0)
        assert running.client.post("/v1/dead-letters/replay", json={"all": True}).json() == {"marked": 0}


def test_what_waits_is_seen_while_the_metering_api_is_away(tmp_path: Path) -> None:
    with api(tmp_path, history=False) as running:
        running.events.script = lambda _: Answer(503)
        spooled(running.server.spool, [record(1, time=OLD), record(2, time=NEW)])
        label = f'{{destination="{QUEUE}"}}'
        retries = f"openmeter_plugin_delivery_retries_total{label}"
        eventually(lambda: running.metrics().get(retries), what="a retry")
        metrics = running.metrics()
        assert metrics[f"openmeter_plugin_events_waiting{label}"] == 2
        assert metrics[f"openmeter_plugin_oldest_waiting_event_age_seconds{label}"] > 3600
        assert metrics[f"openmeter_plugin_delivery_failures_in_a_row{label}"] >= 1
        assert running.get("/v1/ledger")["hours_with_waiting_events"] == ["2026-11-20T05", "2026-11-22T07"]
        assert running.get("/v1/spool")["total"]["oldest_waiting"]["time"] == OLD


# While things go wrong


def test_a_killed_delivery_comes_back_on_the_same_port_and_refuses_no_connection(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        refused: list[str] = []
        answered: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
            while not stop.is_set():
                try:
                    answer = httpx.get(f"{running.url}/v1/spool", headers=headers, timeout=15)
                    answered.append(answer.status_code)
                except httpx.ConnectError as error:
                    refused.append(str(error))
                except httpx.TransportError:
                    pass  # it was being answered when the process was killed

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(2):
                victim = eventually(lambda: running.server.child("delivery"))
                assert victim
                os.kill(victim, signal.SIGKILL)
                before = len(answered)
                eventually(lambda n=before: len(answered) > n + 5, what="answers")  # type: ignore[misc]
        finally:
            stop.set()
            asking.join(20)
        assert refused == []
        assert set(answered) == {200}
        restarts = running.metrics()
        assert restarts['openmeter_plugin_process_restarts_total{child="delivery"}'] == 2
        assert restarts['openmeter_plugin_process_restarts_total{child="worker-0"}'] == 0
        eventually(lambda: running.client.get("/readyz").status_code == 200, what="readiness")


def test_a_delivery_that_waits_for_the_lock_lives_and_is_not_ready(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    descriptor = os.open(tmp_path / "spool" / "delivery.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with api(tmp_path, history=False) as running:
            assert running.client.get("/healthz").status_code == 200
            answer = running.client.get("/readyz")
            assert answer.status_code == 503
            assert "waits for the lock" in answer.json()["problems"][0]
            os.close(descriptor)
            descriptor = -1
            eventually(lambda: running.client.get("/readyz").status_code == 200, what="readiness")
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def test_a_worker_that_hangs_makes_the_server_unready(tmp_path: Path) -> None:
    with api(tmp_path, "--hang-timeout", "2", history=False) as running:
        eventually(lambda: running.client.get("/readyz").status_code == 200, what="readiness")
        worker = eventually(lambda: running.server.child("worker"))
        assert worker
        os.kill(worker, signal.SIGSTOP)
        label = 'openmeter_plugin_process_restarts_total{child="worker-0"}'
        eventually(lambda: running.metrics()[label] == 1, what="the replacement")


def test_books_that_cannot_be_read_leave_the_other_metrics_there(tmp_path: Path) -> None:
    from openmeter_plugin.operations.metrics import Metrics
    from openmeter_plugin.operations.watch import Watch

    (tmp_path / "books.db").write_bytes(b"this is no database at all, " * 100)
    text = Metrics(Watch(tmp_path)).scrape("")[0].decode()
    assert "openmeter_plugin_books_readable 0.0" in text
    assert "openmeter_plugin_build_info" in text
    assert any("cannot be read" in problem for problem in Watch(tmp_path).problems())


def test_deliver_offers_the_api_too(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    command = [sys.executable, "-m", "openmeter_plugin", "deliver", "--spool", str(tmp_path / "spool")]
    process = subprocess.Popen([*command, "--api", f"unix:{tmp_path}/api"], stderr=subprocess.DEVNULL)
    try:
        eventually((tmp_path / "api").exists, what="listening")
        transport = httpx.HTTPTransport(uds=str(tmp_path / "api"))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=15) as client:
            eventually(lambda: client.get("/readyz").status_code == 200, what="readiness")
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not (tmp_path / "api").exists()


def test_the_documentation_explains_every_metric() -> None:
    text = (Path(__file__).parents[2] / "docs" / "plugin-operations.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    suffixes = {"counter": "_total"}
    assert documented == {
        name.removeprefix("openmeter_plugin_") + suffixes.get(kind, "") for name, kind in METRICS.items()
    }


def test_connections_that_only_wait_do_not_keep_others_out(there: Api) -> None:
    host, port = there.url.removeprefix("http://").split(":")
    held = [socket.create_connection((host, int(port))) for _ in range(80)]
    try:
        for _ in range(3):
            assert httpx.get(f"{there.url}/healthz", timeout=15).status_code == 200
    finally:
        for connection in held:
            connection.close()
