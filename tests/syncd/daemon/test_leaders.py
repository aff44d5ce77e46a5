"""Several daemons on one PostgreSQL: one does the runs, all serve, and another takes over."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from syncd.config import settings
from syncd.daemon.leadership import Leadership
from syncd.daemon.service import RunningDaemon, running
from syncd.sandbox.testing import running_sandbox
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.harness.postgres import PASSWORD, Postgres, programs, running_postgres
from tests.leaders.cluster import running_cluster
from tests.syncd.dashboard.support import text_of
from tests.syncd.processes import Project
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow

ROUNDS = 2


@pytest.mark.timeout(300)
def test_a_killed_or_frozen_leader_is_replaced_and_never_writes_beside_the_next(
    tmp_path: Path, postgres: Postgres
) -> None:
    """`make leaders` does fifty rounds."""
    with (
        running_sandbox() as metering,
        running_cluster(tmp_path, metering, postgres.new_database(), seed=7) as cluster,
    ):
        for _ in range(ROUNDS):
            assert cluster.round().takeover < 15


def leads(client: httpx.Client) -> bool:
    return bool(client.get("/v1/status").json()["leads"])


@contextmanager
def two_daemons(project: Project, postgres: Postgres) -> Iterator[tuple[RunningDaemon, RunningDaemon]]:
    """The first leads."""
    url = postgres.new_database()
    project.configure(f"daemon: {{listen: '127.0.0.1:0', state_url: '{url}'}}\n")
    with ExitStack() as stack:
        first = stack.enter_context(running(settings.load(project.config)))
        yield first, stack.enter_context(running(settings.load(project.config)))


@pytest.fixture
def leader_and_follower(project: Project, postgres: Postgres) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    with (
        two_daemons(project, postgres) as (first, second),
        httpx.Client(base_url=first.address.url) as leader,
        httpx.Client(base_url=second.address.url) as follower,
    ):
        eventually(lambda: leader.get("/readyz").status_code == 200)
        yield leader, follower


Pair = tuple[httpx.Client, httpx.Client]


def test_one_leads_and_the_other_says_who(leader_and_follower: Pair) -> None:
    leader, follower = leader_and_follower
    assert leads(leader)
    assert not leads(follower)
    seen = eventually(lambda: follower.get("/v1/status").json()["leader"])
    assert (seen["who"], seen["term"]) == ("syncd run", 1)
    page = text_of(follower.get("/dashboard/").text)
    assert f"{seen['host']} leads" in page
    assert "This syncd is the leader" in text_of(leader.get("/dashboard/").text)
    assert PASSWORD not in page


def test_a_run_that_is_requested_of_a_follower_is_done_by_the_leader(leader_and_follower: Pair) -> None:
    leader, follower = leader_and_follower
    asked = follower.post("/v1/syncs", json={}).json()
    assert asked["state"] == "queued"

    def ended() -> dict[str, object] | None:
        for client in (follower, leader):
            answer = client.get(f"/v1/syncs/{asked['id']}")
            assert answer.status_code == 200, answer.text
        run: dict[str, object] = follower.get(f"/v1/syncs/{asked['id']}").json()
        return run if run["state"] == "succeeded" else None

    run = eventually(ended)
    assert run["trigger"] == "manual"
    assert run["plan"] is not None
    assert leader.get("/v1/status").json()["last"]["id"] == asked["id"]
    assert follower.get("/v1/status").json()["last"]["id"] == asked["id"]


def test_a_dry_run_that_is_requested_of_a_follower_can_be_applied_there(
    leader_and_follower: Pair, project: Project, sandbox: httpx.Client
) -> None:
    _, follower = leader_and_follower
    (project.folder / "kong.yml").write_text('_format_version: "3.0"\nconsumers: [{username: zoe}]\n')

    def ended(run_id: str) -> dict[str, Any] | None:
        run: dict[str, Any] = follower.get(f"/v1/syncs/{run_id}").json()
        return run if run["finished_at"] else None

    dry = follower.post("/v1/syncs", json={"dry_run": True}).json()
    assert eventually(lambda: ended(dry["id"]))["state"] == "succeeded"
    applied = follower.post("/v1/syncs", json={"reviewed": dry["id"]}).json()
    run = eventually(lambda: ended(applied["id"]))
    assert run is not None
    assert run["state"] == "succeeded", run["error"]
    assert run["outcomes"]["done"] == 2
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 3


def test_a_follower_is_ready_and_shows_what_the_leader_did(leader_and_follower: Pair) -> None:
    leader, follower = leader_and_follower
    assert follower.get("/readyz").status_code == 200
    assert follower.get("/v1/plan").json()["run"]["id"] == leader.get("/v1/plan").json()["run"]["id"]
    assert follower.get("/v1/status").json()["last_success"]
    for path in ("/dashboard/", "/dashboard/runs", "/dashboard/customers", "/dashboard/unbilled"):
        assert follower.get(path).status_code == 200


def test_only_the_leader_has_metrics_of_runs(leader_and_follower: Pair) -> None:
    leader, follower = (client.get("/metrics").text for client in leader_and_follower)
    assert "syncd_leader 1.0" in leader
    assert "syncd_leader 0.0" in follower
    assert "syncd_last_success_timestamp_seconds" in leader
    assert "syncd_last_success_timestamp_seconds" not in follower
    assert "syncd_config_current" in follower


def test_a_follower_leads_at_once_when_the_leader_stops(project: Project, postgres: Postgres) -> None:
    url = postgres.new_database()
    project.configure(f"daemon: {{listen: '127.0.0.1:0', state_url: '{url}'}}\n")
    with ExitStack() as stack:
        first = stack.enter_context(ExitStack())
        leader = first.enter_context(running(settings.load(project.config)))
        with httpx.Client(base_url=leader.address.url) as client:
            eventually(lambda: client.get("/readyz").status_code == 200)
        follower = stack.enter_context(running(settings.load(project.config)))
        client = stack.enter_context(httpx.Client(base_url=follower.address.url))
        assert not leads(client)
        first.close()
        eventually(lambda: leads(client), seconds=4)


def test_a_leader_goes_on_after_a_look_that_crashed(tmp_path: Path, postgres: Postgres) -> None:
    stopping, elected = threading.Event(), threading.Event()
    with State(StateLocation(tmp_path, postgres.new_database())) as state:
        leadership = Leadership(state, stopping)
        crashes = iter([ZeroDivisionError()])

        def begin() -> None:
            for error in crashes:
                leadership.resign()
                raise error
            elected.set()

        leadership.elected = begin
        thread = threading.Thread(target=leadership.work)
        thread.start()
        try:
            assert elected.wait(20)
        finally:
            stopping.set()
            leadership.wake()
            thread.join(20)
            leadership.resign()


def test_apply_waits_for_the_run_of_another_machine_and_plans_meanwhile(
    project: Project, postgres: Postgres
) -> None:
    with two_daemons(project, postgres) as (first, _), httpx.Client(base_url=first.address.url) as client:
        eventually(lambda: client.get("/readyz").status_code == 200)
        applied = project.call("apply", "--yes")
        assert applied.returncode == 0, applied.stderr
        runs = json.loads(project.call("history", "--output=json").stdout)
        assert [run["trigger"] for run in runs[:2]] == ["apply", "schedule"]


def test_without_the_database_the_api_and_the_pages_say_so(project: Project) -> None:
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed")
    with running_postgres(folder) as server:
        project.configure(f"daemon: {{listen: '127.0.0.1:0', state_url: '{server.new_database()}'}}\n")
        with (
            running(settings.load(project.config)) as daemon,
            httpx.Client(base_url=daemon.address.url, timeout=30) as client,
        ):
            eventually(lambda: client.get("/readyz").status_code == 200)
            server.process.send_signal(signal.SIGQUIT)
            server.process.wait(30)
            eventually(lambda: client.get("/v1/syncs/unknown").status_code == 503)
            for method, path in (
                ("GET", "/v1/syncs/unknown"),
                ("POST", "/v1/syncs"),
                ("GET", "/dashboard/runs"),
            ):
                answer = client.request(method, path)
                assert answer.status_code == 503, answer.text
                assert "daemon.state_url" in answer.text
                assert "pass" not in answer.text
            assert client.get("/healthz").status_code == 200
            eventually(lambda: client.get("/readyz").status_code == 503)
            assert "syncd_leader 0.0" in client.get("/metrics").text
