"""The run history and the write lock, on real files."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from syncd.core.changes import ChangeKind, Outcome, Status
from syncd.core.errors import LockedError, StateError
from syncd.runs.history import History, HistoryRecorder, count_expired
from syncd.runs.lock import file_lock
from syncd.runs.options import RunOptions
from syncd.runs.run import Run, RunState, new_run
from syncd.sandbox.testing import running_sandbox
from syncd.state import tables
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.syncd.builders import consumer, observed, plan_for
from tests.syncd.processes import Project

PLAN = plan_for([consumer("1", "alice")], observed())


def run(*, state: RunState = RunState.SUCCEEDED, days_ago: float = 0) -> Run:
    asked = datetime.now(UTC) - timedelta(days=days_ago)
    return replace(new_run("manual", RunOptions()), state=state, requested_at=asked, plan=PLAN)


@pytest.fixture
def history(where: StateLocation) -> Iterator[History]:
    with State(where) as state:
        yield History(state)


def plans_in(history: History) -> int:
    with history.state.reading() as connection:
        return len(connection.execute(select(tables.plans.c.hash)).all())


def test_a_run_is_recorded_with_its_plan_and_each_change(history: History) -> None:
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


def saved(history: History, *days_ago: float) -> list[str]:
    """Record runs in this order; return their ids."""
    runs = [run(days_ago=days) for days in days_ago]
    for one in runs:
        history.save(one.summary(), one.plan)
    return [one.id for one in runs]


def recorded_ids(history: History) -> list[str]:
    """The ids of the recorded runs, newest last."""
    return [str(one["id"]) for one in reversed(history.runs(1000))]


def test_the_latest_runs_come_first_and_old_ones_expire(history: History) -> None:
    made = saved(history, 42, 35, 28, 21, 14, 7, 3, 2)
    history.prune(timedelta(days=30), at_least=1)
    # Ages count from the last run: a run of 28 days ago was 26 days before it.
    assert recorded_ids(history) == made[2:]
    assert [one["id"] for one in history.runs(2)] == [made[-1], made[-2]]
    history.prune(timedelta(days=4), at_least=1)
    assert recorded_ids(history) == made[-2:]


def test_the_latest_runs_never_expire(history: History) -> None:
    made = saved(history, *range(110, -1, -1))
    history.prune(timedelta(days=3))
    assert recorded_ids(history) == made[-100:]
    history.prune(timedelta(days=3), at_least=7)
    assert recorded_ids(history) == made[-7:]


def test_runs_are_ordered_by_insertion_whatever_their_times(
    history: History,
) -> None:
    ahead, right = saved(history, -400, 0)
    assert recorded_ids(history) == [ahead, right]
    # A run keeps its place when it is updated.
    first = history.run(ahead)
    assert first is not None
    history.save({name: value for name, value in first.items() if name not in ("plan", "results")})
    assert recorded_ids(history) == [ahead, right]


@pytest.mark.parametrize("wrong_by", [-20_000, -400, -20, 20, 400, 20_000], ids="{} days".format)
def test_a_clock_that_is_wrong_at_the_start_expires_no_run_nor_does_its_correction(
    history: History, wrong_by: int
) -> None:
    made = saved(history, 30, 25, 20, 15, 10, 5)
    for _ in range(3):
        made += saved(history, 2 + wrong_by, 1 + wrong_by)
        history.prune(timedelta(days=90), at_least=1)
        made += saved(history, 1, 0)
        history.prune(timedelta(days=90), at_least=1)
    assert recorded_ids(history) == made


def test_runs_of_a_wrong_clock_expire_as_all_others_do(history: History) -> None:
    made = saved(history, 1000, 999, 998, 20, 15, 10, 5, 0)
    history.prune(timedelta(days=14), at_least=1)
    assert recorded_ids(history) == made[-3:]


def test_a_clock_that_was_far_ahead_for_a_while_lets_all_runs_expire(history: History) -> None:
    made = saved(history, 30, 25, -400, 20, 15, 10, 5, 0)
    history.prune(timedelta(days=12), at_least=1)
    assert recorded_ids(history) == made[-3:]


def test_a_young_run_does_not_expire_with_a_later_one_that_seems_older(history: History) -> None:
    """The clock was six days behind for one run."""
    made = saved(history, 20, 14, 8, 3, 8.5, 1, 0)
    history.prune(timedelta(days=5), at_least=1)
    assert recorded_ids(history) == made[3:]


def test_a_running_run_does_not_expire_and_preserves_no_other(history: History) -> None:
    hanging = run(state=RunState.RUNNING, days_ago=9)
    first = saved(history, 10)
    history.save(hanging.summary())
    made = saved(history, 8, 2, 0)
    history.prune(timedelta(days=5), at_least=1)
    assert recorded_ids(history) == [hanging.id, *made[1:]]
    assert first[0] not in recorded_ids(history)


def test_the_plans_of_expired_runs_are_deleted(history: History) -> None:
    other = plan_for([consumer("2", "bob")], observed())
    old, new = run(days_ago=7), run()
    history.save(old.summary(), other)
    history.save(new.summary(), new.plan)
    history.prune(timedelta(days=5), at_least=1)
    assert plans_in(history) == 1
    found = history.run(new.id)
    assert found is not None
    assert found["plan"]["summary"]["create-customer"] == 1


def test_a_recorder_uses_the_current_retention_setting(history: History) -> None:
    keep = [timedelta(days=90)]
    recorder = HistoryRecorder(history, lambda: keep[0])
    made = saved(history, *(7 - number / 20 for number in range(120)))
    recorder.finished(run())
    assert len(recorded_ids(history)) == 121
    keep[0] = timedelta(days=3)
    recorder.finished(run())
    assert len(recorded_ids(history)) == 100
    assert not set(made[:20]) & set(recorded_ids(history))


START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = st.floats(0, 8).map(lambda days: timedelta(days=days))


def times(steps: list[timedelta]) -> list[datetime]:
    """The times of runs with these steps between them."""
    return list(itertools.accumulate(steps, lambda time, step: time + step, initial=START))


@given(st.lists(DAYS), DAYS.map(lambda days: 4 * days))
def test_with_a_right_clock_exactly_the_old_runs_expire(steps: list[timedelta], keep: timedelta) -> None:
    asked = times(steps)
    assert count_expired(asked, keep) == sum(asked[-1] - time > keep for time in asked)


OFF = st.integers(-40_000, 40_000).map(lambda number: timedelta(days=17 * number))
"""Error of a clock; each time it is set, it jumps by more than twice `MAX_RUN_GAP`."""


@given(st.lists(st.tuples(DAYS, st.none() | OFF)), DAYS.map(lambda days: 4 * days))
def test_a_clock_that_is_far_off_at_times_expires_no_more_than_a_right_one(
    steps: list[tuple[timedelta, timedelta | None]], keep: timedelta
) -> None:
    true = times([step for step, _ in steps])
    wrong, off = true[:1], timedelta(0)
    for time, (_, reset) in zip(true[1:], steps, strict=True):
        off = off if reset is None else reset
        wrong.append(time + off)
    assert count_expired(wrong, keep) <= count_expired(true, keep)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-3.5, 3.5))), DAYS.map(lambda days: 4 * days))
def test_a_clock_that_is_a_little_off_ages_runs_by_at_most_that_much(
    steps: list[tuple[float, float]], keep: timedelta
) -> None:
    true = times([timedelta(days=step) for step, _ in steps])
    wrong = [true[0], *(time + timedelta(days=off) for time, (_, off) in zip(true[1:], steps, strict=True))]
    assert count_expired(wrong, keep + timedelta(days=7)) <= count_expired(true, keep)


def test_equal_plans_are_stored_once(history: History) -> None:
    for _ in range(3):
        one = run()
        history.save(one.summary(), one.plan)
    assert plans_in(history) == 1


def test_a_run_whose_process_was_killed_is_closed_by_the_next_writer(history: History) -> None:
    dead = run(state=RunState.RUNNING)
    history.save(dead.summary(), dead.plan)
    history.record(dead.id, 1, [Outcome(PLAN.changes[0], Status.DONE)])
    assert history.close_interrupted() == [dead.id]
    found = history.run(dead.id)
    assert found is not None
    assert found["state"] == "failed"
    assert "interrupted" in found["error"]
    assert found["outcomes"]["done"] == 1
    assert history.close_interrupted() == []


def test_a_change_is_recorded_before_it_is_made_and_its_outcome_replaces_that(history: History) -> None:
    plan = plan_for([consumer("1", "alice"), consumer("2", "bob")], observed(subjects=()))
    one = replace(run(state=RunState.RUNNING), plan=plan)
    recorder = HistoryRecorder(history, lambda: timedelta(days=1))
    recorder.started(one)
    recorder.planned(one)
    recorder.begun(one, plan.changes)
    recorder.changed(one, [Outcome(plan.changes[0], Status.DONE), Outcome(plan.changes[3], Status.BLOCKED)])
    history.close_interrupted()
    found = history.run(one.id)
    assert found is not None
    seen = [(result["status"], result["change"]["subject_keys"]) for result in found["results"]]
    assert seen[:2] == [("done", ["consumer:1"]), ("blocked", ["consumer:2"])]
    assert sorted(seen[2:]) == [("begun", ["consumer:1"]), ("begun", ["consumer:2"])]
    assert "may have been made or not" in found["results"][2]["detail"]


def test_a_dry_run_of_another_process_is_not_closed_because_it_holds_no_lock(history: History) -> None:
    dry = replace(run(state=RunState.RUNNING), options=RunOptions(dry_run=True))
    history.save(dry.summary(), dry.plan)
    assert history.close_interrupted() == []
    found = history.run(dry.id)
    assert found is not None
    assert found["state"] == "running"


def test_a_state_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"daemon\.state_dir"):
        State(StateLocation(tmp_path / "file"))
    with pytest.raises(LockedError, match=r"daemon\.state_dir"), file_lock(tmp_path / "file", "x"):
        pass


HOLD = """
import sys, pathlib
from syncd.runs.lock import file_lock
with file_lock(pathlib.Path(sys.argv[1]), "syncd apply"):
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


