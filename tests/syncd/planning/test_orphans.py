"""Orphans over time: marked, detached and deleted; and what each policy allows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from syncd.apply.executor import apply_plan
from syncd.core.changes import Change, ChangeKind, Plan, Status
from syncd.core.model import ObservedCustomer, ObservedState, ObservedSubject, Principal
from syncd.core.ownership import (
    is_label_value,
    newly_orphaned,
    orphaned_subjects,
    ownership_metadata,
    subject_digest,
    timestamp,
)
from syncd.core.policy import POLICIES, Policy
from syncd.planning.orphans import Grace, Obstacle
from syncd.planning.plan import PlanOptions
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, lines, plan_for, replace, static
from tests.syncd.memory_target import MemoryTarget

START = datetime(2026, 1, 1, tzinfo=UTC)
ALICE, BOB = consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme")
BOTH = customer("acme", "consumer:1", "consumer:2", owner=OWNER)


class Scenario:
    """A metering API, and a syncd with policy sync that runs on any day."""

    def __init__(
        self,
        *customers: ObservedCustomer,
        delete_after: int | None = None,
        subjects: tuple[ObservedSubject, ...] | None = None,
    ) -> None:
        self.target = MemoryTarget(ObservedState(customers, subjects))
        self.delete_after = None if delete_after is None else timedelta(days=delete_after)

    def plan(self, day: int, *principals: Principal, policy: Policy = "sync") -> Plan:
        grace = Grace(START + timedelta(days=day), timedelta(days=40), self.delete_after)
        options = PlanOptions(grace=grace)
        state = self.target.observe()
        return plan_for(list(principals), state, rules=BY_TAG, policy=policy, options=options)

    def sync(self, day: int, *principals: Principal) -> list[str]:
        plan = self.plan(day, *principals)
        outcomes = apply_plan(plan, self.target, remover=self.target)
        assert {o.status for o in outcomes if o.change.actionable} <= {Status.DONE}
        assert self.plan(day, *principals).actionable == ()
        return lines(plan)

    @property
    def subjects(self) -> list[tuple[str, ...]]:
        return [customer.subject_keys for customer in self.target.customers.values()]


def test_an_orphaned_subject_is_marked_then_waits_then_is_detached() -> None:
    scenario = Scenario(BOTH)
    assert scenario.sync(0, ALICE) == ["mark-orphaned acme consumer:2"]
    assert scenario.sync(39, ALICE) == ["orphaned acme consumer:2"]
    assert scenario.subjects == [("consumer:1", "consumer:2")]
    assert scenario.sync(40, ALICE) == ["detach-subjects acme consumer:2"]
    assert scenario.subjects == [("consumer:1",)]
    assert scenario.sync(41, ALICE) == []


def test_a_subject_that_comes_back_loses_its_mark_and_gets_a_new_grace_period() -> None:
    scenario = Scenario(BOTH)
    scenario.sync(0, ALICE)
    assert scenario.sync(30, ALICE, BOB) == ["unmark-orphaned acme"]
    assert scenario.sync(50, ALICE) == ["mark-orphaned acme consumer:2"]
    assert scenario.sync(60, ALICE) == ["orphaned acme consumer:2"]


def test_each_subject_has_a_grace_period_of_its_own() -> None:
    carol = consumer("3", "carol", "customer:acme")
    scenario = Scenario(customer("acme", "consumer:1", "consumer:2", "consumer:3", owner=OWNER))
    scenario.sync(0, ALICE, carol)
    scenario.sync(20, ALICE)
    assert scenario.sync(40, ALICE) == ["detach-subjects acme consumer:2", "orphaned acme consumer:3"]
    assert scenario.sync(60, ALICE) == ["detach-subjects acme consumer:3"]


def test_an_orphaned_customer_is_marked_then_loses_its_managed_subjects_and_stays() -> None:
    scenario = Scenario(customer("acme", "consumer:1", "by-hand", owner=OWNER))
    assert scenario.sync(0) == ["mark-orphaned acme consumer:1 by-hand"]
    assert scenario.sync(40) == ["detach-subjects acme consumer:1"]
    assert scenario.subjects == [("by-hand",)]
    assert scenario.sync(4000) == ["orphaned acme by-hand"]


def test_an_orphaned_customer_that_comes_back_is_as_before() -> None:
    scenario = Scenario(customer("acme", "consumer:1", owner=OWNER))
    scenario.sync(0)
    scenario.sync(40)
    assert scenario.sync(41, ALICE) == ["unmark-orphaned acme", "attach-subjects acme consumer:1"]
    assert scenario.sync(42) == ["mark-orphaned acme consumer:1"]
    assert scenario.sync(50) == ["orphaned acme consumer:1"]


def test_a_customer_is_deleted_only_by_the_further_setting_and_after_its_own_period() -> None:
    scenario = Scenario(customer("acme", "consumer:1", owner=OWNER), delete_after=100)
    scenario.sync(0)
    assert scenario.sync(40) == ["detach-subjects acme consumer:1"]
    assert scenario.sync(99) == ["orphaned acme"]
    assert scenario.sync(100) == ["delete-customer acme"]
    assert scenario.subjects == []


@pytest.mark.parametrize("subjects", [("by-hand",), ("consumer:1", "by-hand")])
def test_a_customer_with_subjects_of_others_is_never_deleted(subjects: tuple[str, ...]) -> None:
    scenario = Scenario(customer("acme", *subjects, owner=OWNER), delete_after=50)
    scenario.sync(0)
    scenario.sync(40)
    assert scenario.sync(4000) == ["orphaned acme by-hand"]
    assert "syncd does not manage" in scenario.plan(4000).changes[0].reason


def test_a_customer_whose_only_subject_is_its_own_key_is_deleted_where_there_are_no_entities() -> None:
    """As mapping.subject_field: username and mapping.key: "{subject}" make them."""
    scenario = Scenario(customer("alice", "alice", owner=OWNER), delete_after=50)
    assert scenario.sync(0) == ["mark-orphaned alice alice"]
    assert scenario.sync(40) == ["detach-subjects alice alice"]
    assert scenario.sync(50) == ["delete-customer alice"]


def test_a_group_keeps_a_subject_that_is_its_own_key() -> None:
    scenario = Scenario(customer("acme", "consumer:1", "acme", owner=OWNER))
    assert scenario.sync(0, ALICE) == []


@pytest.mark.parametrize("why", ["it has entitlements (f)", None])
def test_a_customer_that_must_stay_is_not_deleted(why: str | None) -> None:
    undeletable = {"id-acme": Obstacle(why)} if why else {}
    scenario = Scenario(customer("acme", "consumer:1", owner=OWNER), delete_after=40)
    scenario.sync(0)
    grace = Grace(START + timedelta(days=40), timedelta(days=40), timedelta(days=40))
    options = PlanOptions(grace=grace, undeletable=undeletable)
    plan = plan_for([], scenario.target.observe(), rules=BY_TAG, policy="sync", options=options)
    assert lines(plan) == [f"{'blocked' if why else 'delete-customer'} acme consumer:1"]
    assert (why or "delete_after") in plan.changes[0].reason


def test_an_adopted_customer_loses_nothing() -> None:
    adopted = customer("acme", "consumer:1", owner=OWNER, metadata={"adopted": "true"})
    scenario = Scenario(adopted, delete_after=50)
    assert scenario.sync(0) == ["orphaned acme consumer:1"]
    assert scenario.sync(4000) == ["orphaned acme consumer:1"]


@pytest.mark.parametrize("delete_after", [None, 50])
def test_a_subscription_blocks_what_is_due(delete_after: int | None) -> None:
    scenario = Scenario(
        customer("acme", "consumer:1", owner=OWNER, subscription="S1"), delete_after=delete_after
    )
    scenario.sync(0)
    (blocked,) = scenario.plan(60).changes
    assert blocked.kind is ChangeKind.BLOCKED
    assert "S1" in blocked.reason
    assert scenario.plan(60, policy="upsert-only").in_sync


def test_a_subscription_or_a_subject_that_came_since_the_plan_stops_the_deletion() -> None:
    for change in ({"active_subscription": "S"}, {"subject_keys": ("consumer:1", "by-hand")}):
        scenario = Scenario(customer("acme", "consumer:1", owner=OWNER), delete_after=40)
        scenario.sync(0)
        late = scenario.plan(40)
        there = scenario.target.customers["id-acme"]
        scenario.target.customers["id-acme"] = replace(there, **change)
        (outcome,) = apply_plan(late, scenario.target, remover=scenario.target)
        assert outcome.status is Status.BLOCKED
        assert scenario.subjects


def test_a_principal_that_came_back_since_the_plan_is_not_detached() -> None:
    scenario = Scenario(BOTH)
    scenario.sync(0, ALICE)
    late = scenario.plan(40, ALICE)
    scenario.sync(40, ALICE, BOB)
    (outcome,) = apply_plan(late, scenario.target)
    assert (outcome.status, outcome.detail) == (
        Status.BLOCKED,
        "its marks have changed since the plan was made; plan again",
    )


def test_the_entity_of_a_detached_subject_is_deleted_with_it_and_one_of_others_is_not() -> None:
    entities = tuple(
        ObservedSubject(key, None, metadata)
        for key, metadata in (
            ("consumer:1", ownership_metadata(OWNER, "acme")),
            ("consumer:2", ownership_metadata(OWNER, "acme")),
            ("consumer:3", {}),
        )
    )
    scenario = Scenario(BOTH, subjects=entities)
    scenario.sync(0, ALICE)
    assert scenario.sync(40, ALICE) == ["detach-subjects acme consumer:2", "delete-subject - consumer:2"]
    assert [entity.key for entity in scenario.target.subjects() or ()] == ["consumer:1", "consumer:3"]


def test_a_clock_that_jumps_back_detaches_nothing() -> None:
    scenario = Scenario(BOTH)
    scenario.sync(100, ALICE)
    assert scenario.sync(0, ALICE) == ["orphaned acme consumer:2"]


def test_a_mark_that_cannot_be_read_is_no_mark() -> None:
    broken = customer("acme", "consumer:1", owner=OWNER, metadata={"orphaned-at": "19991399T000000Z"})
    assert lines(Scenario(broken).plan(0)) == ["mark-orphaned acme consumer:1"]


def test_more_than_sixteen_orphaned_subjects_take_turns() -> None:
    gone = [f"consumer:{number}" for number in range(20)]
    scenario = Scenario(customer("acme", "consumer:1000", *gone, owner=OWNER))
    stays = consumer("1000", "zoe", "customer:acme")
    plan = scenario.plan(0, stays)
    assert [len(change.subject_keys) for change in plan.changes] == [16, 4]
    scenario.sync(0, stays)
    apply_plan(scenario.plan(40, stays), scenario.target)
    scenario.sync(41, stays)
    scenario.sync(81, stays)
    assert scenario.subjects == [("consumer:1000",)]


def test_marks_are_valid_labels() -> None:
    metadata = newly_orphaned({}, ["consumer:1", "Ünï cödé"], START)
    assert all(is_label_value(value) for value in (*metadata.values(), timestamp(START), "none"))
    assert set(orphaned_subjects(metadata)) == {
        subject_digest("consumer:1"),
        subject_digest("Ünï cödé"),
    }


@pytest.mark.parametrize("policy", ["create-only", "upsert-only"])
def test_other_policies_report_orphans_in_one_line_for_each_customer(policy: Policy) -> None:
    scenario = Scenario(BOTH, customer("finance", "x"), delete_after=40)
    scenario.sync(0, ALICE)
    plan = scenario.plan(100, ALICE, policy=policy)
    assert lines(plan) == ["orphaned acme consumer:2"]
    assert plan.in_sync


def test_upsert_only_removes_marks_that_policy_sync_left() -> None:
    scenario = Scenario(BOTH)
    scenario.sync(0, ALICE)
    assert lines(scenario.plan(1, ALICE, BOB, policy="upsert-only")) == ["unmark-orphaned acme"]
    assert lines(scenario.plan(1, ALICE, BOB, policy="create-only")) == []


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        ("create-only", {"create-customer", "upsert-subject", "blocked", "unmanaged", "orphaned"}),
        (
            "upsert-only",
            set(ChangeKind) - {"mark-orphaned", "detach-subjects", "delete-customer", "delete-subject"},
        ),
        ("sync", set(ChangeKind)),
    ],
)
def test_a_policy_lets_through_only_its_kinds(policy: Policy, allowed: set[str]) -> None:
    every = [
        Change(kind, "acme", ("x",), "because")
        for kind in ChangeKind
        if policy != "create-only" or kind not in {"adopt-customer", "move-subjects"}
    ]
    assert {change.kind for change in POLICIES[policy](every)} <= allowed


def test_a_customer_whose_key_is_uncertain_is_not_orphaned() -> None:
    doubt = [static("x", customer="acme", name="a"), static("x", customer="acme", name="b")]
    scenario = Scenario(customer("acme", "by-hand", owner=OWNER))
    assert lines(scenario.plan(0, *doubt)) == ["blocked acme x"]
    assert lines(scenario.plan(0)) == ["mark-orphaned acme by-hand"]


def test_the_entity_of_a_subject_that_is_the_key_of_its_customer_stays_while_that_one_does() -> None:
    """Usage under the key stays attributed even after the subject is detached."""
    entity = ObservedSubject("consumer:1", "alice", ownership_metadata(OWNER, "1"))
    scenario = Scenario(customer("consumer:1", "consumer:1", owner=OWNER), subjects=(entity,))
    assert scenario.sync(0) == ["mark-orphaned consumer:1 consumer:1"]
    assert scenario.sync(40) == ["detach-subjects consumer:1 consumer:1"]
    assert scenario.target.subjects() == (entity,)


def test_of_several_marks_of_one_subject_the_oldest_counts() -> None:
    name = subject_digest("consumer:1")
    slots = {f"orphaned-at-{slot}": f"2026010{day}T000000Z-{name}" for slot, day in ((1, 3), (2, 1), (3, 2))}
    assert orphaned_subjects(slots) == {name: ("orphaned-at-2", START)}


def test_a_customer_that_pays_by_its_key_for_a_subject_that_a_source_names_is_no_orphan() -> None:
    """Its only subject was detached; then its consumer came back in a group, which cannot get its key."""
    theirs = customer("acme", "consumer:2", owner=OWNER)
    scenario = Scenario(customer("consumer:1", "consumer:1", owner=OWNER), theirs, delete_after=50)
    assert scenario.sync(0, BOB) == ["mark-orphaned consumer:1 consumer:1"]
    assert scenario.sync(40, BOB) == ["detach-subjects consumer:1 consumer:1"]
    for day in (50, 100):
        plan = scenario.plan(day, ALICE, BOB)
        assert not plan.of(ChangeKind.DELETE_CUSTOMER)
        assert "blocked acme consumer:1" in lines(plan)
    assert scenario.sync(50, ALICE, BOB)[0] == "unmark-orphaned consumer:1"
    assert not scenario.plan(200, ALICE, BOB).of(ChangeKind.DELETE_CUSTOMER)
