"""Views of runs and plans."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from syncd.core.changes import Cause, Change, ChangeKind, EntityState, Outcome, Plan, Status
from syncd.core.unbilled import UnbilledSubject, UnbilledUsage
from syncd.dashboard.views import apply_form, drift, latest_full_run, page_of, run_line, unbilled
from syncd.planning.scope import Scope
from syncd.runs.options import RunOptions
from syncd.runs.run import Run, RunState

NOW = datetime(2026, 11, 22, 7, 0, tzinfo=UTC)
CREATE = Change(
    ChangeKind.CREATE_CUSTOMER, "a", ("s1",), "new: consumer alice", after=EntityState("A", ("s1",))
)
ATTACH = Change(ChangeKind.ATTACH_SUBJECTS, "b", ("s2",), "new in this customer", "2")
STUCK = Change(ChangeKind.BLOCKED, "c", ("s3",), "c has an active subscription", "3")
UNBILLED = UnbilledUsage(
    (
        UnbilledSubject("s1", 100, 5, "planned"),
        UnbilledSubject("s3", 20, 0, "blocked"),
        UnbilledSubject("gone", 3, 0, "unknown"),
    ),
    "2026-10-22T00:00:00Z",
    "2026-11-01T00:00:00Z",
)


def plan(*changes: Change, notes: tuple[str, ...] = (), unbilled: UnbilledUsage | None = None) -> Plan:
    return Plan("default", "upsert-only", changes, notes, unbilled)


def run(
    made: Plan | None,
    *outcomes: Outcome,
    dry: bool = False,
    state: RunState = RunState.SUCCEEDED,
    scope: Scope | None = None,
    error: str | None = None,
) -> Run:
    started = None if state is RunState.QUEUED else NOW - timedelta(seconds=9)
    finished = None if state in (RunState.QUEUED, RunState.RUNNING) else NOW - timedelta(seconds=5)
    chosen = scope or Scope()
    options = RunOptions(dry_run=dry, source=chosen.source, principal=chosen.principal)
    times = (NOW - timedelta(seconds=10), state, started, finished)
    return Run("r", "manual", options, *times, error, made, outcomes)


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


def test_each_unbilled_subject_has_its_reason() -> None:
    found = unbilled(run(plan(CREATE, STUCK, unbilled=UNBILLED), dry=True))
    assert found
    assert [(s.key, s.status) for s in found.subjects] == [
        ("s1", "planned"),
        ("s3", "blocked"),
        ("gone", "unknown"),
    ]
    reasons = [subject.reason for subject in found.subjects]
    assert reasons[0] == "The next run attributes it to customer a: new: consumer alice."
    assert reasons[1] == "c has an active subscription"
    assert "No source names this subject" in reasons[2]
    assert (found.events, found.tokens, found.count("blocked")) == (123, 5, 1)
    assert found.since == datetime(2026, 11, 1, tzinfo=UTC)


def test_unbilled_subjects_are_grouped_by_cause_the_largest_first_with_the_figures_of_all() -> None:
    stuck = replace(STUCK, subject_keys=("b1", "b2"), names=("bob", "bert"), cause=Cause.ELSEWHERE, fact="f")
    stuck = replace(stuck, reason="pass --allow-move")
    subjects = (
        UnbilledSubject("s1", 100, 0, "planned"),
        UnbilledSubject("gone", 3, 0, "unknown"),
        UnbilledSubject("b1", 2, 0, "blocked"),
        UnbilledSubject("b2", 2, 0, "blocked"),
    )
    found = unbilled(run(plan(CREATE, stuck, unbilled=replace(UNBILLED, subjects=subjects)), dry=True))
    assert found
    assert [row.key for row in found.by_cause] == ["b1", "b2", "gone", "s1"]
    groups = found.groups(found.by_cause[:1])
    assert [(group.heading, group.count, group.events) for group in groups] == [
        ("Another customer has the subject", 2, 4)
    ]
    assert (groups[0].rows[0].name, groups[0].rows[0].fact) == ("bob", "f")
    assert groups[0].cure.startswith("Pass --allow-move")
    assert groups[0].option == "Move subjects between managed customers"


def test_usage_that_the_run_has_attributed_is_no_longer_unbilled() -> None:
    found = unbilled(run(plan(CREATE, STUCK, unbilled=UNBILLED), Outcome(CREATE, Status.DONE)))
    assert found
    assert [subject.key for subject in found.subjects] == ["s3", "gone"]
    assert found.events == 23


def test_usage_that_the_run_failed_to_attribute_is_blocked_with_the_answer() -> None:
    found = unbilled(run(plan(CREATE, unbilled=UNBILLED), Outcome(CREATE, Status.BLOCKED, "key in use")))
    assert found
    assert (found.subjects[0].status, found.subjects[0].reason) == ("blocked", "key in use")


def test_usage_that_the_next_run_attributes_is_no_warning() -> None:
    only_planned = replace(UNBILLED, subjects=UNBILLED.subjects[:1])
    calm = unbilled(run(plan(CREATE, unbilled=only_planned), dry=True))
    alarm = unbilled(run(plan(CREATE, unbilled=UNBILLED), dry=True))
    assert calm
    assert alarm
    assert (calm.level, alarm.level) == ("ok", "warning")


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
