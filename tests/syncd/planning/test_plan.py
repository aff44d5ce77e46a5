from __future__ import annotations

from typing import Any

import pytest

from syncd.core.changes import ChangeKind
from syncd.core.model import ObservedSubject
from syncd.core.ownership import ownership_metadata
from syncd.mapping.rules import MappingRules
from syncd.planning.plan import PlanOptions
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, lines, observed, plan_for, replace, static

ACME = [consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme")]


def test_a_principal_without_a_customer_gets_one() -> None:
    plan = plan_for([consumer("1", "alice")], observed())
    assert lines(plan) == ["create-customer consumer:1 consumer:1"]
    after = plan.changes[0].after
    assert after is not None
    assert (after.name, after.subject_keys) == ("alice", ("consumer:1",))
    assert after.metadata == ownership_metadata(OWNER, "1")


def test_a_state_that_is_as_desired_needs_no_changes() -> None:
    plan = plan_for(ACME, observed(customer("acme", "consumer:2", "consumer:1", owner=OWNER)), rules=BY_TAG)
    assert plan.in_sync
    assert plan.changes == ()


def test_a_missing_subject_is_appended_so_that_the_order_of_the_others_stays() -> None:
    state = observed(customer("acme", "z", "consumer:2", "a", owner=OWNER))
    plan = plan_for(ACME, state, rules=BY_TAG)
    assert lines(plan) == ["attach-subjects acme consumer:1"]
    after = plan.changes[0].after
    assert after is not None
    assert after.subject_keys == ("z", "consumer:2", "a", "consumer:1")


def test_a_name_that_changed_at_the_source_renames_our_customer() -> None:
    plan = plan_for(
        [consumer("1", "alicia")], observed(customer("consumer:1", "consumer:1", name="alice", owner=OWNER))
    )
    assert lines(plan) == ["rename-customer consumer:1"]


def test_a_group_keeps_the_name_that_people_gave_it() -> None:
    state = observed(customer("acme", "consumer:1", "consumer:2", name="ACME Inc.", owner=OWNER))
    assert plan_for(ACME, state, rules=BY_TAG).in_sync


def test_a_subject_on_a_customer_made_by_hand_is_unmanaged_and_clean() -> None:
    plan = plan_for([consumer("1", "alice")], observed(customer("finance-17", "consumer:1")))
    assert lines(plan) == ["unmanaged finance-17 consumer:1"]
    assert plan.in_sync


def test_an_unmanaged_customer_whose_key_is_the_subject_is_never_renamed() -> None:
    plan = plan_for([consumer("1", "alice")], observed(customer("consumer:1", name="Alice GmbH")))
    assert lines(plan) == ["unmanaged consumer:1 consumer:1"]


@pytest.mark.parametrize("owner", [None, "other-owner"])
def test_an_unmanaged_customer_with_the_wanted_key_blocks_the_subjects_that_it_does_not_carry(
    owner: str | None,
) -> None:
    plan = plan_for(ACME, observed(customer("acme", "consumer:1", owner=owner)), rules=BY_TAG)
    assert lines(plan) == ["blocked acme consumer:2", "unmanaged acme consumer:1"]
    assert plan.in_sync, "that customer is a decision of people"
    reason = plan.changes[0].reason
    assert "other-owner" in reason if owner else "no ownership metadata" in reason


def test_a_customer_of_another_tool_is_unmanaged_even_with_the_same_owner_id() -> None:
    there = customer("acme", metadata={"managed-by": "terraform", "sync-owner": OWNER})
    plan = plan_for(ACME, observed(there), rules=BY_TAG)
    assert {change.kind for change in plan.changes} == {ChangeKind.BLOCKED}


def test_a_customer_with_an_active_subscription_blocks_a_new_subject_and_says_what_to_do() -> None:
    state = observed(customer("acme", "consumer:1", owner=OWNER, subscription="SUB1"))
    plan = plan_for(ACME, state, rules=BY_TAG)
    assert lines(plan) == ["blocked acme consumer:2"]
    assert "SUB1" in plan.changes[0].reason
    assert "by hand" in plan.changes[0].reason


def test_a_subject_that_the_customer_carries_by_its_key_needs_no_attachment() -> None:
    state = observed(customer("consumer:1", name="alice", owner=OWNER, subscription="SUB1"))
    assert plan_for([consumer("1", "alice")], state).changes == ()


def test_a_subscribed_customer_can_still_be_renamed() -> None:
    state = observed(customer("consumer:1", "consumer:1", name="old", owner=OWNER, subscription="SUB1"))
    assert lines(plan_for([consumer("1", "alice")], state)) == ["rename-customer consumer:1"]


def test_a_subject_on_another_managed_customer_is_not_moved() -> None:
    state = observed(customer("consumer:1", "consumer:1", name="alice", owner=OWNER))
    plan = plan_for(ACME, state, rules=BY_TAG)
    assert lines(plan) == ["create-customer acme consumer:2", "blocked acme consumer:1"]
    assert "own key" in plan.of(ChangeKind.BLOCKED)[0].reason


def test_no_empty_customer_is_created_when_all_its_subjects_are_elsewhere() -> None:
    plan = plan_for(ACME, observed(customer("x", "consumer:1", "consumer:2")), rules=BY_TAG)
    assert lines(plan) == ["unmanaged x consumer:1", "unmanaged x consumer:2"]


def test_a_customer_key_that_is_a_subject_of_someone_blocks_the_creation() -> None:
    plan = plan_for(ACME, observed(customer("finance", "acme")), rules=BY_TAG)
    assert lines(plan) == ["blocked acme consumer:1 consumer:2"]


def test_orphans_are_reported_and_left_alone() -> None:
    plan = plan_for([], observed(customer("consumer:9", "consumer:9", owner=OWNER), customer("finance", "x")))
    assert lines(plan) == ["orphaned consumer:9 consumer:9"]
    assert plan.in_sync


def test_an_orphaned_subject_is_reported_but_one_attached_by_hand_is_not() -> None:
    state = observed(customer("acme", "consumer:1", "consumer:2", "consumer:3", "by-hand", owner=OWNER))
    plan = plan_for(ACME, state, rules=BY_TAG)
    assert lines(plan) == ["orphaned acme consumer:3"]


def test_uncertain_subjects_are_not_orphaned() -> None:
    two = [consumer("1", "alice", source="x"), consumer("1", "bob", source="y")]
    plan = plan_for(two, observed(customer("consumer:1", "consumer:1", owner=OWNER)))
    assert lines(plan) == ["blocked consumer:1 consumer:1"]


def test_create_only_never_changes_a_customer_that_exists() -> None:
    state = observed(
        customer("acme", "consumer:1", owner=OWNER),
        customer("consumer:3", "consumer:3", name="old", owner=OWNER),
    )
    principals = [*ACME, consumer("3", "new"), consumer("4", "dave")]
    plan = plan_for(principals, state, rules=BY_TAG, policy="create-only")
    assert lines(plan) == ["create-customer consumer:4 consumer:4", "blocked acme consumer:2"]
    assert "create-only" in plan.changes[1].reason


def test_subject_entities_come_after_all_customers() -> None:
    plan = plan_for([consumer("1", "alice"), consumer("2", "bob")], observed(subjects=()))
    assert [change.kind for change in plan.changes] == [ChangeKind.CREATE_CUSTOMER] * 2 + [
        ChangeKind.UPSERT_SUBJECT
    ] * 2


def test_a_subject_that_cannot_be_attached_gets_no_entity() -> None:
    state = observed(customer("acme", "consumer:1", owner=OWNER, subscription="S"), subjects=())
    plan = plan_for(ACME, state, rules=BY_TAG)
    assert lines(plan) == ["upsert-subject acme consumer:1", "blocked acme consumer:2"]


def test_a_subject_on_an_unmanaged_customer_gets_no_entity() -> None:
    plan = plan_for([consumer("1", "alice")], observed(customer("finance", "consumer:1"), subjects=()))
    assert lines(plan) == ["unmanaged finance consumer:1"]


def entity_plan(entity: ObservedSubject, name: str = "alice") -> list[str]:
    there = customer("consumer:1", "consumer:1", name=name, owner=OWNER)
    return lines(plan_for([consumer("1", name)], observed(there, subjects=(entity,))))


def test_a_managed_subject_entity_follows_the_name() -> None:
    entity = ObservedSubject("consumer:1", "old", ownership_metadata(OWNER, "1"))
    assert entity_plan(entity) == ["upsert-subject consumer:1 consumer:1"]
    assert entity_plan(ObservedSubject("consumer:1", "alice", ownership_metadata(OWNER, "1"))) == []


@pytest.mark.parametrize("owner", ["eu-a-1", OWNER])
def test_marks_of_earlier_versions_in_plain_text_are_still_ours_and_not_written_again(owner: str) -> None:
    plain = {"managed-by": "kong-openmeter", "sync-owner": owner, "source-id": "team-a-1"}
    principals = [consumer("1", "alice", "customer:team-a-1")]
    there = customer("team-a-1", "consumer:1", metadata=plain)
    world = observed(there, subjects=(ObservedSubject("consumer:1", None, plain),))
    assert lines(plan_for(principals, world, rules=replace(BY_TAG, owner_id=owner))) == []
    foreign = plan_for(principals, world, rules=replace(BY_TAG, owner_id="eu-a-2"))
    assert lines(foreign) == ["unmanaged team-a-1 consumer:1"]


def test_a_subject_entity_that_the_server_made_by_itself_is_filled_in() -> None:
    made = {"createdBy": "subject.provisioner", "customerId": "id-1"}
    for metadata in ({}, made):
        entity = ObservedSubject("consumer:1", None, metadata)
        assert entity_plan(entity) == ["upsert-subject consumer:1 consumer:1"]


@pytest.mark.parametrize(
    "entity",
    [
        ObservedSubject("consumer:1", "Alice GmbH", {}),
        ObservedSubject("consumer:1", None, {"hubspot": "7"}),
        ObservedSubject("consumer:1", "x", ownership_metadata("other-owner", "1")),
    ],
)
def test_a_subject_entity_that_someone_else_wrote_is_left_alone(entity: ObservedSubject) -> None:
    assert entity_plan(entity) == []


def test_a_server_without_subject_entities_gets_none() -> None:
    assert lines(plan_for([static("s", team="x")], observed(subjects=None))) == ["create-customer s s"]


def test_the_plan_as_json_has_each_change_with_reason_before_and_after() -> None:
    state = observed(customer("consumer:1", "consumer:1", name="alice", owner=OWNER))
    document: dict[str, Any] = plan_for([consumer("1", "alicia")], state).to_json()
    assert {kind: count for kind, count in document["summary"].items() if count} == {"rename-customer": 1}
    assert document["changes"] == [
        {
            "kind": "rename-customer",
            "customer_key": "consumer:1",
            "customer_id": "id-consumer:1",
            "subject_keys": [],
            "reason": "the name changed at the source",
            "before": {"name": "alice"},
            "after": {"name": "alicia"},
        }
    ]


def test_two_owners_can_share_a_metering_api() -> None:
    state = observed(customer("consumer:1", "consumer:1", name="alice", owner="north"))
    rules = MappingRules(owner_id="south")
    plan = plan_for([consumer("1", "alicia")], state, rules=rules)
    assert lines(plan) == ["unmanaged consumer:1 consumer:1"]


def test_a_note_names_the_flags_that_policy_create_only_ignores() -> None:
    plan = plan_for([], observed(), policy="create-only", options=PlanOptions(adopt=True))
    assert "--adopt" in plan.notes[0]
    assert plan_for([], observed(), policy="create-only").notes == ()
    assert plan_for([], observed(), options=PlanOptions(adopt=True)).notes == ()


def test_a_subject_that_is_the_id_of_its_customer_is_attached() -> None:
    """OpenMeter finds no customer for usage under an id."""
    state = observed(customer("acme", owner=OWNER, identity="01J"))
    assert lines(plan_for([static("01J", customer="acme")], state)) == ["attach-subjects acme 01J"]
