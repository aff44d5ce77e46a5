"""Double counting: a subject that is another customer's key; never planned, and reported if it exists."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from syncd.core.changes import ChangeKind, Plan
from syncd.core.model import ObservedCustomer
from syncd.core.ownership import ownership_metadata
from syncd.mapping.rules import Templates
from syncd.planning.plan import PlanOptions
from syncd.sandbox.testing import running_sandbox
from tests.syncd.builders import (
    BY_TAG,
    OWNER,
    RULES,
    consumer,
    customer,
    lines,
    observed,
    plan_for,
    replace,
    static,
)
from tests.syncd.processes import Project

DEFAULT_KEYS = replace(RULES, templates=Templates())
FLAGS = PlanOptions(adopt=True, allow_move=True)


def reasons(plan: Plan) -> str:
    return "\n".join(change.reason for change in plan.of(ChangeKind.BLOCKED))


@pytest.mark.parametrize("owners", [(OWNER, OWNER), (OWNER, None), (None, OWNER), (None, None)])
@pytest.mark.parametrize("options", [PlanOptions(), FLAGS])
def test_double_counting_is_blocked_with_both_customers_named_and_left_alone(
    owners: tuple[str | None, str | None], options: PlanOptions
) -> None:
    key_customer = customer("consumer:1", owner=owners[0], name="alice")
    carrier = customer("acme", "consumer:1", owner=owners[1])
    people = [consumer("1", "alice")]
    plan = plan_for(people, observed(key_customer, carrier), rules=RULES, options=options)
    assert lines(plan) == ["blocked consumer:1 consumer:1"]
    assert "counted twice" in reasons(plan)
    assert "'consumer:1' (alice), whose key it is" in reasons(plan)
    assert "'acme' (acme), which carries it" in reasons(plan)
    assert not plan.in_sync


@pytest.mark.parametrize("acme", [[], [customer("acme", "y", owner=OWNER)]], ids=["create", "attach"])
def test_a_subject_that_is_another_customers_key_is_not_attached(acme: list[ObservedCustomer]) -> None:
    """Although the metering API would accept it without an error."""
    people = [consumer("1", "alice", "customer:acme"), static("y", customer="acme")]
    ours = plan_for(people, observed(*acme, customer("consumer:1", "z", owner=OWNER)), rules=BY_TAG)
    put = [change for change in ours.actionable if "consumer:1" in change.subject_keys]
    assert put == []
    assert "blocked acme consumer:1" in lines(ours)
    assert "should be in customer 'acme' but is attributed to 'consumer:1'" in reasons(ours)
    by_hand = plan_for(people, observed(*acme, customer("consumer:1", "z")), rules=BY_TAG)
    assert "unmanaged consumer:1 consumer:1" in lines(by_hand)
    assert [change for change in by_hand.actionable if "consumer:1" in change.subject_keys] == []


def test_double_counting_of_other_owners_is_not_reported() -> None:
    state = observed(customer("x"), customer("acme", "x"))
    assert lines(plan_for([consumer("1")], state, rules=DEFAULT_KEYS)) == [
        "create-customer consumer-1 consumer:1"
    ]


def test_the_key_customer_gets_no_change_that_the_server_would_refuse() -> None:
    key_customer = customer("acme", "consumer:1", owner=OWNER, name="old name")
    carrier = customer("globex", "acme", owner="other")
    people = [consumer("1", "a", "customer:acme"), consumer("2", "b", "customer:acme")]
    plan = plan_for(people, observed(key_customer, carrier), rules=BY_TAG, options=FLAGS)
    assert lines(plan) == ["blocked acme consumer:2", "blocked acme acme"]
    assert "carries its key as a subject. Remove the subject there" in reasons(plan)
    renamed = replace(key_customer, key="consumer:1")
    again = plan_for([consumer("1", "new name")], observed(renamed, customer("g", "consumer:1")), rules=RULES)
    assert again.of(ChangeKind.RENAME_CUSTOMER) == ()


def test_nothing_moves_to_or_from_the_key_customer() -> None:
    key_customer, carrier = (
        customer("acme", "consumer:1", owner=OWNER),
        customer("globex", "acme", owner=OWNER),
    )
    away = plan_for(
        [consumer("1", "a", "customer:else")], observed(key_customer, carrier), rules=BY_TAG, options=FLAGS
    )
    assert not away.actionable
    assert (
        "should be in customer 'else' but is attributed to 'acme' (acme). The metering API refuses"
        in reasons(away)
    )
    here = customer("else", "consumer:1", owner=OWNER)
    to = plan_for(
        [consumer("1", "a", "customer:acme")],
        observed(replace(key_customer, subject_keys=()), carrier, here),
        rules=BY_TAG,
        options=FLAGS,
    )
    assert not to.actionable


def test_policy_sync_marks_nothing_on_the_key_customer() -> None:
    key_customer, carrier = (
        customer("acme", "consumer:1", owner=OWNER),
        customer("globex", "acme", owner="other"),
    )
    plan = plan_for([consumer("2")], observed(key_customer, carrier), rules=DEFAULT_KEYS, policy="sync")
    assert lines(plan) == ["create-customer consumer-2 consumer:2", "blocked acme acme"]


def test_a_subject_that_is_a_customers_id_is_attached_like_any_other() -> None:
    # A real OpenMeter finds no customer for usage under an id.
    ours = customer("acme", "x", owner=OWNER, identity="01ABC")
    elsewhere = plan_for([static("01ABC", customer="globex")], observed(ours), rules=RULES)
    assert lines(elsewhere)[0] == "create-customer globex 01ABC"
    at_home = plan_for([static("01ABC", customer="acme")], observed(ours), rules=RULES)
    (attached,) = at_home.of(ChangeKind.ATTACH_SUBJECTS)
    assert (attached.customer_key, attached.subject_keys) == ("acme", ("01ABC",))


def test_a_key_that_is_a_customers_id_is_blocked() -> None:
    ours = customer("acme", "x", owner=OWNER, identity="01ABC")
    taken = plan_for([static("y", customer="01ABC")], observed(ours), rules=RULES)
    assert "is the id of customer 'acme'" in reasons(taken)


def test_double_counting_made_by_hand_is_reported_until_one_customer_lets_go(tmp_path: Path) -> None:
    with running_sandbox() as url:
        project = Project(tmp_path, url)
        assert project.call("apply", "--yes").returncode == 0
        by_hand = {"name": "by hand", "key": "hand", "usageAttribution": {"subjectKeys": ["acme"]}}
        made = httpx.post(f"{url}/api/v1/customers", json=by_hand)
        assert made.status_code == 201
        planned = project.call("plan", "--output=json")
        assert planned.returncode == 2
        (blocked,) = json.loads(planned.stdout)["changes"]
        assert (blocked["kind"], blocked["subject_keys"]) == ("blocked", ["acme"])
        assert "'acme' (acme)" in blocked["reason"]
        assert "'hand' (by hand)" in blocked["reason"]
        assert project.call("apply", "--yes").returncode == 3
        httpx.delete(f"{url}/api/v1/customers/hand").raise_for_status()
        assert project.call("plan").returncode == 0


def test_double_counting_is_reported_for_an_otherwise_unchanged_customer() -> None:
    key_customer = customer("x", "consumer:1", owner=OWNER, metadata=ownership_metadata(OWNER, "1"))
    carrier = customer("consumer:2", "consumer:2", "x", owner=OWNER)
    state = observed(key_customer, carrier)
    people = [static("consumer:1", customer="x"), consumer("2", "consumer:2")]
    assert lines(plan_for(people, state, rules=RULES)) == ["blocked x x"]
