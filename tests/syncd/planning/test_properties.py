"""Properties of the planner over random desired and observed states, with few names so that they collide."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.apply.executor import apply_plan
from syncd.core.changes import ChangeKind, Plan, Status
from syncd.core.errors import ApplyStoppedError, UnreachableError
from syncd.core.model import ObservedCustomer, ObservedState, ObservedSubject, Principal
from syncd.core.ownership import is_adoptable, is_managed, ownership_metadata
from syncd.core.policy import Policy
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules, Templates
from syncd.metering.base import Decide, SubjectWrite
from syncd.planning.orphans import Grace
from syncd.planning.plan import PlanOptions, make_plan
from tests.syncd.builders import KEYED_BY_SUBJECT, OWNER, replace
from tests.syncd.memory_target import MemoryTarget

pytestmark = pytest.mark.slow

IDS = st.sampled_from(["1", "2", "3"])
KEYS = st.sampled_from(["acme", "globex", "s", "consumer:1", "consumer:2", "consumer:3", "app:1"])
NAMES = st.sampled_from(["alice", "bob", "ACME Inc."])
OWNERS = st.sampled_from([None, OWNER, "other"])
TAGS = st.lists(
    st.sampled_from(["gold", "customer:acme", "customer:globex", "customer:consumer:1"]), max_size=2
)

consumers = st.builds(
    Principal,
    kind=st.just("consumer"),
    id=IDS,
    source=st.sampled_from(["x", "y"]),
    username=st.one_of(st.none(), NAMES),
    custom_id=st.one_of(st.none(), NAMES),
    tags=TAGS.map(tuple),
    anonymous=st.booleans(),
)
applications = st.builds(
    Principal, kind=st.just("application"), id=IDS, source=st.just("portal"), username=NAMES
)
statics = st.builds(
    Principal,
    kind=st.just("static"),
    id=KEYS,
    source=st.just("static"),
    username=st.one_of(st.none(), NAMES),
    metadata=st.dictionaries(st.just("team"), st.sampled_from(["a", "b"])),
    customer=st.one_of(st.none(), KEYS),
)
principals = st.lists(st.one_of(consumers, applications, statics), max_size=6)
rules = st.builds(
    MappingRules,
    owner_id=st.just(OWNER),
    group_by=st.sampled_from(["none", "tag"]),
    subject_field=st.sampled_from(["id", "username", "custom_id", "tag"]),
    include_anonymous=st.booleans(),
    templates=st.sampled_from([KEYED_BY_SUBJECT, Templates()]),
)
policies = st.sampled_from(["upsert-only", "create-only"])
all_policies = st.sampled_from(["create-only", "upsert-only", "sync"])
DAY_ZERO = datetime(2026, 1, 1, tzinfo=UTC)


def at(day: int, delete_after: timedelta | None = None, *, flags: bool = True) -> PlanOptions:
    grace = Grace(DAY_ZERO + timedelta(days=day), timedelta(days=40), delete_after)
    return PlanOptions(adopt=flags, allow_move=flags, grace=grace)


@st.composite
def double_counting(draw: st.DrawFn, customers: list[ObservedCustomer]) -> list[ObservedCustomer]:
    """Make one customer's key a subject of another one, so that usage is counted for both."""
    named = [one for one in customers if one.key and one.key not in one.subject_keys]
    if not named or len(customers) < 2:
        return customers
    key = draw(st.sampled_from(named)).key
    carrier = draw(st.sampled_from([one for one in customers if one.key != key]))
    both = replace(carrier, subject_keys=(*carrier.subject_keys, key or ""))
    return [both if one is carrier else one for one in customers]


def double_counted(customers: Iterable[ObservedCustomer]) -> set[str]:
    """The subjects whose usage is counted for two customers."""
    names = Counter(name for one in customers for name in {one.id, one.key, *one.subject_keys} if name)
    return {name for name, times in names.items() if times > 1}


