"""The order of the passes over a plan: each sees what the ones before it decided."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from syncd.core.changes import REMOVALS, ChangeKind, Plan
from syncd.core.ownership import ORPHANED_AT, timestamp
from syncd.mapping.desired_state import desired_state
from syncd.metering.base import Inspection
from syncd.planning.guards import Limits
from syncd.planning.orphans import Grace
from syncd.runs.options import RunOptions
from syncd.runs.passes import PASSES, WOULD_STOP, BothSides, PlanRules, Situation
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, observed
from tests.syncd.memory_target import MemoryTarget

NOW = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)
ORPHANED = {ORPHANED_AT: timestamp(NOW - 90 * DAY)}
IGNORED = "consumer:healthcheck"


class Billing(MemoryTarget):
    """One of its customers has an entitlement; all subjects have usage."""

    def inspect(self, customer_id: str) -> Inspection:
        return Inspection(entitlements=("gpt",) if customer_id == "id-kept" else ())

    def usage(self, meter: str, since: str | None, until: str | None) -> dict[str, float]:
        return {"consumer:kept": 7.0, "consumer:gone": 5.0, IGNORED: 3.0}


def situation(*, empty: tuple[str, ...] = (), skew: timedelta = timedelta(0)) -> Situation:
    people = [
        consumer("alice", "alice", "customer:acme"),
        consumer("healthcheck", "healthcheck", "customer:theirs"),
        consumer("moved", "moved", "customer:new"),
    ]
    state = observed(
        customer("kept", "consumer:kept", owner=OWNER, metadata=ORPHANED),
        customer("gone", "consumer:gone", owner=OWNER, metadata=ORPHANED),
        customer("theirs"),
        customer("old", "consumer:moved", owner=OWNER),
    )
    desired = replace(desired_state(people, BY_TAG), warnings=("a name is too long",))
    rules = PlanRules(
        BY_TAG,
        "sync",
        Grace(NOW, 30 * DAY, 60 * DAY),
        Limits(min_changes=1, max_removal_percent=0),
        ignored={IGNORED: "monitoring", "consumer:moved": "a decision is due"},
    )
    read, target = BothSides(people, empty, desired, state), Billing(state)
    return Situation(read, rules, RunOptions(dry_run=True), target, target, lambda: skew)


def passed(there: Situation) -> Plan:
    plan = there.plan()
    for one in PASSES:
        plan = one(plan, there)
    return plan


def removed(plan: Plan) -> list[str | None]:
    return [change.customer_key for change in plan.changes if change.kind in REMOVALS]


def test_a_customer_that_has_to_stay_leaves_warnings_guards_and_usage_in_the_plan() -> None:
    plan = passed(situation())
    assert removed(plan) == ["gone"]
    assert all(change.settled for change in plan.of(ChangeKind.BLOCKED))
    assert "a name is too long" in plan.notes
    assert any(note.startswith(WOULD_STOP) for note in plan.notes)
    (change,) = plan.of(ChangeKind.DELETE_CUSTOMER)
    assert change.usage is not None
    assert change.usage.events == 5


def test_a_wrong_clock_removes_nothing_and_no_guard_counts_what_it_withheld() -> None:
    plan = passed(situation(skew=timedelta(hours=1)))
    assert removed(plan) == []
    assert "a name is too long" in plan.notes
    assert not any(note.startswith(WOULD_STOP) for note in plan.notes)


def test_an_empty_source_removes_nothing_and_no_guard_counts_what_it_withheld() -> None:
    plan = passed(situation(empty=("kong-admin-0",)))
    assert removed(plan) == []
    assert not any(note.startswith(WOULD_STOP) for note in plan.notes)
    assert any("returned no principals" in change.reason for change in plan.of(ChangeKind.BLOCKED))


def test_what_is_blocked_for_an_ignored_subject_is_settled_and_all_else_is_not() -> None:
    there = situation(empty=("kong-admin-0",))
    assert not all(change.settled for change in there.plan().of(ChangeKind.BLOCKED))
    plan = passed(there)
    settled = {change.subject_keys: change.settled for change in plan.of(ChangeKind.BLOCKED)}
    assert (settled[IGNORED,], settled["consumer:moved",]) == (True, True)
    assert not settled[()], "the empty source is for people to look at"
    assert plan.unbilled is not None
    assert [subject.key for subject in plan.unbilled.ignored] == [IGNORED]


def test_a_principal_selects_its_changes_before_anything_is_released_or_counted() -> None:
    there = situation()
    chosen = replace(there.options, principal="alice")
    plan = passed(replace(there, options=chosen))
    assert {change.customer_key for change in plan.actionable} == {"acme"}
    assert not any(note.startswith(WOULD_STOP) for note in plan.notes)
