"""Retirements: a subject that is its own customer's key joins a group, so that customer is deleted first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from syncd.apply.executor import apply_plan
from syncd.core.changes import ChangeKind, Outcome, Plan, Status
from syncd.core.errors import RefusedError
from syncd.core.model import CustomerDetails, ObservedCustomer, Principal
from syncd.core.ownership import ADOPTED
from syncd.core.policy import Policy
from syncd.planning.plan import PlanOptions
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, lines, observed, plan_for
from tests.syncd.memory_target import MemoryTarget

RETIRE = PlanOptions(allow_retire=True)
ALONE = consumer("1", "alice")
ALICE = consumer("1", "alice", "customer:acme")
BOB = consumer("2", "bob", "customer:acme")
OWN = customer("consumer:1", "consumer:1", name="alice", owner=OWNER)
ACME = customer("acme", "consumer:2", owner=OWNER)


def planned(
    *customers: ObservedCustomer, options: PlanOptions | None = RETIRE, policy: Policy = "upsert-only"
) -> Plan:
    return plan_for([ALICE, BOB], observed(*customers), rules=BY_TAG, options=options, policy=policy)


def carried(target: MemoryTarget) -> dict[str | None, tuple[str, ...]]:
    return {customer.key: customer.subject_keys for customer in target.customers.values()}


def test_the_customer_is_deleted_and_its_subject_attached_to_the_group() -> None:
    plan = planned(OWN, ACME)
    assert lines(plan) == ["retire-customer consumer:1 consumer:1", "attach-subjects acme consumer:1"]
    assert plan.changes[0].to_customer_key == "acme"
    target = MemoryTarget(observed(OWN, ACME))
    outcomes = apply_plan(plan, target, remover=target)
    assert {outcome.status for outcome in outcomes} == {Status.DONE}
    assert carried(target) == {"acme": ("consumer:2", "consumer:1")}


def test_a_group_that_does_not_exist_yet_is_created_with_the_subject() -> None:
    target = MemoryTarget(observed(OWN))
    plan = planned(OWN)
    assert lines(plan) == [
        "retire-customer consumer:1 consumer:1",
        "create-customer acme consumer:1 consumer:2",
    ]
    apply_plan(plan, target, remover=target)
    assert carried(target) == {"acme": ("consumer:1", "consumer:2")}


def test_a_customer_that_has_the_subject_only_as_its_key_is_retired_too() -> None:
    assert lines(planned(replace(OWN, subject_keys=()), ACME))[0] == "retire-customer consumer:1 consumer:1"


@pytest.mark.parametrize("options", [None, PlanOptions(allow_move=True)])
def test_without_its_own_flag_nothing_is_deleted_and_the_plan_says_what_to_do(
    options: PlanOptions | None,
) -> None:
    plan = planned(OWN, ACME, options=options)
    assert lines(plan) == ["blocked acme consumer:1"]
    assert "--allow-retire" in plan.changes[0].reason
    assert "delete customer 'consumer:1' by hand" in plan.changes[0].reason


def test_a_customer_that_its_subject_can_leave_is_not_retired() -> None:
    own = customer("consumer-1", "consumer:1", name="alice", owner=OWNER)
    plan = planned(own, ACME)
    assert lines(plan) == ["blocked acme consumer:1"]
    assert "--allow-move" in plan.changes[0].reason
    both = planned(own, ACME, options=PlanOptions(allow_retire=True, allow_move=True))
    assert [str(change.kind) for change in both.actionable] == ["move-subjects", "attach-subjects"]


def test_policy_create_only_retires_no_customer() -> None:
    assert planned(OWN, ACME, policy="create-only").actionable == ()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (replace(OWN, active_subscription="S1"), "S1"),
        (replace(OWN, metadata={**OWN.metadata, ADOPTED: "true"}), "adopted"),
        (replace(OWN, subject_keys=("consumer:1", "by-hand")), "by-hand"),
    ],
)
def test_a_customer_that_has_anything_else_stays(own: ObservedCustomer, says: str) -> None:
    plan = planned(own, ACME)
    assert lines(plan) == ["blocked acme consumer:1"]
    assert says in plan.changes[0].reason
    assert "--allow-retire" not in plan.changes[0].reason


def test_an_unmanaged_customer_stays() -> None:
    for metadata in ({}, {"managed-by": "kong-openmeter", "sync-owner": "north"}):
        plan = planned(replace(OWN, metadata=metadata), ACME)
        assert lines(plan) == ["unmanaged consumer:1 consumer:1"]


def test_a_customer_that_must_stay_is_not_retired_and_the_plan_says_why() -> None:
    plan = planned(OWN, ACME, options=replace(RETIRE, undeletable={OWN.id: "it has credits"}))
    assert lines(plan) == ["blocked acme consumer:1"]
    assert "it has credits" in plan.changes[0].reason


def test_nothing_is_retired_for_a_customer_that_cannot_get_the_subject() -> None:
    for acme in (replace(ACME, active_subscription="S"), replace(ACME, metadata={})):
        plan = planned(OWN, acme)
        assert not plan.of(ChangeKind.RETIRE_CUSTOMER)


def test_a_retired_customer_is_no_orphan_in_the_same_plan() -> None:
    assert lines(planned(OWN, ACME, policy="sync")) == [
        "retire-customer consumer:1 consumer:1",
        "attach-subjects acme consumer:1",
    ]


def late(target: MemoryTarget, *changed: ObservedCustomer) -> tuple[Outcome, ...]:
    """Apply a plan to a state that has changed since."""
    plan = planned(OWN, ACME)
    for customer_ in changed:
        target.customers[customer_.id] = customer_
    return apply_plan(plan, target, remover=target)


@pytest.mark.parametrize(
    "changed",
    [
        replace(OWN, active_subscription="S"),
        replace(OWN, subject_keys=("consumer:1", "by-hand")),
        replace(OWN, metadata={**OWN.metadata, "sync-owner": "north"}),
        replace(ACME, active_subscription="S"),
        replace(ACME, metadata={}),
    ],
)
def test_a_customer_that_changed_since_the_plan_is_not_retired(changed: ObservedCustomer) -> None:
    target = MemoryTarget(observed(OWN, ACME))
    assert [outcome.status for outcome in late(target, changed)] == [Status.BLOCKED, Status.SKIPPED]
    assert target.writes == 0


def test_a_customer_that_someone_deleted_since_the_plan_is_planned_again() -> None:
    target = MemoryTarget(observed(OWN, ACME))
    del target.customers[OWN.id]
    assert late(target)[0].status is Status.BLOCKED
    plan = plan_for([ALICE, BOB], target.observe(), rules=BY_TAG)
    apply_plan(plan, target)
    assert carried(target) == {"acme": ("consumer:2", "consumer:1")}


class OneSubjectEach(MemoryTarget):
    """Refuses a second subject on a customer, as servers of the billing beta do."""

    def _require_free(self, new: ObservedCustomer) -> None:
        if len(new.subject_keys) > 1:
            raise RefusedError("no", status=400, detail="one subject only")
        super()._require_free(new)


@pytest.mark.parametrize("there", [(OWN, ACME), (OWN,)])
def test_a_retired_customer_is_recreated_if_the_group_refuses_its_subject(
    there: tuple[ObservedCustomer, ...],
) -> None:
    target = OneSubjectEach(observed(*there))
    details = CustomerDetails("a@x.example")
    plan = planned(*there)
    retired = replace(plan.changes[0], before=replace(plan.changes[0].before, details=details))  # type: ignore[type-var]
    outcome = apply_plan(replace(plan, changes=(retired, *plan.changes[1:])), target, remover=target)[-1]
    assert outcome.status is Status.BLOCKED
    assert "put back" in outcome.detail
    (again,) = (c for c in target.customers.values() if c.key == "consumer:1")
    assert replace(again, id=OWN.id) == OWN
    assert target.details[again.id] == details


def test_a_plan_with_a_retirement_survives_its_file() -> None:
    from syncd.planning import plan_file

    plan = planned(OWN, ACME)
    assert plan_file.from_json(plan.to_json()).checksum() == plan.checksum()


def test_a_consumer_that_leaves_the_group_gets_its_own_customer_again() -> None:
    target = MemoryTarget(observed(OWN, ACME))
    apply_plan(planned(OWN, ACME), target, remover=target)
    people: list[Principal] = [ALONE, BOB]
    options = PlanOptions(allow_move=True)
    apply_plan(plan_for(people, target.observe(), rules=BY_TAG, options=options), target)
    assert carried(target) == {"acme": ("consumer:2",), "consumer:1": ("consumer:1",)}