@st.composite
def observed_states(draw: st.DrawFn) -> ObservedState:
    """A state that the server would allow: unique keys and subjects, but a subject may be another's key."""
    keys = ["acme", "globex", "s", "consumer:1", "consumer:2", "consumer-2", "app:1", "by-hand"]
    free = draw(st.permutations(keys))
    customers: list[ObservedCustomer] = []
    for _ in range(draw(st.integers(0, 4))):
        if not free:
            break
        count = draw(st.integers(1, min(3, len(free))))
        taken, free = free[:count], free[count:]
        owner = draw(OWNERS)
        own_key = draw(st.booleans())
        customers.append(
            ObservedCustomer(
                id=f"id-{len(customers)}",
                key=taken[0] if own_key else None,
                name=draw(NAMES),
                subject_keys=tuple(taken[1:] if own_key and draw(st.booleans()) else taken),
                metadata={"plan": "gold", **(ownership_metadata(owner, "1") if owner else {})},
                active_subscription=draw(st.sampled_from([None, None, "SUB"])),
            )
        )
    if draw(st.integers(0, 3)) == 0:
        customers = draw(double_counting(customers))
    if not draw(st.booleans()):
        return ObservedState(tuple(customers), None)
    entities = draw(st.dictionaries(KEYS, st.tuples(st.one_of(st.none(), NAMES), OWNERS), max_size=4))
    subjects = tuple(
        ObservedSubject(key, name, {"crm": "7", **ownership_metadata(owner, "1")} if owner else {})
        for key, (name, owner) in entities.items()
    )
    return ObservedState(tuple(customers), subjects)


@settings(max_examples=300, deadline=None)
@given(principals, observed_states(), rules, policies)
def test_after_applying_there_is_nothing_left_to_apply_and_a_second_run_writes_nothing(
    wanted: list[Principal], start: ObservedState, how: MappingRules, policy: str
) -> None:
    target = MemoryTarget(start)
    desired = desired_state(wanted, how)
    first = make_plan(desired, target.observe(), owner_id=OWNER, policy=policy)  # type: ignore[arg-type]
    outcomes = apply_plan(first, target)
    assert {outcome.status for outcome in outcomes if outcome.change.actionable} <= {Status.DONE}
    writes = target.writes
    second = make_plan(desired, target.observe(), owner_id=OWNER, policy=policy)  # type: ignore[arg-type]
    assert second.actionable == ()
    apply_plan(second, target)
    assert target.writes == writes


@settings(max_examples=300, deadline=None)
@given(principals, observed_states(), rules, all_policies, st.integers(0, 60), st.booleans())
def test_no_run_causes_double_counting_and_existing_double_counting_is_reported_with_both_customers(
    wanted: list[Principal], start: ObservedState, how: MappingRules, policy: Policy, day: int, flags: bool
) -> None:
    target = MemoryTarget(start)
    desired = desired_state(wanted, how)
    options = at(day, timedelta(days=40), flags=flags)
    plan = make_plan(desired, start, owner_id=OWNER, policy=policy, options=options)
    apply_plan(plan, target, remover=target)
    assert double_counted(target.customers.values()) <= double_counted(start.customers)
    named = {subject.key for customer in desired.customers for subject in customer.subjects}
    blocked = [(change.subject_keys, change.reason) for change in plan.of(ChangeKind.BLOCKED)]
    for key in double_counted(start.customers):
        both = [one for one in start.customers if key in (one.key, *one.subject_keys)]
        if key in named or any(is_managed(one.metadata, OWNER) for one in both):
            assert any(
                key in keys and all(repr(one.key or one.id) in reason for one in both)
                for keys, reason in blocked
            )


@settings(max_examples=300, deadline=None)
@given(principals, observed_states(), rules)
def test_unmanaged_customers_and_entities_are_never_changed(
    wanted: list[Principal], start: ObservedState, how: MappingRules
) -> None:
    target = MemoryTarget(start)
    plan = make_plan(desired_state(wanted, how), start, owner_id=OWNER, policy="upsert-only")
    apply_plan(plan, target)
    for before in start.customers:
        after = target.customers[before.id]
        if is_managed(before.metadata, OWNER):
            assert after.key == before.key
            assert after.metadata == before.metadata
            assert after.subject_keys[: len(before.subject_keys)] == before.subject_keys
        else:
            assert after == before
    kept = {subject.key: subject for subject in target.subjects() or ()}
    for entity in start.subjects or ():
        if entity.metadata and not is_managed(entity.metadata, OWNER):
            assert kept[entity.key] == entity


