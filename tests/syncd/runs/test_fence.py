"""A run that may no longer write: nothing more is sent, and its record stays as the next writer closed it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from syncd.config import settings
from syncd.core.changes import Outcome, Status
from syncd.core.errors import ApplyStoppedError, LockedError
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Permit, Retry
from syncd.runs import reconciler
from syncd.runs.history import History, HistoryRecorder
from syncd.runs.lock import close_interrupted, write_lock
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import Run, RunState, new_run
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.syncd.builders import consumer, observed, plan_for
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, serving

PLAN = plan_for([consumer("1", "alice")], observed())
LOST = "this syncd may no longer write"


def lost() -> None:
    raise LockedError(LOST)


@pytest.fixture
def history(where: StateLocation) -> Iterator[History]:
    with State(where) as state:
        yield History(state)


def recorded(history: History) -> Run:
    """A run under way, whose process seems to be gone."""
    one = replace(new_run("manual", RunOptions()), state=RunState.RUNNING, plan=PLAN)
    history.save(one.summary(), one.plan)
    return one


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_not_a_byte_of_a_write_is_sent_without_permission(method: str) -> None:
    with serving(lambda _asked: Answer({"ok": 1})) as server:
        endpoint = Endpoint("metering", server.url, "metering.token", "do it")
        with ApiClient(endpoint, Retry(permit=lost)) as client:
            assert client.get("/x") == {"ok": 1}  # also over a connection that is open already
            with pytest.raises(LockedError):
                client.request(method, "/x", body={})
            assert client.get("/x") == {"ok": 1}
        assert {asked.method for asked in server.asked} == {"GET"}


def test_a_run_that_was_closed_records_no_change_as_begun(history: History) -> None:
    one = recorded(history)
    history.begin(one.id, PLAN.changes)
    assert history.close_interrupted() == [one.id]
    with pytest.raises(LockedError, match="was closed by another syncd"):
        history.begin(one.id, PLAN.changes)


def test_a_run_that_was_closed_stays_closed_and_keeps_what_became_of_its_changes(history: History) -> None:
    one = recorded(history)
    history.begin(one.id, PLAN.changes[:1])
    history.close_interrupted()
    history.record(one.id, 1, [Outcome(PLAN.changes[0], Status.DONE)])
    with pytest.raises(LockedError):
        history.save(replace(one, state=RunState.SUCCEEDED).summary())
    found = history.run(one.id)
    assert found is not None
    assert (found["state"], "interrupted" in found["error"]) == ("failed", True)
    assert [result["status"] for result in found["results"]] == ["done"]


@contextmanager
def permitting(permit: Permit, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    @contextmanager
    def lock(*_: object, **__: object) -> Iterator[Permit]:
        yield permit

    monkeypatch.setattr(reconciler, "write_lock", lock)
    yield


def test_a_run_that_loses_the_lock_stops_and_keeps_what_it_did(
    project: Project, sandbox: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.concurrency = 1
    project.configure("daemon: {state_dir: state}\n")
    config = settings.load(project.config)
    writes = 0

    def permit() -> None:
        nonlocal writes
        writes += 1
        if len(sandbox.get("/api/v1/customers").json()["items"]) == 1:
            lost()

    with State(config.daemon.state) as state, permitting(permit, monkeypatch):
        history = History(state)
        observers = (HistoryRecorder(history, lambda: config.daemon.keep_runs),)
        run = new_run("test", RunOptions())
        with pytest.raises(ApplyStoppedError, match=LOST):
            Reconciler(config, history, observers).reconcile(run)
        found = history.run(run.id)
    assert writes > 1
    assert found is not None
    assert (found["state"], found["outcomes"]["done"]) == ("failed", 1)
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 1


def test_the_end_of_a_run_is_recorded_before_another_may_write(
    project: Project, sandbox: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.configure("daemon: {state_dir: state}\n")
    config = settings.load(project.config)
    states: list[str] = []
    with State(config.daemon.state) as state:
        history = History(state)

        @contextmanager
        def lock(*arguments: object, **options: object) -> Iterator[Permit]:
            with write_lock(state, "test") as permit:
                yield permit
                states.append(history.runs(1)[0]["state"])

        monkeypatch.setattr(reconciler, "write_lock", lock)
        observers = (HistoryRecorder(history, lambda: config.daemon.keep_runs),)
        Reconciler(config, history, observers).reconcile(new_run("test", RunOptions()))
        (project.folder / "kong.yml").write_text("")
        with pytest.raises(Exception, match=r"kong\.yml"):
            Reconciler(config, history, observers).reconcile(new_run("test", RunOptions()))
        assert history.runs(1)[0]["state"] == "failed"
    assert states[0] == "succeeded"


def test_syncd_history_closes_a_killed_run_but_not_one_under_way(where: StateLocation) -> None:
    with State(where) as state:
        history = History(state)
        one = recorded(history)
        with write_lock(state, "syncd apply"):
            close_interrupted(state, history)
            assert history.runs(1)[0]["state"] == "running"
        close_interrupted(state, history)
        assert history.runs(1)[0]["id"] == one.id
        assert history.runs(1)[0]["state"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--help",), ("plan",)], ids=" ".join)
def test_a_command_without_a_state_imports_no_database_library(
    project: Project, arguments: tuple[str, ...]
) -> None:
    done = project.run(*arguments, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "typer" in imported
    assert not {"sqlalchemy", "alembic", "psycopg"} & imported


def test_no_command_shows_the_password_of_the_database(tmp_path: Path) -> None:
    project = Project(tmp_path, "http://127.0.0.1:1")
    url = "postgresql://syncd:s3cr3t%40word@127.0.0.1:1/syncd?sslpassword=s3cr3t2"
    project.configure(f"daemon: {{state_url: '{url}'}}\n")
    said = ""
    for arguments in ("check", "history", "history --output=json", "doctor", "plan", "apply --yes"):
        done = project.call(*arguments.split())
        said += done.stdout + done.stderr
    said += repr(settings.load(project.config)) + json.dumps(
        settings.load(project.config).model_dump(mode="json"), default=str
    )
    assert "postgresql://syncd@127.0.0.1:1/syncd (daemon.state_url) cannot be used" in said
    assert "s3cr3t" not in said
    project.configure("daemon: {state_url: 'mysql://syncd:s3cr3t@127.0.0.1/syncd'}\n")
    refused = project.call("check")
    assert "daemon.state_url" in refused.stderr
    assert "s3cr3t" not in refused.stderr
