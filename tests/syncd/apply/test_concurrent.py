"""Concurrent changes: the same state as one at a time, and no more requests at once than allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.apply.executor import apply_plan
from syncd.core.changes import Change, ChangeKind, EntityState, Outcome, Plan, Status
from syncd.core.errors import ApplyStoppedError, RefusedError, UnreachableError
from syncd.core.model import CustomerDetails, ObservedCustomer, ObservedState, Principal
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules
from syncd.metering.base import Decide, SubjectWrite
from syncd.metering.v1 import OpenMeterV1
from syncd.planning.plan import PlanOptions, make_plan
from tests.syncd.builders import OWNER, customer, observed
from tests.syncd.memory_target import MemoryTarget
from tests.syncd.planning.test_properties import at, observed_states, principals, rules, states_grouped_later
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

AT_ONCE = 4


class Racing(MemoryTarget):
    """Yields to other threads wherever it can, and fails if two of them write the same customer.

    Fails every write once its budget is used up; `refused` are keys for which it refuses a creation.
    """

    def __init__(self, state: ObservedState, refused: frozenset[str] = frozenset()) -> None:
        super().__init__(state)
        self.budget = 10**6
        self._refused = refused
        self._data = threading.RLock()
        self._touched: set[str] = set()

    @contextmanager
    def _touching(self, name: str) -> Iterator[None]:
        with self._data:
            self.budget -= 1
            if self.budget < 0:
                raise UnreachableError("cut")
            assert name not in self._touched, f"two threads with {name}"
            self._touched.add(name)
        time.sleep(0)
        try:
            with self._data:
                yield
        finally:
            time.sleep(0)
            with self._data:
                self._touched.remove(name)

    def _add(self, new: ObservedCustomer, details: CustomerDetails) -> None:
        with self._touching(new.key or ""):
            if new.key in self._refused:
                raise RefusedError("no", status=400, detail="no")
            super()._add(new, details)

    def edit_customer(self, customer_id: str, decide: Decide) -> bool:
        with self._touching(customer_id):
            return super().edit_customer(customer_id, decide)

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        with self._touching(f"subject {writes[0].key}" if writes else ""):
            super().write_subjects(writes)

    def delete_customer(self, customer_id: str, check: Callable[[ObservedCustomer], None]) -> bool:
        with self._touching(customer_id):
            return super().delete_customer(customer_id, check)


def content(target: MemoryTarget) -> object:
    customers = (
        (c.key or c.id, c.name, tuple(sorted(c.subject_keys)), sorted(c.metadata.items()))
        for c in target.customers.values()
    )
    return sorted(customers), sorted((s.key, s.display_name or "") for s in target.subjects() or ())


def run(target: MemoryTarget, cast: list[Principal], how: MappingRules, day: int) -> tuple[Outcome, ...]:
    """A run of policy sync with all flags."""
    desired = desired_state(cast, how)
    options = at(day, timedelta(days=40))
    plan = make_plan(desired, target.observe(), owner_id=OWNER, policy="sync", options=options)
    outcomes = apply_plan(plan, target, remover=target, concurrency=AT_ONCE)
    order = {id(change): index for index, change in enumerate(plan.changes)}
    places = [order[id(outcome.change)] for outcome in outcomes if id(outcome.change) in order]
    assert places == sorted(places)
    return outcomes


@settings(max_examples=100, deadline=None)
@given(principals, principals, observed_states(), rules, st.integers(0, 8))
def test_a_run_interrupted_after_any_write_and_repeated_reaches_the_state_of_an_uninterrupted_one(
    first: list[Principal], then: list[Principal], start: ObservedState, how: MappingRules, writes: int
) -> None:
    cut, straight = Racing(start), Racing(start)
    for target in (cut, straight):
        run(target, first, how, 0)
        run(target, then, how, 0)
    cut.budget = writes
    with suppress(ApplyStoppedError):
        run(cut, then, how, 40)
    cut.budget = 10**6
    for target in (cut, cut, straight, straight):
        run(target, then, how, 40)
    assert content(cut) == content(straight)


@settings(max_examples=100, deadline=None)
@given(states_grouped_later(), st.booleans())
def test_concurrent_changes_reach_the_same_state_as_one_at_a_time(
    began: tuple[ObservedState, list[Principal], MappingRules], move: bool
) -> None:
    start, wanted, how = began
    options = PlanOptions(allow_move=move)
    desired = desired_state(wanted, how)
    plan = make_plan(desired, start, owner_id=OWNER, policy="upsert-only", options=options)
    together, alone = Racing(start), MemoryTarget(start)
    outcomes = apply_plan(plan, together, remover=together, concurrency=AT_ONCE)
    assert outcomes == apply_plan(plan, alone, remover=alone)
    assert content(together) == content(alone)


def test_two_refused_changes_put_their_subjects_back_on_the_same_customer_one_after_the_other() -> None:
    names = [f"k{number}" for number in range(8)]
    old = customer("old", *names, owner=OWNER)
    target = Racing(observed(old), refused=frozenset(f"new-{name}" for name in names))
    moves = [
        Change(ChangeKind.MOVE_SUBJECTS, "old", (name,), "", old.id, to_customer_key=f"new-{name}")
        for name in names
    ]
    creates = [
        Change(ChangeKind.CREATE_CUSTOMER, f"new-{name}", (name,), "", after=EntityState("x", (name,), {}))
        for name in names
    ]
    outcomes = apply_plan(Plan(OWNER, "upsert-only", (*moves, *creates)), target, concurrency=8)
    assert [outcome.status for outcome in outcomes] == [Status.DONE] * 8 + [Status.BLOCKED] * 8
    assert sorted(target.customers[old.id].subject_keys) == names


def creations(count: int) -> Plan:
    changes = (
        Change(
            ChangeKind.CREATE_CUSTOMER,
            f"c{n:03}",
            (f"s{n:03}",),
            "",
            after=EntityState("x", (f"s{n:03}",), {}),
        )
        for n in range(count)
    )
    return Plan(OWNER, "upsert-only", tuple(changes))


def target_at(url: str, attempts: int = 3) -> closing[OpenMeterV1]:
    endpoint = Endpoint("metering", url, "metering.token", "write")
    return closing(OpenMeterV1(endpoint, Retry(attempts=attempts)))


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_the_server_gets_as_many_requests_at_once_as_allowed_and_never_more(concurrency: int) -> None:
    changed, inside, most = threading.Condition(), 0, 0

    def answer(_asked: Asked) -> Answer:
        nonlocal inside, most
        with changed:
            inside += 1
            most = max(most, inside)
            changed.notify_all()
            changed.wait_for(lambda: most >= concurrency, timeout=10)
            inside -= 1
        return Answer({}, 201)

    with serving(answer) as server, target_at(server.url) as target:
        outcomes = apply_plan(creations(30), target, concurrency=concurrency)
    assert {outcome.status for outcome in outcomes} == {Status.DONE}
    assert most == concurrency


def test_outcomes_are_reported_as_they_happen_and_returned_in_the_order_of_the_plan() -> None:
    others = threading.Semaphore(0)

    def answer(asked: Asked) -> Answer:
        assert isinstance(asked.body, dict)
        if asked.body["key"] == "c000":
            for _ in range(5):
                assert others.acquire(timeout=10)
        else:
            others.release()
        return Answer({}, 201)

    reported: list[str | None] = []
    with serving(answer) as server, target_at(server.url) as target:
        outcomes = apply_plan(
            creations(6),
            target,
            concurrency=2,
            report=lambda some: reported.extend(one.change.customer_key for one in some),
        )
    assert [outcome.change.customer_key for outcome in outcomes] == [f"c{n:03}" for n in range(6)]
    assert sorted(filter(None, reported)) == [f"c{n:03}" for n in range(6)]
    assert reported.index("c000") >= 4


def test_no_thread_sends_a_request_before_a_retry_after_is_over() -> None:
    lock, seen, limited_at = threading.Lock(), [], 0.0

    def answer(_asked: Asked) -> Answer:
        nonlocal limited_at
        with lock:
            seen.append(time.monotonic())
            if len(seen) == 12:
                limited_at = time.monotonic()
                return Answer({}, 429, {"Retry-After": "1"})
        return Answer({}, 201)

    with serving(answer) as server, target_at(server.url) as target:
        apply_plan(creations(60), target, concurrency=6)
    assert len(seen) == 61
    # Requests that were already sent arrive within a moment.
    assert [when for when in seen if limited_at + 0.3 < when < limited_at + 0.95] == []


def test_a_throttled_request_is_not_crowded_out_by_the_others() -> None:
    lock, window, left = threading.Lock(), 0.0, 0

    def answer(_asked: Asked) -> Answer:
        nonlocal window, left
        with lock:
            if time.monotonic() >= window:
                window, left = time.monotonic() + 0.1, 3
            left -= 1
            if left < 0:
                return Answer({}, 429, {"Retry-After": "0.1"})
        return Answer({}, 201)

    with serving(answer) as server, target_at(server.url, attempts=4) as target:
        outcomes = apply_plan(creations(60), target, concurrency=16)
    assert {outcome.status for outcome in outcomes} == {Status.DONE}


def test_a_refused_token_ends_the_run_once_with_at_most_the_running_requests() -> None:
    with (
        serving(lambda _asked: Answer({}, 401)) as server,
        target_at(server.url) as target,
        pytest.raises(ApplyStoppedError, match=r"metering\.token") as caught,
    ):
        apply_plan(creations(50), target, concurrency=5)
    assert caught.value.outcomes == ()
    assert len(server.asked) <= 5