@settings(max_examples=200, deadline=None)
@given(principals, observed_states(), rules, st.randoms(use_true_random=False))
def test_the_order_of_principals_and_pages_never_matters(
    wanted: list[Principal], start: ObservedState, how: MappingRules, shuffler: random.Random
) -> None:
    plan = make_plan(desired_state(wanted, how), start, owner_id=OWNER, policy="upsert-only")
    principals, customers = list(wanted), list(start.customers)
    shuffler.shuffle(principals)
    shuffler.shuffle(customers)
    shuffled = ObservedState(tuple(customers), start.subjects)
    again = make_plan(desired_state(principals, how), shuffled, owner_id=OWNER, policy="upsert-only")
    assert again.to_json() == plan.to_json()


@settings(max_examples=200, deadline=None)
@given(principals, observed_states(), rules, st.integers(0, 5))
def test_a_run_that_was_stopped_is_completed_by_the_next_one(
    wanted: list[Principal], start: ObservedState, how: MappingRules, steps: int
) -> None:
    desired = desired_state(wanted, how)

    def plan(target: MemoryTarget, keep: int | None = None) -> None:
        full = make_plan(desired, target.observe(), owner_id=OWNER, policy="upsert-only")
        changes = full.changes if keep is None else full.actionable[:keep]
        apply_plan(type(full)(OWNER, "upsert-only", changes), target)

    stopped, straight = MemoryTarget(start), MemoryTarget(start)
    plan(stopped, steps)
    plan(stopped)
    plan(straight)

    def content(target: MemoryTarget) -> object:
        customers = sorted((c.key or c.id, c.name, c.subject_keys) for c in target.customers.values())
        return customers, sorted((s.key, s.display_name or "") for s in target.subjects() or ())

    assert content(stopped) == content(straight)


@given(principals, observed_states(), rules)
def test_every_principal_is_accounted_for(
    wanted: list[Principal], start: ObservedState, how: MappingRules
) -> None:
    desired = desired_state(wanted, how)
    plan = make_plan(desired, start, owner_id=OWNER, policy="upsert-only")
    spoken_of = {key for change in plan.changes for key in change.subject_keys}
    settled = {key for c in start.customers for key in (*c.subject_keys, c.key)}
    for customer in desired.customers:
        for subject in customer.subjects:
            assert subject.key in spoken_of | settled
    assert len(plan.of(ChangeKind.BLOCKED)) >= len(desired.problems)


FREEING = {ChangeKind.DETACH_SUBJECTS, ChangeKind.DELETE_CUSTOMER, ChangeKind.MOVE_SUBJECTS}
graces = st.sampled_from([None, timedelta(days=40), timedelta(days=100)])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(principals, min_size=1, max_size=3),
    observed_states(),
    rules,
    st.lists(st.tuples(all_policies, st.integers(0, 60)), min_size=3, max_size=6),
    graces,
    st.booleans(),
)
def test_with_time_passing_and_principals_coming_and_going_each_run_leaves_nothing_to_apply(
    casts: list[list[Principal]],
    start: ObservedState,
    how: MappingRules,
    runs: list[tuple[Policy, int]],
    delete_after: timedelta | None,
    flags: bool,
) -> None:
    target, day = MemoryTarget(start), 0
    for number, (policy, passed) in enumerate(runs):
        day += passed
        desired = desired_state(casts[number % len(casts)], how)
        options = at(day, delete_after, flags=flags)
        plan = make_plan(desired, target.observe(), owner_id=OWNER, policy=policy, options=options)
        outcomes = apply_plan(plan, target, remover=target)
        assert {outcome.status for outcome in outcomes if outcome.change.actionable} <= {Status.DONE}
        again = make_plan(desired, target.observe(), owner_id=OWNER, policy=policy, options=options)
        if any(change.kind in FREEING for change in plan.changes):
            # A key that this run freed may have blocked a creation.
            apply_plan(again, target, remover=target)
            again = make_plan(desired, target.observe(), owner_id=OWNER, policy=policy, options=options)
        assert again.actionable == ()
        for before in start.customers:
            adopted = flags and is_adoptable(before.metadata)
            if not is_managed(before.metadata, OWNER) and not adopted:
                assert target.customers[before.id] == before


