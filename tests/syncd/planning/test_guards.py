"""Guards that stop a run before its first change, and scopes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from syncd.core.changes import REMOVALS, Change, ChangeKind, Plan
from syncd.core.errors import ScopeError, UnsafePlanError
from syncd.core.model import ObservedState, Principal
from syncd.core.policy import Policy
from syncd.mapping.rules import MappingRules
from syncd.planning.guards import (
    Limits,
    Scope,
    require_safe,
    restricted,
    unsafe_reason,
    withhold_for_empty_sources,
)
from syncd.planning.plan import PlanOptions
from tests.syncd.builders import (
    BY_TAG,
    KEYED_BY_SUBJECT,
    OWNER,
    consumer,
    customer,
    lines,
    observed,
    plan_for,
)

EVERYBODY = [consumer(str(number), f"user-{number}") for number in range(40)]
RULES = MappingRules(owner_id=OWNER, group_by="none", templates=KEYED_BY_SUBJECT)


def state(*, renamed: int = 0) -> ObservedState:
    """All of EVERYBODY, some under an old name."""
    return observed(
        *(
            customer(
                f"consumer:{n}", f"consumer:{n}", name="old" if n < renamed else f"user-{n}", owner=OWNER
            )
            for n in range(40)
        )
    )


def plan(principals: list[Principal], there: ObservedState, policy: Policy = "sync") -> Plan:
    return plan_for(principals, there, rules=RULES, policy=policy)


def test_updates_beyond_the_share_stop_the_run_with_numbers_limit_and_flag() -> None:
    there = state(renamed=13)
    why = unsafe_reason(plan(EVERYBODY, there), there, Limits())
    assert why is not None
    for part in ("too many updates", "13 of 40 customers (32.5 %)", "30 %", "max_update_percent", "--force"):
        assert part in why
    with pytest.raises(UnsafePlanError, match="too many updates"):
        require_safe(plan(EVERYBODY, there), there, Limits())


@pytest.mark.parametrize("renamed", [0, 12])
def test_updates_up_to_the_share_pass(renamed: int) -> None:
    there = state(renamed=renamed)
    assert unsafe_reason(plan(EVERYBODY, there), there, Limits()) is None


def test_fewer_than_ten_pass_whatever_their_share() -> None:
    there = observed(*(customer(f"consumer:{n}", name="old", owner=OWNER) for n in range(9)))
    assert unsafe_reason(plan(EVERYBODY[:9], there), there, Limits()) is None
    assert unsafe_reason(plan(EVERYBODY[:9], there), there, Limits(min_changes=9)) is not None


def test_marks_count_as_removals_so_that_a_broken_source_shows_at_once() -> None:
    why = unsafe_reason(plan(EVERYBODY[:20], state()), state(), Limits())
    assert why is not None
    assert "too many removals: 20 of 40 subjects (50.0 %)" in why
    assert unsafe_reason(plan(EVERYBODY[:20], state(), "upsert-only"), state(), Limits()) is None


@pytest.mark.parametrize("tagged", [12, 13])
def test_moves_count_as_removals(tagged: int) -> None:
    people = [consumer(one.id, one.username, "customer:acme") for one in EVERYBODY[:tagged]]
    apart = observed(*(customer(f"c{n}", f"consumer:{n}", owner=OWNER) for n in range(40)))
    found = plan_for(people, apart, rules=BY_TAG, options=PlanOptions(allow_move=True))
    why = unsafe_reason(found, apart, Limits(max_update_percent=100))
    assert why is None if tagged == 12 else "13 of 40 subjects (32.5 %)" in (why or "")


def test_creations_do_not_count_as_updates() -> None:
    assert unsafe_reason(plan(EVERYBODY, observed()), observed(), Limits()) is None


def test_force_lifts_the_shares_but_not_the_cap() -> None:
    there = state(renamed=40)
    assert unsafe_reason(plan(EVERYBODY, there), there, Limits(), force=True) is None
    why = unsafe_reason(plan(EVERYBODY, there), there, Limits(max_changes=39), force=True)
    assert why == (
        "the plan has 40 changes, and guards.max_changes allows 39 in one run."
        " If this is intended, raise that setting"
    )
    assert unsafe_reason(plan(EVERYBODY, there), there, Limits(max_changes=40), force=True) is None


def test_customers_without_subjects_count_as_one_removal_each() -> None:
    bare = [customer(f"consumer-{number}", owner=OWNER) for number in range(10)]
    there = observed(*bare)
    why = unsafe_reason(plan([], there), there, Limits())
    assert why is not None
    assert "too many removals: 10 of 0 subjects (all)" in why
    assert unsafe_reason(plan([], observed(*bare[1:])), there, Limits()) is None


def test_while_a_source_is_empty_orphans_are_only_reported() -> None:
    gone = plan(EVERYBODY[:39], state())
    assert lines(gone) == ["mark-orphaned consumer:39 consumer:39"]
    withheld = withhold_for_empty_sources(gone, ["kong"])
    assert lines(withheld) == ["blocked -", "orphaned consumer:39 consumer:39"]
    assert "kong returned no principals" in withheld.changes[0].reason
    assert "--allow-empty" in withheld.changes[0].reason
    assert not withheld.actionable
    assert withhold_for_empty_sources(gone, []) is gone


def test_an_empty_source_still_lets_the_others_create() -> None:
    fresh = plan([consumer("new", "new")], state())
    assert [change.kind for change in withhold_for_empty_sources(fresh, ["kong"]).actionable] == [
        "create-customer"
    ]


ACME = [consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme", source="portal")]


def scoped(scope: Scope) -> list[str]:
    there = observed(
        customer("acme", "consumer:1", owner=OWNER),
        customer("consumer:3", "consumer:3", name="old", owner=OWNER),
        customer("consumer:9", "consumer:9", owner=OWNER),
    )
    principals = [*ACME, consumer("3", "carol"), consumer("4", "dave", source="portal")]
    full = plan_for(principals, there, rules=BY_TAG, policy="sync")
    return lines(restricted(full, scope, principals, BY_TAG))


def test_a_run_for_one_principal_changes_its_own_and_removes_nothing() -> None:
    assert scoped(Scope(principal="bob")) == ["attach-subjects acme consumer:2"]
    assert scoped(Scope(principal="3")) == ["rename-customer consumer:3"]
    assert scoped(Scope(source="portal")) == [
        "create-customer consumer:4 consumer:4",
        "attach-subjects acme consumer:2",
    ]
    assert scoped(Scope(source="portal", principal="dave")) == ["create-customer consumer:4 consumer:4"]


@pytest.mark.parametrize("kind", sorted(REMOVALS | {ChangeKind.ORPHANED}))
def test_a_run_for_one_principal_removes_nothing_of_its_own_either(kind: ChangeKind) -> None:
    alice = [consumer("1", "alice")]
    changes = tuple(Change(kind, "consumer:1", keys, "") for keys in (("consumer:1",), ()))
    full = Plan(OWNER, "sync", changes)
    assert restricted(full, Scope(principal="alice"), alice, BY_TAG).changes == ()


def test_what_is_blocked_for_another_member_of_a_group_does_not_concern_the_selected_one() -> None:
    blocked = tuple(Change(ChangeKind.BLOCKED, "acme", (key,), "") for key in ("consumer:1", "consumer:2"))
    cut = restricted(Plan(OWNER, "sync", blocked), Scope(principal="bob"), ACME, BY_TAG)
    assert lines(cut) == ["blocked acme consumer:2"]


def test_a_selected_principal_that_gets_no_subject_is_reported() -> None:
    rules = replace(BY_TAG, subject_field="username")
    nameless = consumer("5", None, custom_id="crm-5")
    full = plan_for([consumer("1", "alice"), nameless], observed(), rules=rules)
    (blocked,) = restricted(full, Scope(principal="5"), [consumer("1", "alice"), nameless], rules).changes
    assert "has no username" in blocked.reason


def test_without_a_selection_everything_stays() -> None:
    assert "mark-orphaned consumer:9 consumer:9" in scoped(Scope())


def test_a_selection_without_any_match_is_an_error() -> None:
    with pytest.raises(ScopeError, match="no principal matches source nowhere and principal bob") as caught:
        scoped(Scope("nowhere", "bob"))
    assert str(caught.value).endswith("The sources with principals: kong, portal")
