"""Views of runs and plans."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.dashboard.unbilled_view import unbilled
from syncd.dashboard.views import apply_form, drift, latest_full_run, page_of, run_line
from syncd.planning.guards import Scope
from syncd.runs.options import RunOptions
from syncd.runs.run import Run, RunState
from tests.syncd.dashboard.plans import ATTACH, CREATE, NOW, STUCK, plan, run


def outcome_of(found: Run) -> tuple[str, str]:
    line = run_line(found.summary(), NOW)
    return line.level, line.outcome


@pytest.mark.parametrize(
    ("found", "level", "outcome"),
    [
        (run(None, state=RunState.QUEUED), "busy", "queued"),
        (run(None, state=RunState.RUNNING), "busy", "running"),
        (run(None, state=RunState.FAILED, error="Kong is away"), "problem", "failed"),
        (run(plan(), dry=True), "ok", "in sync"),
        (run(plan(CREATE, ATTACH, STUCK), dry=True), "warning", "2 to do, 1 blocked"),
        (run(plan(Change(ChangeKind.UNMANAGED, "x", (), "")), dry=True), "ok", "in sync"),
        (run(plan()), "ok", "nothing to do"),
        (run(plan(CREATE), Outcome(CREATE, Status.DONE)), "ok", "1 done"),
        (
            run(plan(CREATE, STUCK), Outcome(CREATE, Status.DONE), Outcome(STUCK, Status.BLOCKED)),
            "warning",
            "1 done, 1 blocked",
        ),
    ],
)
def test_a_run_shows_its_level_and_outcome(found: Run, level: str, outcome: str) -> None:
    assert outcome_of(found) == (level, outcome)


def test_the_duration_of_an_unfinished_run_lasts_until_now() -> None:
    assert run_line(run(None, state=RunState.RUNNING).summary(), NOW).seconds == 9
    assert run_line(run(plan()).summary(), NOW).seconds == 4
    assert run_line(run(None, state=RunState.QUEUED).summary(), NOW).seconds is None


def test_the_options_of_a_run_are_shown_in_words() -> None:
    options = RunOptions(force=True, adopt=True, source="edge", principal="alice", reviewed=plan())
    line = run_line(replace(run(plan()), options=options).summary(), NOW)
    assert line.options == (
        "guards overridden",
        "adoptions allowed",
        "as reviewed",
        "source edge",
        "principal alice",
    )


def test_a_summary_of_an_older_history_has_fewer_options_and_can_be_shown() -> None:
    summary = run(plan()).summary()
    summary["options"] = {"dry_run": False}
    assert run_line(summary, NOW).options == ()


def test_the_drift_of_a_dry_run_is_its_plan() -> None:
    found = drift(run(plan(CREATE, ATTACH, STUCK), dry=True))
    assert found
    assert (found.to_do, found.blocked, found.level) == (2, 1, "warning")
    assert found.at == NOW - timedelta(seconds=5)


def test_what_a_run_has_done_is_no_longer_drift() -> None:
    done = (Outcome(CREATE, Status.DONE), Outcome(ATTACH, Status.UNCHANGED))
    found = drift(run(plan(CREATE, ATTACH), *done))
    assert found
    assert (found.to_do, found.blocked, found.level) == (0, 0, "ok")


def test_failed_changes_are_blocked_and_untried_changes_are_to_do() -> None:
    found = drift(
        run(plan(CREATE, ATTACH, STUCK), Outcome(CREATE, Status.BLOCKED, "409"), state=RunState.FAILED)
    )
    assert found
    assert (found.to_do, found.blocked) == (1, 2)


def test_a_plan_that_is_being_applied_says_so() -> None:
    found = drift(run(plan(CREATE), state=RunState.RUNNING))
    assert found
    assert (found.applying, found.level) == (True, "busy")


def test_without_a_plan_the_drift_is_unknown() -> None:
    assert drift(None) is None
    assert drift(run(None, state=RunState.FAILED)) is None


def test_the_latest_plan_covers_all_principals() -> None:
    whole = run(plan(CREATE))
    part = run(plan(), scope=Scope("edge"))
    failed = run(None, state=RunState.FAILED)
    assert latest_full_run([failed, part, whole]) is whole
    assert latest_full_run([failed, part]) is None


def test_without_meters_unbilled_usage_is_unknown() -> None:
    assert unbilled(run(plan(CREATE))) is None
    assert unbilled(None) is None


def offered(made: Plan | None, **fields: object) -> object:
    found = run(made, **{"dry": True, **fields})  # type: ignore[arg-type]
    return apply_form(run_line(found.summary(), NOW), found.plan)


def test_a_dry_run_with_something_to_do_can_be_applied() -> None:
    found = apply_form(run_line(run(plan(CREATE, STUCK), dry=True).summary(), NOW), plan(CREATE, STUCK))
    assert found
    assert (found.changes, found.guard, found.can_force) == (1, None, False)


def test_no_other_run_can_be_applied() -> None:
    assert offered(plan(STUCK)) is None
    assert offered(plan(CREATE), dry=False) is None
    assert offered(plan(CREATE), state=RunState.RUNNING) is None
    assert offered(plan(CREATE), state=RunState.FAILED) is None
    assert offered(None) is None


@pytest.mark.parametrize(
    ("said", "can_force"),
    [
        ("too many removals: 12 of 20 ... if this is intended, pass --force", True),
        ("the plan has 12 changes, and guards.max_changes allows 10 in one run", False),
    ],
)
def test_a_guard_is_shown_and_can_be_overridden_only_where_allowed(said: str, can_force: bool) -> None:
    made = plan(CREATE, notes=("another note", f"apply would stop: {said}"))
    found = apply_form(run_line(run(made, dry=True).summary(), NOW), made)
    assert found
    assert (found.guard, found.can_force) == (said, can_force)


@pytest.mark.parametrize(
    ("total", "asked", "number", "last", "place"),
    [
        (0, 1, 1, 1, "0 to 0 of 0"),
        (10, 1, 1, 1, "1 to 10 of 10"),
        (11, 2, 2, 2, "11 to 11 of 11"),
        (1204, 999, 121, 121, "1,201 to 1,204 of 1,204"),
    ],
)
def test_pages_are_counted(total: int, asked: int, number: int, last: int, place: str) -> None:
    pages = page_of(total, asked, 10)
    assert (pages.number, pages.last, pages.place) == (number, last, place)
    assert len(pages.cut(range(total))) <= 10