class Broken(MemoryTarget):
    """Fails for good after as many writes as its budget allows."""

    budget = 10**6

    def _spend(self) -> None:
        self.budget -= 1
        if self.budget < 0:
            raise UnreachableError("cut")

    def create_customer(self, *args: Any, **kwargs: Any) -> None:
        self._spend()
        super().create_customer(*args, **kwargs)

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        self._spend()
        return super().edit_customer(customer_id, decide)

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        self._spend()
        super().write_subjects(writes)

    def delete_customer(self, *args: Any) -> bool:
        self._spend()
        return super().delete_customer(*args)


@settings(max_examples=150, deadline=None)
@given(principals, principals, observed_states(), rules, st.integers(0, 8))
def test_a_sync_run_that_was_interrupted_after_any_write_is_completed_by_the_next(
    first: list[Principal], then: list[Principal], start: ObservedState, how: MappingRules, writes: int
) -> None:
    def run(target: MemoryTarget, cast: list[Principal], day: int) -> None:
        options = at(day, timedelta(days=40))
        desired = desired_state(cast, how)
        plan = make_plan(desired, target.observe(), owner_id=OWNER, policy="sync", options=options)
        apply_plan(plan, target, remover=target)

    cut, straight = Broken(start), MemoryTarget(start)
    for target in (cut, straight):
        run(target, first, 0)
        run(target, then, 0)
    cut.budget = writes
    with suppress(ApplyStoppedError):
        run(cut, then, 40)
    cut.budget = 10**6
    # Twice: the first run attaches a subject that was detached before the cut, and then its old customer
    # is marked.
    for target in (cut, cut, straight, straight):
        run(target, then, 40)

    def content(target: MemoryTarget) -> object:
        customers = (
            (c.key or c.id, c.name, tuple(sorted(c.subject_keys)), sorted(c.metadata.items()))
            for c in target.customers.values()
        )
        return sorted(customers), sorted((s.key, s.display_name or "") for s in target.subjects() or ())

    assert content(cut) == content(straight)


@st.composite
def states_grouped_later(draw: st.DrawFn) -> tuple[ObservedState, list[Principal], MappingRules]:
    """All principals have their own customer, some with subscriptions; now a tag groups them."""
    people = draw(st.lists(st.one_of(consumers, applications), min_size=2, max_size=5))
    alone = replace(draw(rules), group_by="none", subject_field="id")
    target = MemoryTarget(draw(observed_states()))
    begin = make_plan(desired_state(people, alone), target.observe(), owner_id=OWNER, policy="upsert-only")
    apply_plan(begin, target)
    for identity, customer in target.customers.items():
        paying = draw(st.sampled_from([None, None, None, "SUB"]))
        target.customers[identity] = replace(customer, active_subscription=paying)
    tags = st.sampled_from([(), ("customer:acme",), ("customer:globex",)])
    return target.observe(), [replace(one, tags=draw(tags)) for one in people], replace(alone, group_by="tag")


def billed(target: MemoryTarget) -> set[str]:
    """The subjects whose usage is billed to some customer."""
    return {key for c in target.customers.values() for key in (c.key, *c.subject_keys) if key}


@settings(max_examples=300, deadline=None)
@given(states_grouped_later(), st.integers(0, 8), st.booleans())
def test_moves_lose_no_usage_however_often_they_are_interrupted(
    began: tuple[ObservedState, list[Principal], MappingRules], writes: int, move: bool
) -> None:
    start, wanted, how = began

    def plan(target: MemoryTarget) -> Plan:
        options = PlanOptions(allow_move=move)
        desired = desired_state(wanted, how)
        return make_plan(desired, target.observe(), owner_id=OWNER, policy="upsert-only", options=options)

    start_ids = {customer.id for customer in start.customers}
    cut, straight = Broken(start), MemoryTarget(start)
    cut.budget = writes
    with suppress(ApplyStoppedError):
        apply_plan(plan(cut), cut, remover=cut)
    cut.budget = 10**6
    for target in (cut, straight):
        outcomes = apply_plan(plan(target), target, remover=target)
        assert {outcome.status for outcome in outcomes if outcome.change.actionable} <= {Status.DONE}
        assert plan(target).actionable == ()
        assert billed(MemoryTarget(start)) <= billed(target)
        assert start_ids <= target.customers.keys()

    def content(target: MemoryTarget) -> object:
        return sorted((c.key or c.id, c.name, sorted(c.subject_keys)) for c in target.customers.values())

    assert content(cut) == content(straight)
