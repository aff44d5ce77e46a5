"""Views of unbilled usage."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from syncd.core.changes import Cause, Outcome, Status
from syncd.core.unbilled import UnbilledSubject
from syncd.dashboard.unbilled_view import unbilled
from tests.syncd.dashboard.plans import CREATE, STUCK, UNBILLED, plan, run


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
    assert (groups[0].option, groups[0].preview) == ("allow_move", True)


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


def test_what_people_have_decided_is_shown_apart_and_is_no_warning() -> None:
    decided = replace(STUCK, settled=True, cause=Cause.SUBSCRIPTION, fact="subscription S")
    only = replace(UNBILLED, subjects=(UnbilledSubject("s3", 20, 0, "settled"),))
    found = unbilled(run(plan(decided, unbilled=only), dry=True))
    assert found
    assert (found.subjects[0].status, found.level, found.count("settled")) == ("settled", "ok", 1)
    (group,) = found.groups(found.by_cause)
    assert (group.option, group.preview) == (None, False), "no option of a run changes it"
