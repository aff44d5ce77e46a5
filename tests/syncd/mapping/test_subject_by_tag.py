"""`mapping.subject_field: tag`: a group sends its customer's key, so no subject has to be attached."""

from __future__ import annotations

from syncd.mapping.desired_state import desired_state
from syncd.mapping.limits import within_limits
from syncd.mapping.rules import MappingRules, Templates
from syncd.planning.plan import PlanOptions
from tests.syncd.builders import OWNER, consumer, customer, lines, observed, plan_for, replace, static

RULES = MappingRules(owner_id=OWNER, group_by="tag", subject_field="tag")
ALICE = consumer("1", "alice", "customer:acme")
BOB = consumer("2", "bob", "customer:acme")
CAROL = consumer("3", "carol")
ALL = PlanOptions(allow_move=True, adopt=True)


def test_a_group_has_its_key_as_the_only_subject_and_other_consumers_have_their_id() -> None:
    assert lines(plan_for([ALICE, BOB, CAROL], observed(), rules=RULES)) == [
        "create-customer acme acme",
        "create-customer consumer-3 consumer:3",
    ]
    (acme, _) = desired_state([BOB, ALICE, CAROL], RULES).customers
    assert (acme.name, acme.name_follows_source, acme.ownership["source-id"]) == ("acme", False, "acme")


def test_a_new_consumer_of_a_customer_with_a_subscription_is_not_blocked() -> None:
    acme = customer("acme", owner=OWNER, subscription="SUB")
    assert lines(plan_for([ALICE, BOB], observed(acme), rules=RULES)) == []
    by_id = plan_for([ALICE, BOB], observed(acme), rules=replace(RULES, subject_field="id"))
    assert lines(by_id) == ["blocked acme consumer:1 consumer:2"]


def test_earlier_subjects_of_group_members_stay_where_they_are_under_policy_sync() -> None:
    there = observed(
        customer("acme", "consumer:1", owner=OWNER, subscription="SUB"),
        customer("consumer-2", "consumer:2", owner=OWNER),
    )
    for state in (there, replace(there, customers=there.customers[:1])):
        assert lines(plan_for([ALICE, BOB], state, rules=RULES, policy="sync", options=ALL)) == []
    gone = plan_for([BOB], there, rules=RULES, policy="sync")
    assert lines(gone) == ["mark-orphaned acme consumer:1"]


def test_blocked_members_are_not_orphaned() -> None:
    batch = static("acme", customer="globex")
    there = observed(customer("consumer-1", "consumer:1", owner=OWNER))
    plan = plan_for([ALICE, batch], there, rules=RULES, policy="sync")
    assert lines(plan) == ["blocked - acme"]
    assert "static subject acme" in plan.changes[0].reason
    assert "consumer alice" in plan.changes[0].reason


def test_a_group_key_of_its_own_carries_the_subject() -> None:
    rules = replace(RULES, templates=Templates(group_key="team-{group}"))
    assert lines(plan_for([ALICE, BOB], observed(), rules=rules)) == ["create-customer team-acme acme"]


def test_a_consumer_without_an_id_has_the_subject_of_its_group() -> None:
    nameless = replace(consumer("", None, "customer:acme"), custom_id="crm")
    assert lines(plan_for([nameless], observed(), rules=RULES)) == ["create-customer acme acme"]


def test_two_different_tags_are_still_ambiguous() -> None:
    torn = consumer("1", "alice", "customer:acme", "customer:globex")
    there = observed(customer("acme", "consumer:1", owner=OWNER))
    plan = plan_for([torn], there, rules=RULES, policy="sync")
    assert "blocked - consumer:1" in lines(plan)
    assert not plan.actionable


def test_one_subject_for_a_group_is_within_every_limit() -> None:
    rules = replace(RULES, max_subjects_per_customer=1)
    desired = within_limits(desired_state([ALICE, BOB], rules), observed(), rules)
    assert [[subject.key for subject in one.subjects] for one in desired.customers] == [["acme"]]
    assert desired.problems == ()
    assert desired.known == {"consumer:1", "consumer:2"}