def test_the_error_of_the_second_writer_names_the_holder_of_the_lock(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    said = rf"another syncd is writing: syncd apply \(process {holder.pid}, since"
    with pytest.raises(LockedError, match=said), file_lock(tmp_path, "syncd run", patience=0):
        pass


def test_a_writer_waits_for_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    def release(_seconds: float) -> None:
        assert holder.stdin is not None
        if not holder.stdin.closed:
            holder.stdin.close()
        holder.wait(10)

    with file_lock(tmp_path, "syncd run", patience=10, sleep=release):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with file_lock(tmp_path, "syncd run", patience=0):
        pass


def test_a_stop_ends_the_wait_for_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(LockedError),
        file_lock(tmp_path, "syncd run", patience=60, should_stop=lambda: True),
    ):
        pass


def test_history_shows_runs_as_text_and_json(tmp_path: Path) -> None:
    with running_sandbox() as url:
        project = Project(tmp_path, url)
        assert "No runs yet" in project.call("history").stdout
        project.call("apply", "--yes")
        (tmp_path / "kong.yml").write_text("")
        assert project.call("apply", "--yes").returncode == 1
        listed = json.loads(project.call("history", "-ojson").stdout)
        assert [entry["state"] for entry in listed] == ["failed", "succeeded"]
        assert "kong.yml" in listed[0]["error"]
        shown = project.call("history", listed[1]["id"][:6]).stdout
        assert "create-customer  acme" in shown
        assert "Planned: 2 create-customer" in shown
        assert len(json.loads(project.call("history", listed[1]["id"], "-ojson").stdout)["results"]) == 5
        assert project.call("history", "nope").returncode == 1
        assert httpx.get(f"{url}/api/v1/customers").json()["totalCount"] == 2


