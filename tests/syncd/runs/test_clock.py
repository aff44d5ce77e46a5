"""Wrong clocks, and clocks that jump under a running daemon."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from syncd.config import settings
from syncd.core.changes import ChangeKind
from syncd.daemon.service import running
from syncd.http.endpoint import Endpoint
from syncd.planning.guards import clock_distrust_reason
from syncd.runs.clock import Stopwatch, clock_skew, date_of
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import Run, new_run
from tests.syncd.clocks import SettableClock
from tests.syncd.daemon.test_service import finished
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, serving
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow

BOUND = timedelta(minutes=5)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Ticks:
    """A timer and a clock that tests advance."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.moment = NOON

    def pass_(self, seconds: float) -> None:
        self.seconds += seconds
        self.moment += timedelta(seconds=seconds)


def test_a_stopwatch_ignores_clock_changes() -> None:
    ticks = Ticks()
    watch = Stopwatch(lambda: ticks.moment, lambda: ticks.seconds)
    ticks.pass_(90)
    ticks.moment -= timedelta(days=60)
    assert watch.now() == NOON + timedelta(seconds=90)


@pytest.mark.parametrize("header", [None, "", "soon", "2026-01-01T12:00:00Z"])
def test_a_date_that_cannot_be_read_is_none(header: str | None) -> None:
    assert date_of(header) is None


def test_a_date_header_is_read() -> None:
    read = date_of("Thu, 01 Jan 2026 12:00:00 GMT")
    assert read is not None
    assert abs(read - NOON) < timedelta(seconds=1)


@pytest.mark.parametrize(("off", "says"), [(-301, "behind"), (301, "ahead of"), (60 * 86400, "60 days")])
def test_a_clock_that_differs_from_the_metering_api_is_not_trusted(off: int, says: str) -> None:
    why = clock_distrust_reason(timedelta(seconds=off), BOUND) or ""
    assert says in why
    assert "guards.max_clock_skew" in why


def test_a_clock_within_the_limit_is_trusted() -> None:
    assert clock_distrust_reason(timedelta(seconds=299), BOUND) is None
    assert clock_distrust_reason(timedelta(seconds=-299), BOUND) is None


