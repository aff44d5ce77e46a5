"""One reconcile: what it withholds, remembers, and says, over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from syncd.config import settings
from syncd.core.changes import ChangeKind, Status
from syncd.core.policy import Policy
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import Run, RunState, new_run
from tests.syncd.daemon.test_service import daemon, idle
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.states import opened_history

pytestmark = pytest.mark.slow

NOBODY = "_format_version: '3.0'\nconsumers: []\n"
ONE = "_format_version: '3.0'\nconsumers: [{username: new}]\n"
START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Altered:
    """Passes requests on to the sandbox, unless `alter` answers them."""

    sandbox: httpx.Client
    alter: Callable[[Asked], Answer | None] = lambda _asked: None

    def __call__(self, asked: Asked) -> Answer:
        if (altered := self.alter(asked)) is not None:
            return altered
        answer = self.sandbox.request(
            asked.method, asked.path, params=asked.query, json=asked.body if asked.body is not None else None
        )
        return Answer(answer.content, answer.status_code, {"Content-Type": "application/json"})


@contextmanager
def altered(
    project: Project, sandbox: httpx.Client, alter: Callable[[Asked], Answer | None]
) -> Iterator[None]:
    with serving(Altered(sandbox, alter)) as server:
        project.metering = server.url
        project.configure()
        yield


# Empty sources


@pytest.mark.parametrize("policy", ["create-only", "upsert-only", "sync"])
def test_a_source_that_is_empty_where_it_had_consumers_removes_nothing_and_ends_with_3(
    project: Project, sandbox: httpx.Client, policy: Policy
) -> None:
    project.settings += f"policy: {policy}\n"
    project.configure()
    assert project.call("apply", "--yes").returncode == 0
    before = sandbox.get("/api/v1/customers").json()
    (project.folder / "kong.yml").write_text(NOBODY)
    ended = project.call("apply", "--yes")
    assert ended.returncode == 3
    assert "returned no principals" in ended.stdout
    assert "--allow-empty" in ended.stdout
    assert sandbox.get("/api/v1/customers").json() == before
    assert project.call("plan").returncode == 2
    assert project.call("apply", "--yes", "--allow-empty", "--force").returncode == 0


def test_a_source_that_may_be_empty_does_not_keep_the_orphans_of_the_others(
    project: Project, sandbox: httpx.Client
) -> None:
    portal = "sources: [{type: declarative-file, path: kong.yml}, {type: static, subjects: []%s}]\n"
    project.configure(portal % "" + "policy: sync\n")
    assert project.call("apply", "--yes").returncode == 0
    (project.folder / "kong.yml").write_text(ONE)
    ended = project.call("apply", "--yes", "--force")
    assert ended.returncode == 3
    assert "static-1 returned no principals" in ended.stdout
    assert "may_be_empty" in ended.stdout
    there = sandbox.get("/api/v1/customers")
    assert there.json()["totalCount"] == 3, "what does not remove goes on"
    assert "orphaned-at" not in there.text
    project.configure(portal % ", may_be_empty: true" + "policy: sync\n")
    assert project.call("apply", "--yes", "--force").returncode == 0
    assert "orphaned-at" in sandbox.get("/api/v1/customers").text


def test_the_daemon_shows_a_run_with_an_emptied_source_as_blocked(project: Project) -> None:
    assert project.call("apply", "--yes").returncode == 0
    (project.folder / "kong.yml").write_text(NOBODY)
    with daemon(project) as client:
        last = idle(client)["last"]
    assert isinstance(last, dict)
    assert last["state"] == "blocked"


def test_a_source_that_never_had_a_consumer_is_no_trouble(project: Project) -> None:
    (project.folder / "kong.yml").write_text(NOBODY)
    assert project.call("apply", "--yes").returncode == 0
    assert project.call("plan").returncode == 0


# Figures


@pytest.mark.slow
def test_meters_that_hang_delay_a_run_once_and_briefly(project: Project, sandbox: httpx.Client) -> None:
    released = threading.Event()
    queries: list[str] = []

    def hang(asked: Asked) -> Answer | None:
        if not asked.path.endswith("/query"):
            return None
        queries.append(asked.path)
        released.wait(20)
        return Answer(cut=True)

    with altered(project, sandbox, hang):
        project.config.write_text(project.config.read_text().replace("attempts: 1", "attempts: 5"))
        begun = time.monotonic()
        try:
            ended = project.call("apply", "--yes")
        finally:
            released.set()
    assert time.monotonic() - begun < 8  # three seconds for the figures; metering.timeout is ten
    assert ended.returncode == 0
    assert "unbilled usage is unknown" in ended.stdout
    assert len(queries) == 1


def test_the_status_after_a_run_leaves_out_what_the_run_attributed(
    project: Project, sandbox: httpx.Client
) -> None:
    kong = '_format_version: "3.0"\nconsumers: [{id: a, username: alice}]\n'
    (project.folder / "kong.yml").write_text(kong)
    headers = {"Content-Type": "application/cloudevents+json"}
    for number, subject in enumerate(["consumer:a", "stranger", "stranger"]):
        event = {"specversion": "1.0", "id": f"{number}", "source": "kong", "type": "kong.api_request"}
        sandbox.post("/api/v1/events", json={**event, "subject": subject}, headers=headers).raise_for_status()
    with daemon(project) as client:
        last = idle(client)["last"]
        metrics = client.get("/metrics").text
    assert isinstance(last, dict)
    assert (last["unbilled"]["subjects"], last["unbilled"]["events"]) == (1, 2)
    assert (last["unbilled"]["unknown_subjects"], last["unbilled"]["unknown_events"]) == (1, 2)
    assert 'syncd_unbilled_subjects{status="planned"} 0.0' in metrics
    assert 'syncd_unbilled_subjects{status="unknown"} 1.0' in metrics
    assert 'syncd_unbilled_events{status="settled"} 0.0' in metrics


def test_a_plan_counts_the_subjects_that_no_source_knows(project: Project, sandbox: httpx.Client) -> None:
    event = {"specversion": "1.0", "id": "1", "source": "kong", "type": "kong.api_request", "subject": "x"}
    headers = {"Content-Type": "application/cloudevents+json"}
    sandbox.post("/api/v1/events", json=event, headers=headers).raise_for_status()
    assert "no source knows 1 (1 event)" in project.call("plan").stdout


# Refused deletions


def test_a_deletion_that_was_refused_waits_without_trouble_until_the_customer_changes(
    project: Project, sandbox: httpx.Client
) -> None:
    """The v3 API does not show an invoice that forbids a deletion, so only the attempt tells."""
    project.settings += "policy: sync\npolicy_options: {detach_after: 1d, delete_after: 2d}\n"
    project.settings += "guards: {max_clock_skew: null, min_changes: 1000}\n"
    deletions: list[str] = []
    invoice = {"status": 400, "detail": "validation error: invoice 01M8 is still in gathering state"}

    def refuse(asked: Asked) -> Answer | None:
        if asked.method != "DELETE" or "customers" not in asked.path:
            return None
        deletions.append(asked.path)
        return Answer(invoice, 400)

    def run(day: float, *, dry: bool = False) -> Run:
        config = settings.load(project.config)
        with opened_history(config.daemon.state_dir) as history:
            reconciler = Reconciler(config, history, now=lambda: START + timedelta(days=day))
            return reconciler.reconcile(new_run("test", RunOptions(dry_run=dry)))

    kong = '_format_version: "3.0"\nconsumers: [{id: a, username: alice}, {id: b, username: bob}]\n'
    (project.folder / "kong.yml").write_text(kong)
    with altered(project, sandbox, refuse):
        project.config.write_text(project.config.read_text() + "daemon: {state_dir: state}\n")
        run(0)
        (project.folder / "kong.yml").write_text(kong.replace(", {id: b, username: bob}", ""))
        run(0)
        refused = run(3)
        assert [outcome.status for outcome in refused.outcomes] == [Status.BLOCKED, Status.SKIPPED]
        assert refused.state is RunState.SUCCEEDED  # it waits for billing, which is no trouble
        assert len(deletions) == 1
        again = run(3.1, dry=True).made_plan
        (blocked,) = again.of(ChangeKind.BLOCKED)
        assert "invoice 01M8 is still in gathering state" in blocked.reason
        assert run(3.2).state is RunState.SUCCEEDED
        assert len(deletions) == 1
        (bob,) = (
            one for one in sandbox.get("/api/v1/customers").json()["items"] if one["key"] == "consumer-b"
        )
        body = {name: bob[name] for name in ("key", "metadata", "usageAttribution")}
        sandbox.put(f"/api/v1/customers/{bob['id']}", json={**body, "name": "Bob"}).raise_for_status()
        run(3.3)
        assert len(deletions) == 2
        run(4.4)
        assert len(deletions) == 3


# A full disk


def test_a_full_disk_under_the_state_directory_changes_nothing_and_is_said_in_words(
    project: Project, sandbox: httpx.Client
) -> None:
    import subprocess

    from tests.syncd.processes import command

    limited = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", *command("apply", "--yes")]
    ended = subprocess.run(
        limited, cwd=project.folder, env=project.environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "daemon.state_dir" in ended.stderr
    assert sandbox.get("/api/v1/customers").json()["items"] == []


def test_the_plan_of_a_dry_run_needs_no_state_directory(project: Project) -> None:
    assert project.call("plan").returncode == 2
    assert not (project.folder / "state").exists()


def test_json_of_an_apply_names_the_options_error_and_outcomes(project: Project) -> None:
    found = json.loads(project.call("apply", "--yes", "--output=json").stdout)
    assert found["error"] is None
    assert found["summary"]["done"] == len(found["outcomes"])