def test_the_changes_of_a_customer_are_found_in_all_runs_the_latest_first(history: History) -> None:
    first, second = run(), run()
    ours = PLAN.changes[0]
    other = replace(ours, customer_key="other")
    for one in (first, second):
        history.save(one.summary(), one.plan)
    history.record(first.id, 1, [Outcome(ours, Status.BLOCKED, "409"), Outcome(other, Status.DONE)])
    history.record(second.id, 1, [Outcome(ours, Status.DONE)])
    assert ours.customer_key is not None
    found = history.changes_of(ours.customer_key, 10)
    assert [(one["run"], one["status"]) for one in found] == [(second.id, "done"), (first.id, "blocked")]
    assert found[1]["detail"] == "409"
    assert found[0]["change"]["subject_keys"] == list(ours.subject_keys)
    assert len(history.changes_of(ours.customer_key, 1)) == 1
    entity = replace(ours, kind=ChangeKind.UPSERT_SUBJECT)
    history.record(second.id, 2, [Outcome(entity, Status.DONE), Outcome(entity, Status.SKIPPED, "first")])
    newest = history.changes_of(ours.customer_key, 10)[0]
    assert (newest["change"]["kind"], newest["status"]) == ("upsert-subject", "skipped"), "not that it worked"
    assert len(history.changes_of(ours.customer_key, 10)) == 3
