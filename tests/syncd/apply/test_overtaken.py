"""Changes whose premises no longer hold when they are applied: they are not made."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from syncd.apply.executor import apply_plan
from syncd.core.changes import Outcome, Plan
from syncd.core.model import ObservedCustomer, ObservedState, ObservedSubject, Principal
from syncd.core.ownership import ownership_metadata, timestamp
from syncd.core.policy import Policy
from syncd.mapping.rules import MappingRules
from syncd.metering.base import Decide
from syncd.planning.orphans import Grace
from syncd.planning.plan import PlanOptions
from tests.syncd.builders import BY_TAG, OWNER, RULES, consumer, customer, lines, observed, plan_for, replace
from tests.syncd.memory_target import MemoryTarget

START = datetime(2026, 1, 1, tzinfo=UTC)
ALICE = consumer("1", "alice", "customer:acme")
OLD = customer("globex", "consumer:1", "consumer:2", owner=OWNER)
ACME = customer("acme", owner=OWNER)
BOB = consumer("2", "bob", "customer:globex")


def statuses(outcomes: tuple[Outcome, ...]) -> list[str]:
    return [f"{outcome.change.kind} {outcome.status}" for outcome in outcomes]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(ACME, active_subscription="SUB"), "active subscription"),
        (replace(ACME, metadata=ownership_metadata("someone", "acme")), "now belongs to"),
    ],
)
def test_a_subject_is_not_detached_if_its_new_customer_can_no_longer_get_it(
    now: ObservedCustomer, said: str
) -> None:
    target = MemoryTarget(observed(OLD, ACME))
    plan = plan_for([ALICE, BOB], target.observe(), rules=BY_TAG, options=PlanOptions(allow_move=True))
    assert lines(plan) == ["move-subjects globex consumer:1", "attach-subjects acme consumer:1"]
    target.customers[ACME.id] = now
    outcomes = apply_plan(plan, target)
    assert statuses(outcomes) == ["move-subjects blocked", "attach-subjects skipped"]
    assert said in outcomes[0].detail
    assert target.writes == 0


def test_the_entity_of_a_subject_that_stays_attached_is_not_deleted() -> None:
    gone = customer("acme", "consumer:1", owner=OWNER, metadata={"orphaned-at": timestamp(START)})
    entity = ObservedSubject("consumer:1", "alice", ownership_metadata(OWNER, "1"))
    there = observed(gone, subjects=(entity,))
    for delete_after in (None, timedelta(days=40)):
        target = MemoryTarget(there)
        plan = _late_plan([], there, delete_after)
        assert lines(plan)[-1] == "delete-subject - consumer:1"
        target.customers[gone.id] = replace(gone, active_subscription="SUB")
        outcomes = apply_plan(plan, target, remover=target)
        assert [str(outcome.status) for outcome in outcomes] == ["blocked", "skipped"]
        assert target.writes == 0
        assert target.subjects() == (entity,)


def _late_plan(principals: list[Principal], there: ObservedState, delete_after: timedelta | None) -> Plan:
    grace = Grace(START + timedelta(days=100), timedelta(days=40), delete_after)
    return plan_for(principals, there, policy="sync", options=PlanOptions(grace=grace))


def test_a_customer_that_another_syncd_created_for_another_principal_is_not_mistaken_for_ours() -> None:
    """It has the wanted key and subjects, but belongs to another principal."""
    target = MemoryTarget(observed())
    plan = plan_for([consumer("1", "alice")], target.observe(), rules=BY_TAG)
    same = customer("consumer:1", "consumer:1", owner=OWNER, metadata={"source-id": "another"})
    target.customers[same.id] = same
    outcomes = apply_plan(plan, target)
    assert statuses(outcomes) == ["create-customer blocked"]
    assert "was created since the plan was made and differs" in outcomes[0].detail
    assert target.customers == {same.id: same}


MARKED = {"orphaned-at": timestamp(START)}
PLANS: dict[str, tuple[list[Principal], ObservedState, MappingRules, Policy, PlanOptions | None]] = {
    "move-subjects": ([ALICE, BOB], observed(OLD, ACME), BY_TAG, "upsert-only", PlanOptions(allow_move=True)),
    "attach-subjects": ([ALICE], observed(ACME), BY_TAG, "upsert-only", None),
    "rename-customer": (
        [consumer("1", "alice")],
        observed(customer("consumer:1", "consumer:1", owner=OWNER)),
        RULES,
        "upsert-only",
        None,
    ),
    "mark-orphaned": ([], observed(OLD), BY_TAG, "sync", None),
    "delete-customer": (
        [],
        observed(customer("consumer:1", "consumer:1", owner=OWNER, metadata=MARKED)),
        RULES,
        "sync",
        PlanOptions(grace=Grace(START + timedelta(days=100), timedelta(days=40), timedelta(days=40))),
    ),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("lacks", ["subject", "metadata", "name"])
def test_no_change_is_made_on_another_state_of_its_customer_than_the_plan_was_made_on(
    kind: str, lacks: str
) -> None:
    """A server that lags behind shows an old state, and an edit would bring that state back."""
    principals, there, rules, policy, options = PLANS[kind]
    plan = plan_for(principals, there, rules=rules, policy=policy, options=options)
    (change,) = (change for change in plan.changes if str(change.kind) == kind)
    target = MemoryTarget(there)
    old = target.customers[change.customer_id or ""]
    seen = {
        "subject": replace(old, subject_keys=(*old.subject_keys, "mobile")),
        "metadata": replace(old, metadata={**old.metadata, "orphaned-at-1": "none"}),
        "name": replace(old, name="Renamed"),
    }[lacks]
    outcomes = apply_plan(plan, target, seen=[seen], remover=target)
    (outcome,) = (outcome for outcome in outcomes if outcome.change == change)
    assert outcome.status == "blocked"
    assert "not as it was when the plan was made" in outcome.detail
    assert target.customers[old.id] == old


def test_a_moved_subject_does_not_count_as_attached_because_an_old_state_of_its_customer_shows_it() -> None:
    plan = plan_for([ALICE, BOB], observed(OLD, ACME), rules=BY_TAG, options=PlanOptions(allow_move=True))
    target = MemoryTarget(observed(OLD, replace(ACME, subject_keys=("consumer:1",))))
    outcomes = apply_plan(plan, target, seen=[OLD, ACME])
    assert statuses(outcomes) == ["move-subjects done", "attach-subjects blocked"]
    assert "could not be put back" in outcomes[1].detail


def test_changes_of_one_customer_expect_what_the_ones_before_them_have_written() -> None:
    late = replace(ACME, name="acme", metadata={**ACME.metadata, **MARKED})
    for forgets in (False, True):
        target = MemoryTarget(observed(late))
        plan = plan_for([ALICE], target.observe(), rules=BY_TAG, policy="sync")
        assert lines(plan) == ["unmark-orphaned acme", "attach-subjects acme consumer:1"]
        if forgets:
            target = _Forgetful(observed(late))
        outcomes = apply_plan(plan, target, seen=[late])
        expected = ["unmark-orphaned done", f"attach-subjects {'blocked' if forgets else 'done'}"]
        assert statuses(outcomes) == expected


class _Forgetful(MemoryTarget):
    """Reads each customer as it was at the start."""

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        self.customers[customer_id] = next(c for c in self.first if c.id == customer_id)
        return super().edit_customer(customer_id, decide)

    def __init__(self, state: ObservedState) -> None:
        super().__init__(state)
        self.first = state.customers


def test_a_subject_entity_that_a_person_has_taken_over_meanwhile_is_not_deleted() -> None:
    entity = ObservedSubject("consumer:1", "alice", ownership_metadata(OWNER, "1"))
    target = MemoryTarget(observed(subjects=(entity,)))
    plan = _late_plan([], target.observe(), None)
    assert lines(plan) == ["delete-subject - consumer:1"]
    theirs = replace(entity, metadata={"crm": "7"})
    target = MemoryTarget(observed(subjects=(theirs,)))
    (outcome,) = apply_plan(plan, target, remover=target)
    assert outcome.status == "blocked"
    assert "belongs to someone else" in outcome.detail
    assert target.subjects() == (theirs,)
