from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import httpx
import pytest

from syncd.apply.executor import apply_plan
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.errors import ApplyStoppedError, UnreachableError
from syncd.core.model import NO_DETAILS, CustomerDetails, ObservedCustomer, ObservedSubject, Principal
from syncd.mapping.desired_state import desired_state
from syncd.metering.base import SubjectWrite
from syncd.metering.v1 import OpenMeterV1
from syncd.planning.plan import PlanOptions, make_plan
from syncd.sandbox.testing import running_sandbox
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, observed, plan_for, replace
from tests.syncd.memory_target import MemoryTarget
from tests.syncd.targets import OWNERSHIP, Target, by_hand, fault, open_target, target_at

pytestmark = pytest.mark.slow

ALICE, BOB, CAROL = consumer("1", "alice"), consumer("2", "bob"), consumer("3", "carol")
ACME = [consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme")]


@pytest.fixture
def customers_path(dialect: str) -> str:
    return "/api/v1/customers" if dialect == "openmeter-v1" else "/api/v3/openmeter/customers"


@pytest.fixture
def target(sandbox: httpx.Client, dialect: str) -> Iterator[Target]:
    target = open_target(dialect, str(sandbox.base_url))
    yield target
    target.close()


@pytest.fixture
def v1(sandbox: httpx.Client) -> Iterator[OpenMeterV1]:
    """The dialect with subject entities."""
    target = target_at(str(sandbox.base_url))
    yield target
    target.close()


def plan(target: Target, *principals: Principal) -> Plan:
    return make_plan(
        desired_state(principals, BY_TAG), target.observe(), owner_id=OWNER, policy="upsert-only"
    )


def statuses(outcomes: tuple[Outcome, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for outcome in outcomes:
        found.setdefault(f"{outcome.change.kind} {outcome.change.customer_key}", []).append(
            str(outcome.status)
        )
    return found


def customers(sandbox: httpx.Client) -> dict[str, dict[str, object]]:
    items = sandbox.get("/api/v1/customers", params={"pageSize": 1000}).json()["items"]
    return {customer["key"]: customer for customer in items}


def test_applying_reaches_the_desired_state_and_the_second_plan_is_empty(
    target: Target, sandbox: httpx.Client
) -> None:
    outcomes = apply_plan(plan(target, *ACME, CAROL), target)
    assert {outcome.status for outcome in outcomes} == {Status.DONE}
    assert customers(sandbox)["acme"]["usageAttribution"] == {"subjectKeys": ["consumer:1", "consumer:2"]}
    assert customers(sandbox)["consumer:3"]["name"] == "carol"
    assert plan(target, *ACME, CAROL).changes == ()


def test_a_creation_whose_answer_was_lost_is_recognised(
    target: Target, sandbox: httpx.Client, customers_path: str
) -> None:
    first = plan(target, ALICE)
    fault(sandbox, method="POST", path=customers_path, action="accept_then_cut", count=1)
    outcomes = apply_plan(first, target)
    assert statuses(outcomes)["create-customer consumer:1"] == ["unchanged"]
    assert len(customers(sandbox)) == 1


def test_a_creation_that_timed_out_after_it_was_accepted_is_recognised(
    sandbox: httpx.Client, dialect: str, customers_path: str
) -> None:
    target = open_target(dialect, str(sandbox.base_url), timeout=0.3)
    first = plan(target, ALICE)
    fault(sandbox, method="POST", path=customers_path, action="accept_then_timeout", count=1)
    outcomes = apply_plan(first, target)
    target.close()
    assert statuses(outcomes)["create-customer consumer:1"] == ["unchanged"]
    assert len(customers(sandbox)) == 1


def test_a_creation_by_another_syncd_of_the_same_owner_is_no_conflict(
    target: Target, sandbox: httpx.Client
) -> None:
    late = plan(target, ALICE)
    apply_plan(plan(target, ALICE), target)
    assert {outcome.status for outcome in apply_plan(late, target)} == {Status.UNCHANGED}


def test_a_customer_that_someone_created_since_the_plan_blocks_ours_and_the_rest_goes_on(
    v1: OpenMeterV1, sandbox: httpx.Client
) -> None:
    late = plan(v1, ALICE, BOB)
    by_hand(sandbox, key="consumer:1", name="Alice GmbH")
    outcomes = apply_plan(late, v1)
    found = statuses(outcomes)
    assert "was created by someone else" in outcomes[0].detail
    assert found["create-customer consumer:1"] == ["blocked"]
    assert found["upsert-subject consumer:1"] == ["skipped"]
    assert found["create-customer consumer:2"] == ["done"]
    assert customers(sandbox)["consumer:1"]["name"] == "Alice GmbH"


def test_a_managed_customer_that_was_created_with_other_subjects_since_the_plan_is_blocked(
    target: Target, sandbox: httpx.Client
) -> None:
    late = plan(target, *ACME)
    apply_plan(plan(target, ACME[0]), target)
    found = apply_plan(late, target)
    assert statuses(found)["create-customer acme"] == ["blocked"]
    assert "plan again" in found[0].detail
    assert plan(target, *ACME).of(ChangeKind.ATTACH_SUBJECTS)


def test_a_subject_that_someone_attached_elsewhere_since_the_plan_is_blocked(
    target: Target, sandbox: httpx.Client
) -> None:
    apply_plan(plan(target, ACME[0]), target)
    late = plan(target, *ACME)
    by_hand(sandbox, key="finance", name="x", usageAttribution={"subjectKeys": ["consumer:2"]})
    found = apply_plan(late, target)
    assert statuses(found)["attach-subjects acme"] == ["blocked"]
    assert "conflict" in found[0].detail


def test_a_subscription_that_began_since_the_plan_blocks_the_attachment(
    target: Target, sandbox: httpx.Client
) -> None:
    apply_plan(plan(target, ACME[0]), target)
    late = plan(target, *ACME)
    sandbox.post("/sandbox/v1/customers/acme/subscriptions").raise_for_status()
    found = apply_plan(late, target)
    assert statuses(found)["attach-subjects acme"] == ["blocked"]
    assert "Attach the subject by hand between two subscriptions" in found[0].detail


def test_an_attachment_keeps_edits_by_people_since_the_plan(target: Target, sandbox: httpx.Client) -> None:
    apply_plan(plan(target, ACME[0]), target)
    late = plan(target, *ACME)
    there = customers(sandbox)["acme"]
    edited = {"key": "acme", "name": "ACME Inc.", "description": "Ask Jane", "metadata": there["metadata"]}
    edited["usageAttribution"] = {"subjectKeys": ["by-hand", "consumer:1"]}
    sandbox.put(f"/api/v1/customers/{there['id']}", json=edited).raise_for_status()
    apply_plan(late, target)
    after = customers(sandbox)["acme"]
    assert (after["name"], after["description"]) == ("ACME Inc.", "Ask Jane")
    assert after["usageAttribution"] == {"subjectKeys": ["by-hand", "consumer:1", "consumer:2"]}


@pytest.mark.parametrize("changed", [consumer("1", "alicia"), None])
def test_a_customer_that_got_another_owner_since_the_plan_is_not_changed(
    target: Target, sandbox: httpx.Client, changed: Principal | None
) -> None:
    apply_plan(plan(target, ALICE if changed else ACME[0]), target)
    late = plan(target, changed) if changed else plan(target, *ACME)
    (there,) = customers(sandbox).values()
    taken = {name: there[name] for name in ("key", "name", "usageAttribution")}
    taken["metadata"] = {**OWNERSHIP, "sync-owner": "someone-else"}
    sandbox.put(f"/api/v1/customers/{there['id']}", json=taken).raise_for_status()
    found = apply_plan(late, target)
    assert found[0].status is Status.BLOCKED
    assert "someone-else" in found[0].detail
    (after,) = customers(sandbox).values()
    assert {name: after[name] for name in taken} == taken


def test_a_refused_change_is_blocked_with_the_servers_message_and_the_rest_goes_on(
    target: Target, sandbox: httpx.Client, customers_path: str
) -> None:
    first = plan(target, ALICE, BOB)
    fault(sandbox, method="POST", path=customers_path, status=400, count=1)
    found = apply_plan(first, target)
    assert statuses(found)["create-customer consumer:1"] == ["blocked"]
    assert statuses(found)["create-customer consumer:2"] == ["done"]
    assert "refused it" in found[0].detail


def test_a_limit_of_subjects_on_one_customer_blocks_what_is_beyond_it() -> None:
    with running_sandbox(max_subjects_per_customer=1) as url:
        target = target_at(url)
        apply_plan(plan(target, ACME[0]), target)
        found = apply_plan(plan(target, *ACME), target)
        target.close()
    assert statuses(found)["attach-subjects acme"] == ["blocked"]


def test_a_metering_api_that_goes_away_stops_the_run_with_the_outcomes_so_far(
    target: Target, sandbox: httpx.Client
) -> None:
    first = plan(target, ALICE, BOB, CAROL)

    def break_down(outcomes: Sequence[Outcome]) -> None:
        if outcomes[-1].change.customer_key == "consumer:2":
            fault(sandbox, action="cut")

    with pytest.raises(ApplyStoppedError, match="did not answer") as caught:
        apply_plan(first, target, report=break_down)
    assert [outcome.change.customer_key for outcome in caught.value.outcomes] == ["consumer:1", "consumer:2"]
    sandbox.delete("/sandbox/v1/faults").raise_for_status()
    apply_plan(plan(target, ALICE, BOB, CAROL), target)
    assert sorted(customers(sandbox)) == ["consumer:1", "consumer:2", "consumer:3"]


def test_a_token_that_is_revoked_while_applying_stops_the_run(target: Target, sandbox: httpx.Client) -> None:
    first = plan(target, ALICE, BOB)
    fault(sandbox, method="POST", status=401)
    with pytest.raises(ApplyStoppedError, match=r"metering\.token") as caught:
        apply_plan(first, target)
    assert caught.value.outcomes == ()


def test_a_request_to_stop_is_obeyed_between_two_changes(target: Target, sandbox: httpx.Client) -> None:
    def is_begun() -> bool:
        return bool(customers(sandbox))

    with pytest.raises(ApplyStoppedError, match="stopped by request between two changes") as caught:
        apply_plan(plan(target, ALICE, BOB), target, should_stop=is_begun)
    assert len(caught.value.outcomes) == 1
    assert list(customers(sandbox)) == ["consumer:1"]


def test_a_request_to_stop_during_planning_changes_nothing(target: Target, sandbox: httpx.Client) -> None:
    with pytest.raises(ApplyStoppedError, match="stopped by request before its first change") as caught:
        apply_plan(plan(target, ALICE, BOB), target, concurrency=4, should_stop=lambda: True)
    assert caught.value.outcomes == ()
    assert not customers(sandbox)
    apply_plan(plan(target, ALICE, BOB), target)
    assert not apply_plan(plan(target, ALICE, BOB), target, should_stop=lambda: True)


def test_changes_that_the_plan_blocks_are_outcomes_too(target: Target, sandbox: httpx.Client) -> None:
    by_hand(sandbox, key="acme", name="ACME")
    assert statuses(apply_plan(plan(target, *ACME), target)) == {"blocked acme": ["blocked", "blocked"]}


def test_a_subject_entity_that_someone_wrote_since_the_plan_is_left_alone(
    v1: OpenMeterV1, sandbox: httpx.Client
) -> None:
    late = plan(v1, ALICE)
    v1.write_subjects([SubjectWrite("consumer:1", "Alice GmbH", {"crm": "7"})])
    found = statuses(apply_plan(late, v1))
    assert found["upsert-subject consumer:1"] == ["unchanged"]
    assert v1.subjects() == (ObservedSubject("consumer:1", "Alice GmbH", {"crm": "7"}),)


def test_other_metadata_of_a_managed_subject_entity_survive(v1: OpenMeterV1) -> None:
    apply_plan(plan(v1, ALICE), v1)
    v1.write_subjects([SubjectWrite("consumer:1", None, {**OWNERSHIP, "crm": "7"})])
    apply_plan(plan(v1, consumer("1", "alicia")), v1)
    (entity,) = v1.subjects() or ()
    assert (entity.display_name, entity.metadata["crm"]) == ("alicia", "7")


def test_one_refused_subject_entity_does_not_stop_the_others(v1: OpenMeterV1, sandbox: httpx.Client) -> None:
    first = plan(v1, ALICE, BOB)
    # The batch is refused, then the first single write.
    fault(sandbox, method="POST", path="/api/v1/subjects", status=400, count=2)
    found = statuses(apply_plan(first, v1))
    assert found["upsert-subject consumer:1"] == ["blocked"]
    assert found["upsert-subject consumer:2"] == ["done"]


def test_many_subject_entities_are_written_in_few_requests(v1: OpenMeterV1, sandbox: httpx.Client) -> None:
    everybody = [consumer(str(number), f"user-{number}") for number in range(101)]
    first = plan(v1, *everybody)
    sandbox.get("/sandbox/v1/stats")
    apply_plan(first, v1)
    requests = sandbox.get("/sandbox/v1/stats").json()["requests_by_endpoint"]
    assert requests["POST /api/v1/subjects"] == 2
    assert plan(v1, *everybody).changes == ()


def test_a_reported_change_is_never_applied(target: Target) -> None:
    reported = tuple(
        Change(kind, "x", ("y",), "because") for kind in (ChangeKind.UNMANAGED, ChangeKind.ORPHANED)
    )
    assert apply_plan(Plan(OWNER, "upsert-only", reported), target) == ()


class Poisoned(MemoryTarget):
    """Answers 500 to every creation of some customers, as OpenMeter does to a NUL in a key."""

    def __init__(self, *poisoned: str) -> None:
        super().__init__(observed(subjects=()))
        self._poisoned = poisoned

    def create_customer(
        self,
        key: str,
        name: str,
        subject_keys: Sequence[str],
        metadata: Mapping[str, str],
        details: CustomerDetails = NO_DETAILS,
    ) -> None:
        if key in self._poisoned:
            raise UnreachableError("metering API did not answer POST: HTTP 500 (tried 5 times)")
        super().create_customer(key, name, subject_keys, metadata, details)

    def write_subjects(self, writes: Sequence[SubjectWrite]) -> None:
        if any(write.key in self._poisoned for write in writes):
            raise UnreachableError("metering API did not answer POST: HTTP 500 (tried 5 times)")
        super().write_subjects(writes)


def plan_many(number: int) -> Plan:
    return plan_for([consumer(f"{n:02}", f"user-{n}") for n in range(number)], observed(subjects=()))


def test_an_entity_that_the_server_fails_on_is_blocked_by_name_and_the_rest_goes_on() -> None:
    target = Poisoned("consumer:03", "consumer:07")
    found = apply_plan(plan_many(10), target)
    blocked = [outcome for outcome in found if outcome.status is Status.BLOCKED]
    assert [outcome.change.customer_key for outcome in blocked] == ["consumer:03", "consumer:07"]
    assert "HTTP 500" in blocked[0].detail
    assert len(target.customers) == 8
    assert len(target.subjects() or ()) == 8
    assert statuses(found)["upsert-subject consumer:03"] == ["skipped"]


def test_one_subject_entity_that_the_server_fails_on_does_not_stop_the_others() -> None:
    target = Poisoned()
    first = plan_many(10)
    target._poisoned = ("consumer:04",)
    changes = tuple(change for change in first.changes if change.kind is ChangeKind.UPSERT_SUBJECT)
    found = apply_plan(replace(first, changes=changes), target)
    assert [o.change.subject_keys for o in found if o.status is Status.BLOCKED] == [("consumer:04",)]
    assert len(target.subjects() or ()) == 9


def test_several_entities_in_a_row_that_the_server_fails_on_stop_the_run() -> None:
    target = Poisoned(*(f"consumer:{n:02}" for n in range(2, 9)))
    with pytest.raises(ApplyStoppedError, match="5 different customers in a row") as caught:
        apply_plan(plan_many(10), target)
    assert [o.status for o in caught.value.outcomes] == [Status.DONE] * 2 + [Status.BLOCKED] * 5
    assert isinstance(caught.value.__cause__, UnreachableError)


def test_a_server_that_answers_no_read_stops_the_run_at_its_first_failure() -> None:
    class Down(Poisoned):
        def customer_by_key(self, key: str) -> ObservedCustomer | None:
            raise UnreachableError("connection refused")

    with pytest.raises(ApplyStoppedError, match="connection refused") as caught:
        apply_plan(plan_many(3), Down("consumer:01"))
    assert [outcome.change.customer_key for outcome in caught.value.outcomes] == ["consumer:00"]


def test_a_moved_subject_is_put_back_if_the_server_fails_on_its_new_customer() -> None:
    state = observed(customer("acme", "consumer:1", "consumer:2", owner=OWNER))
    people = [consumer("1", "alice", "customer:bad"), consumer("2", "bob", "customer:acme")]
    moving = plan_for(people, state, rules=BY_TAG, options=PlanOptions(allow_move=True))
    target = Poisoned("bad")
    target.customers = {one.id: one for one in state.customers}
    found = apply_plan(moving, target)
    assert [outcome.status for outcome in found][:2] == [Status.DONE, Status.BLOCKED]
    assert "were put back" in found[1].detail
    assert {key for one in target.customers.values() for key in one.subject_keys} == {
        "consumer:1",
        "consumer:2",
    }