@contextmanager
def dateless() -> Iterator[str]:
    """A server without Date headers."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def ahead_of(url: str, clock: SettableClock) -> timedelta | None:
    return clock_skew(Endpoint("metering", url, "metering.token", "read", timeout=2), Stopwatch(clock))


def test_the_skew_is_measured_against_the_date_of_any_answer() -> None:
    with serving(lambda _: Answer({}, 404)) as server:
        found = ahead_of(server.url, SettableClock(timedelta(hours=1)))
    assert found is not None
    assert abs(found - timedelta(hours=1)) < timedelta(seconds=5)


def test_without_a_date_or_an_answer_the_clock_is_not_trusted() -> None:
    with dateless() as url:
        assert ahead_of(url, SettableClock()) is None
    assert ahead_of("http://127.0.0.1:9", SettableClock()) is None
    assert "Date" in (clock_distrust_reason(None, BOUND) or "")


SETTINGS = """
sources: [{{type: declarative-file, path: kong.yml}}]
metering: {{dialect: {dialect}, url: "{url}", attempts: 1}}
policy: sync
policy_options: {{detach_after: 40d, delete_after: 100d}}
guards: {{{guards}}}
schedule: {{interval: 1s}}
daemon: {{listen: '127.0.0.1:0', state_dir: state}}
"""
BOTH = "_format_version: '3.0'\nconsumers: [{id: a, username: alice}, {id: b, username: bob}]\n"
ALICE = "_format_version: '3.0'\nconsumers: [{id: a, username: alice}]\n"
DAY = timedelta(days=1)


def orphaned_since(
    folder: Path,
    sandbox: httpx.Client,
    days: int | None,
    *,
    dialect: str = "openmeter-v1",
    guards: str = "",
) -> Project:
    """A project in which bob was removed from Kong, and marked `days` days ago."""
    project = Project(folder, str(sandbox.base_url))
    url = str(sandbox.base_url)
    project.config.write_text(SETTINGS.format(dialect=dialect, url=url, guards=guards))
    (folder / "kong.yml").write_text(BOTH)
    assert project.call("apply", "--yes").returncode == 0
    if days is not None:
        mark(sandbox, days)
    (folder / "kong.yml").write_text(ALICE)
    return project


def mark(sandbox: httpx.Client, days: int) -> None:
    bob = sandbox.get("/api/v1/customers/consumer-b").json()
    body = {name: bob[name] for name in ("key", "name", "usageAttribution")}
    since = f"{datetime.now(UTC) - days * DAY:%Y%m%dT%H%M%SZ}"
    body["metadata"] = {**bob["metadata"], "orphaned-at": since}
    sandbox.put(f"/api/v1/customers/{bob['id']}", json=body).raise_for_status()


def bob(sandbox: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = sandbox.get("/api/v1/customers/consumer-b").json()
    return found


def attributed(sandbox: httpx.Client) -> bool:
    return "consumer:b" in bob(sandbox).get("usageAttribution", {}).get("subjectKeys", [])


def run(project: Project, clock: SettableClock) -> Run:
    return Reconciler(settings.load(project.config), now=clock).reconcile(new_run("test", RunOptions()))


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_a_clock_60_days_ahead_ends_no_grace_period_and_the_plan_says_why(
    tmp_path: Path, sandbox: httpx.Client, dialect: str
) -> None:
    project = orphaned_since(tmp_path, sandbox, 1, dialect=dialect)
    result = run(project, SettableClock(60 * DAY))
    assert attributed(sandbox)
    assert "60 days" in result.made_plan.notes[-1]
    assert result.made_plan.of(ChangeKind.ORPHANED)[0].reason.endswith(
        "left alone while the clock cannot be trusted"
    )


def test_a_clock_60_days_behind_sets_no_mark_that_would_be_60_days_old(
    tmp_path: Path, sandbox: httpx.Client
) -> None:
    project = orphaned_since(tmp_path, sandbox, None)
    run(project, SettableClock(-60 * DAY))
    assert "orphaned-at" not in bob(sandbox)["metadata"]
    run(project, SettableClock())
    assert "orphaned-at" in bob(sandbox)["metadata"]
    assert attributed(sandbox)


def test_a_correct_clock_ends_a_grace_period(tmp_path: Path, sandbox: httpx.Client) -> None:
    project = orphaned_since(tmp_path, sandbox, 41)
    assert not run(project, SettableClock()).made_plan.notes
    assert not attributed(sandbox)


def test_the_limit_can_be_set_and_lifted(tmp_path: Path, sandbox: httpx.Client) -> None:
    project = orphaned_since(tmp_path, sandbox, 41, guards="max_clock_skew: 1h")
    run(project, SettableClock(timedelta(hours=2)))
    assert attributed(sandbox)
    run(project, SettableClock(timedelta(minutes=30)))
    assert not attributed(sandbox)
    (tmp_path / "lifted").mkdir()
    sandbox.post("/sandbox/v1/reset").raise_for_status()
    project = orphaned_since(tmp_path / "lifted", sandbox, 1, guards="max_clock_skew: null")
    run(project, SettableClock(60 * DAY))
    assert not attributed(sandbox)


def test_changes_that_do_not_depend_on_time_are_made_with_a_wrong_clock(
    tmp_path: Path, sandbox: httpx.Client
) -> None:
    project = orphaned_since(tmp_path, sandbox, 1)
    (tmp_path / "kong.yml").write_text(ALICE.replace("alice}", "alice}, {id: c, username: carol}"))
    run(project, SettableClock(60 * DAY))
    assert sandbox.get("/api/v1/customers/consumer-c").status_code == 200


@contextmanager
def jumpy(project: Project, clock: SettableClock) -> Iterator[httpx.Client]:
    with (
        running(settings.load(project.config), clock, clock_check_seconds=0.05) as daemon,
        httpx.Client(base_url=daemon.address.url) as client,
    ):
        yield client


def asked(client: httpx.Client) -> dict[str, Any]:
    """Request a run, and return it with its plan."""
    found: dict[str, Any] = finished(client, client.post("/v1/syncs").json()["id"])
    return found


def next_scheduled(client: httpx.Client, after: str) -> str:
    """Wait for a scheduled run other than `after`, and return its id."""

    def probe() -> str | None:
        last = client.get("/v1/status").json()["last"]
        return str(last["id"]) if last and last["id"] != after and last["trigger"] == "schedule" else None

    return eventually(probe, what="a run by schedule")


def test_a_clock_that_jumps_ahead_under_a_daemon_and_back_again_detaches_nobody(
    tmp_path: Path, sandbox: httpx.Client
) -> None:
    project, clock = orphaned_since(tmp_path, sandbox, 1), SettableClock()
    project.config.write_text(project.config.read_text().replace("interval: 1s", "interval: 10m"))
    with jumpy(project, clock) as client:
        first = next_scheduled(client, "")
        clock.ahead = 60 * DAY
        due = next_scheduled(client, first)
        assert "60 days" in client.get(f"/v1/syncs/{due}").json()["plan"]["notes"][0]
        assert "60 days" in asked(client)["plan"]["notes"][0]
        clock.ahead = timedelta(0)
        assert not asked(client)["plan"]["notes"]
        assert attributed(sandbox)
        mark(sandbox, 41)
        asked(client)
        assert not attributed(sandbox)


def test_a_clock_that_jumps_back_under_a_daemon_does_not_stop_its_schedule(
    tmp_path: Path, sandbox: httpx.Client
) -> None:
    project, clock = orphaned_since(tmp_path, sandbox, 1), SettableClock()
    with jumpy(project, clock) as client:
        next_scheduled(client, "")
        clock.ahead = -60 * DAY

        def due() -> bool:
            moment = datetime.fromisoformat(client.get("/v1/status").json()["next_run"])
            return moment < datetime.now(UTC) - 59 * DAY

        eventually(due, what="a schedule that follows the clock")
        last = client.get("/v1/status").json()["last"]["id"]
        next_scheduled(client, next_scheduled(client, last))


def test_a_clock_that_jumps_ahead_has_a_cron_schedule_run_what_is_due(
    tmp_path: Path, sandbox: httpx.Client
) -> None:
    project, clock = orphaned_since(tmp_path, sandbox, 1), SettableClock()
    later = datetime.now(UTC) + 2 * DAY
    cron = f"cron: '{later.minute} {later.hour} {later.day} * *'"
    project.config.write_text(project.config.read_text().replace("interval: 1s", cron))
    with jumpy(project, clock) as client:
        first = next_scheduled(client, "")
        clock.ahead = 3 * DAY
        next_scheduled(client, first)
