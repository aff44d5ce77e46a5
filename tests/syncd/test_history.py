"""The run history, the audit log and the lock between writers, on real files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Self

import httpx
import pytest

from syncd.errors import HistoryError, LockedError
from syncd.history import History
from syncd.lock import write_lock
from syncd.outcome import Outcome, Status
from syncd.recorder import Recorder
from syncd.runner import RunOptions
from syncd.runs import Run, State, begun
from syncd.sandbox.testing import running_sandbox
from tests.syncd.builders import consumer, observed, plan_for
from tests.syncd.processes import Project

PLAN = plan_for([consumer("1", "alice")], observed())


def run(*, state: State = State.SUCCEEDED, days_ago: int = 0) -> Run:
    asked = datetime.now(UTC) - timedelta(days=days_ago)
    return replace(begun("manual", RunOptions()), state=state, requested_at=asked, plan=PLAN)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(tmp_path)
    yield history
    history.close()


def test_a_run_is_kept_with_its_plan_and_each_change(history: History) -> None:
    one = run()
    history.save(one.summary(), one.plan)
    history.record(one.id, 1, [Outcome(PLAN.changes[0], Status.BLOCKED, "in conflict")])
    found = history.run(one.id[:8])
    assert found is not None
    assert (found["id"], found["trigger"], found["state"]) == (one.id, "manual", "succeeded")
    assert found["plan"]["summary"]["create-customer"] == 1
    (result,) = found["results"]
    assert (result["status"], result["detail"]) == ("blocked", "in conflict")
    assert history.run("nope") is None
    assert history.run("") is None


def test_the_latest_runs_come_first_and_old_ones_are_forgotten(history: History) -> None:
    for days_ago in (100, 2, 1):
        old = run(days_ago=days_ago)
        history.save(old.summary(), old.plan)
    history.prune(timedelta(days=90))
    found = history.runs(10)
    assert len(found) == 2
    assert found[0]["requested_at"] > found[1]["requested_at"]
    assert len(history.runs(1)) == 1


class Clock(datetime):
    """This machine's clock as somebody has set it."""

    ahead = timedelta(0)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + cls.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(Clock, "ahead", -timedelta(days=400))
    monkeypatch.setattr("syncd.history.datetime", Clock)
    return Clock


def shown_by(clock: type[Clock]) -> datetime:
    return clock.now(UTC)


def recorded(recorder: Recorder, days_ago: int) -> str:
    one = run(days_ago=days_ago)
    recorder.planned(one)
    recorder.finished(one)
    return one.id


def kept(history: History) -> set[str]:
    return {str(one["id"]) for one in history.runs(1000)}


def test_the_latest_runs_stay_whatever_their_age(history: History) -> None:
    """As a clock that is set a year ahead before syncd starts makes all of them look."""
    before = [run(days_ago=400 - number) for number in range(5)]
    for old in before:
        history.save(old.summary(), old.plan)
    recorder = Recorder(history, lambda: timedelta(days=90), at_least=3)
    latest = recorded(recorder, 0)
    assert kept(history) == {before[3].id, before[4].id, latest}


def test_a_clock_that_jumps_ahead_forgets_no_run_that_was_made_before_it_did(
    history: History, clock: type[Clock]
) -> None:
    recorder = Recorder(history, lambda: timedelta(days=90), at_least=1, now=lambda: shown_by(clock))
    made = [recorded(recorder, days_ago) for days_ago in (450, 400)]
    clock.ahead = timedelta(0)
    made.append(recorded(recorder, 0))
    assert kept(history) == set(made)


def test_runs_made_while_the_clock_was_behind_stay_when_it_is_right_again(
    history: History, clock: type[Clock]
) -> None:
    for _ in range(3):
        one = run()
        history.save(one.summary(), one.plan)
    clock.ahead = timedelta(0)
    recorder = Recorder(history, lambda: timedelta(days=90), at_least=3, now=lambda: shown_by(clock))
    clock.ahead = -timedelta(days=400)
    behind = recorded(recorder, 400)
    clock.ahead = timedelta(0)
    recorded(recorder, 0)
    assert behind in kept(history)


def test_what_is_too_old_by_a_clock_that_goes_evenly_is_forgotten(history: History) -> None:
    recorder = Recorder(history, lambda: timedelta(days=90), at_least=2)
    old = [recorded(recorder, days_ago) for days_ago in (95, 94)]
    recent = [recorded(recorder, days_ago) for days_ago in (2, 1, 0)]
    assert kept(history) == set(recent)
    assert not kept(history) & set(old)


def test_plans_that_say_the_same_are_stored_once(history: History, tmp_path: Path) -> None:
    for _ in range(3):
        one = run()
        history.save(one.summary(), one.plan)
    assert history._db.execute("SELECT count(*) FROM plans").fetchone() == (1,)


def test_a_run_whose_process_was_killed_is_closed_by_the_next_writer(history: History) -> None:
    dead = run(state=State.RUNNING)
    history.save(dead.summary(), dead.plan)
    assert history.close_interrupted() == [dead.id]
    found = history.run(dead.id)
    assert found is not None
    assert found["state"] == "failed"
    assert "interrupted" in found["error"]
    assert history.close_interrupted() == []


def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match=r"daemon\.state_dir"):
        History(tmp_path / "file")
    with pytest.raises(LockedError, match=r"daemon\.state_dir"), write_lock(tmp_path / "file", "x"):
        pass


HOLD = """
import sys, pathlib
from syncd.lock import write_lock
with write_lock(pathlib.Path(sys.argv[1]), "syncd apply"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_comes_second_is_told_who_holds_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    said = rf"another syncd is writing: syncd apply \(process {holder.pid}, since"
    with pytest.raises(LockedError, match=said), write_lock(tmp_path, "syncd run", patience=0):
        pass


def test_a_lock_is_waited_for(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    def let_go(_seconds: float) -> None:
        assert holder.stdin is not None
        if not holder.stdin.closed:
            holder.stdin.close()
        holder.wait(10)

    with write_lock(tmp_path, "syncd run", patience=10, sleep=let_go):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with write_lock(tmp_path, "syncd run", patience=0):
        pass


def test_waiting_for_the_lock_ends_when_the_daemon_is_to_stop(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    with (
        pytest.raises(LockedError),
        write_lock(tmp_path, "syncd run", patience=60, should_stop=lambda: True),
    ):
        pass


def test_apply_writes_history_that_people_and_programs_can_read(tmp_path: Path) -> None:
    with running_sandbox() as url:
        project = Project(tmp_path, url)
        assert "No runs yet" in project.call("history").stdout
        project.call("apply")
        (tmp_path / "kong.yml").write_text("")
        assert project.call("apply").returncode == 1
        listed = json.loads(project.call("history", "--json").stdout)
        assert [entry["state"] for entry in listed] == ["failed", "succeeded"]
        assert "kong.yml" in listed[0]["error"]
        shown = project.call("history", listed[1]["id"][:6]).stdout
        assert "create-customer  acme" in shown
        assert "Planned: 2 create-customer" in shown
        assert len(json.loads(project.call("history", listed[1]["id"], "--json").stdout)["results"]) == 5
        assert project.call("history", "nope").returncode == 1
        assert httpx.get(f"{url}/api/v1/customers").json()["totalCount"] == 2
