"""Moves and adoptions, which need a flag."""

from __future__ import annotations

import pytest

from syncd.apply.executor import apply_plan
from syncd.core.changes import ChangeKind, Outcome, Status
from syncd.core.errors import RefusedError
from syncd.core.model import ObservedCustomer, ObservedSubject, Principal
from syncd.core.ownership import ADOPTED, is_managed
from syncd.metering.base import Decide
from syncd.planning.plan import PlanOptions
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, lines, observed, plan_for, replace
from tests.syncd.memory_target import MemoryTarget

MOVE = PlanOptions(allow_move=True)
ADOPT = PlanOptions(adopt=True)
ALICE = consumer("1", "alice", "customer:globex")
BOB = consumer("2", "bob", "customer:acme")
ACME = customer("acme", "consumer:1", "consumer:2", owner=OWNER)
GLOBEX = customer("globex", "consumer:3", owner=OWNER)
CAROL = consumer("3", "carol", "customer:globex")


def carried(target: MemoryTarget) -> dict[str | None, tuple[str, ...]]:
    return {customer.key: customer.subject_keys for customer in target.customers.values()}


def test_a_move_detaches_the_subject_first_and_then_attaches_it() -> None:
    plan = plan_for([ALICE, BOB, CAROL], observed(ACME, GLOBEX), rules=BY_TAG, options=MOVE)
    assert lines(plan) == ["move-subjects acme consumer:1", "attach-subjects globex consumer:1"]
    move = plan.changes[0]
    assert move.to_customer_key == "globex"
    assert move.after is not None
    assert move.after.subject_keys == ("consumer:2",)
    target = MemoryTarget(observed(ACME, GLOBEX))
    apply_plan(plan, target)
    assert carried(target) == {"acme": ("consumer:2",), "globex": ("consumer:3", "consumer:1")}


def test_a_move_to_a_customer_that_does_not_exist_yet_creates_it() -> None:
    target = MemoryTarget(observed(ACME))
    plan = plan_for([ALICE, BOB], target.observe(), rules=BY_TAG, options=MOVE)
    assert lines(plan) == ["move-subjects acme consumer:1", "create-customer globex consumer:1"]
    apply_plan(plan, target)
    assert carried(target) == {"acme": ("consumer:2",), "globex": ("consumer:1",)}


def test_a_subject_that_leaves_its_group_becomes_a_customer_of_its_own() -> None:
    target = MemoryTarget(observed(ACME))
    plan = plan_for([consumer("1", "alice"), BOB], target.observe(), rules=BY_TAG, options=MOVE)
    assert lines(plan) == ["move-subjects acme consumer:1", "create-customer consumer:1 consumer:1"]
    assert {outcome.status for outcome in apply_plan(plan, target)} == {Status.DONE}


OWN = customer("consumer:1", "consumer:1", name="alice", owner=OWNER)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (OWN, "delete customer 'consumer:1'. The next run then attaches the subject to 'globex'"),
        (replace(OWN, subject_keys=()), "delete customer 'consumer:1'"),
        (replace(OWN, subject_keys=("consumer:1", "by-hand")), "move its other subjects (by-hand)"),
        (replace(OWN, active_subscription="S1"), "active subscription (S1)"),
        (replace(OWN, metadata={**OWN.metadata, ADOPTED: "true"}), "was adopted"),
    ],
)
@pytest.mark.parametrize("options", [None, MOVE])
def test_a_customer_whose_own_key_is_the_subject_stays_and_the_plan_says_what_to_do(
    own: ObservedCustomer, says: str, options: PlanOptions | None
) -> None:
    plan = plan_for([ALICE, CAROL], observed(own, GLOBEX), rules=BY_TAG, options=options)
    assert lines(plan)[0] == "blocked globex consumer:1"
    assert not plan.actionable
    assert says in plan.changes[0].reason


def test_once_that_customer_is_deleted_by_hand_the_next_run_attaches_its_subject() -> None:
    target = MemoryTarget(observed(OWN, GLOBEX))
    del target.customers[OWN.id]
    apply_plan(plan_for([ALICE, CAROL], target.observe(), rules=BY_TAG), target)
    assert carried(target) == {"globex": ("consumer:3", "consumer:1")}


def test_nothing_moves_without_the_flag_or_under_create_only() -> None:
    for options, policy in ((None, "upsert-only"), (MOVE, "create-only")):
        plan = plan_for(
            [ALICE, BOB, CAROL],
            observed(ACME, GLOBEX),
            rules=BY_TAG,
            policy=policy,  # type: ignore[arg-type]
            options=options,
        )
        assert lines(plan) == ["blocked globex consumer:1"]
        assert "--allow-move" in plan.changes[0].reason or policy == "create-only"


def test_nothing_moves_from_or_to_a_paying_customer() -> None:
    for state in (
        observed(replace(ACME, active_subscription="S"), GLOBEX),
        observed(ACME, replace(GLOBEX, active_subscription="S")),
    ):
        plan = plan_for([ALICE, BOB, CAROL], state, rules=BY_TAG, options=MOVE)
        assert lines(plan) == ["blocked globex consumer:1"]


def test_nothing_moves_from_an_unmanaged_customer() -> None:
    plan = plan_for([ALICE, BOB], observed(replace(ACME, metadata={})), rules=BY_TAG, options=MOVE)
    assert plan.actionable == ()


def test_a_subscription_that_began_since_the_plan_keeps_the_subject_where_it_is() -> None:
    plan = plan_for([ALICE, BOB, CAROL], observed(ACME, GLOBEX), rules=BY_TAG, options=MOVE)
    for paying in ("id-acme", "id-globex"):
        target = MemoryTarget(observed(ACME, GLOBEX))
        target.customers[paying] = replace(target.customers[paying], active_subscription="S")
        statuses = [outcome.status for outcome in apply_plan(plan, target)]
        assert statuses == [Status.BLOCKED, Status.SKIPPED]
        assert carried(target)["acme"] == ("consumer:1", "consumer:2")


class Refusing(MemoryTarget):
    """Refuses every edit of globex."""

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        if customer_id == "id-globex":
            raise RefusedError("no", status=400, detail="one subject only")
        return super().edit_customer(customer_id, decide)


def test_a_subject_that_its_new_customer_refuses_goes_back() -> None:
    target = Refusing(observed(ACME, GLOBEX))
    plan = plan_for([ALICE, BOB, CAROL], target.observe(), rules=BY_TAG, options=MOVE)
    outcome: Outcome = apply_plan(plan, target)[-1]
    assert outcome.status is Status.BLOCKED
    assert "put back" in outcome.detail
    assert sorted(carried(target)["acme"]) == ["consumer:1", "consumer:2"]


def adopt(state: ObservedCustomer, *principals: Principal) -> MemoryTarget:
    target = MemoryTarget(observed(state, subjects=()))
    options = ADOPT
    apply_plan(plan_for(list(principals), target.observe(), rules=BY_TAG, options=options), target)
    assert plan_for(list(principals), target.observe(), rules=BY_TAG).changes == ()
    return target


def test_adopting_adds_ownership_metadata_and_nothing_else() -> None:
    by_hand = customer("consumer:1", "consumer:1", "x", name="Alice GmbH", metadata={"crm": "7"})
    target = adopt(by_hand, consumer("1", "alice"))
    (after,) = target.customers.values()
    assert is_managed(after.metadata, OWNER)
    assert after.metadata["crm"] == "7"
    assert replace(after, metadata=by_hand.metadata) == by_hand


def test_an_adopted_customer_keeps_the_name_that_people_gave_it_but_gets_missing_subjects() -> None:
    target = adopt(customer("globex", "consumer:1", name="Globex Inc."), ALICE, CAROL)
    (after,) = target.customers.values()
    assert (after.name, after.subject_keys) == ("Globex Inc.", ("consumer:1", "consumer:3"))
    target = adopt(customer("consumer:9", name="Nine"), consumer("9", "nina"))
    (after,) = target.customers.values()
    assert after.name == "Nine"
    assert ADOPTED in after.metadata
    assert target.subjects() == (ObservedSubject("consumer:9", None, dict(target.subjects()[0].metadata)),)  # type: ignore[index]


def test_no_subject_is_moved_off_an_adopted_customer() -> None:
    adopted = replace(ACME, metadata={**ACME.metadata, ADOPTED: "true"})
    plan = plan_for([ALICE, BOB, CAROL], observed(adopted, GLOBEX), rules=BY_TAG, options=MOVE)
    assert lines(plan) == ["blocked globex consumer:1"]
    assert "adopted" in plan.changes[0].reason


def test_a_customer_of_another_owner_is_never_adopted() -> None:
    for metadata in ({"managed-by": "hubspot"}, {"managed-by": "kong-openmeter", "sync-owner": "north"}):
        state = observed(customer("consumer:1", metadata=metadata))
        plan = plan_for([consumer("1", "alice")], state, options=ADOPT)
        assert lines(plan) == ["unmanaged consumer:1 consumer:1"]


def test_a_customer_that_got_another_owner_since_the_plan_is_not_adopted() -> None:
    by_hand = customer("consumer:1", "consumer:1")
    plan = plan_for([consumer("1", "alice")], observed(by_hand), options=ADOPT)
    assert plan.changes[0].kind is ChangeKind.ADOPT_CUSTOMER
    target = MemoryTarget(observed(replace(by_hand, metadata={"managed-by": "hubspot"})))
    assert apply_plan(plan, target)[0].status is Status.BLOCKED
    assert target.writes == 0


def test_nothing_moves_to_a_customer_that_cannot_be_created() -> None:
    """Its key is a subject of another customer, so a subject that moves to it would be unbilled."""
    own = customer("consumer-1", "consumer:1", owner=OWNER)
    by_hand = customer("legacy", "globex")
    plan = plan_for([ALICE], observed(own, by_hand), rules=BY_TAG, options=MOVE)
    assert lines(plan) == ["blocked globex consumer:1"]
    assert not plan.actionable


def test_a_customer_that_loses_its_last_subject_by_a_move_is_marked_in_the_same_plan() -> None:
    own = customer("consumer-1", "consumer:1", owner=OWNER)
    plan = plan_for([ALICE, CAROL], observed(own, GLOBEX), rules=BY_TAG, policy="sync", options=MOVE)
    assert lines(plan) == [
        "move-subjects consumer-1 consumer:1",
        "attach-subjects globex consumer:1",
        "mark-orphaned consumer-1",
    ]


def test_a_move_that_the_receiving_customer_blocks_names_that_reason_and_no_option() -> None:
    """No option would help: the plan must not ask for one that was given."""
    subscribed = observed(ACME, replace(GLOBEX, active_subscription="S"))
    foreign = observed(ACME, customer("globex", "consumer:3"))
    key_taken = observed(ACME, customer("other", "globex", owner=OWNER))
    for state, says in (
        (subscribed, "'globex' (globex) has an active subscription"),
        (foreign, "'globex' (globex) belongs to someone else"),
        (key_taken, "its key 'globex' is a subject of customer 'other'"),
    ):
        for options in (PlanOptions(), MOVE):
            plan = plan_for([ALICE, BOB, CAROL], state, rules=BY_TAG, options=options)
            (reason,) = {c.reason for c in plan.of(ChangeKind.BLOCKED) if "consumer:1" in c.subject_keys}
            assert says.lower() in reason.lower()
            assert "--allow-move" not in reason
