"""The target against the sandbox over real HTTP, and against scripted answers where that cannot misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from syncd.errors import (
    BlockedError,
    MalformedError,
    MeterMissingError,
    RefusedError,
    UnauthorizedError,
    UnreachableError,
)
from syncd.http import Endpoint
from syncd.model import ObservedCustomer
from syncd.retry import Retry
from syncd.sandbox.testing import running_sandbox
from syncd.targets import CustomerEdit, SubjectWrite
from syncd.targets.openmeter_v1 import OpenMeterV1
from tests.syncd.servers import Answer, Asked, serving

MARKS = {"managed-by": "kong-openmeter", "sync-owner": "default", "source-id": "1"}


def target_at(url: str, *, token: str | None = None, timeout: float = 5, attempts: int = 3) -> OpenMeterV1:
    endpoint = Endpoint("metering API", url, "metering.token", "read and write", token=token, timeout=timeout)
    return OpenMeterV1(endpoint, Retry(attempts=attempts, first_wait=0.001, longest_wait=0.002))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_sandbox() as url:
        yield url


@pytest.fixture
def sandbox(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server) as client:
        client.post("/sandbox/v1/reset").raise_for_status()
        yield client


@pytest.fixture
def target(sandbox: httpx.Client) -> Iterator[OpenMeterV1]:
    target = target_at(str(sandbox.base_url))
    yield target
    target.close()


def fault(sandbox: httpx.Client, **fault: object) -> None:
    sandbox.post("/sandbox/v1/faults", json=fault).raise_for_status()


def by_hand(sandbox: httpx.Client, **body: object) -> dict[str, object]:
    answer = sandbox.post("/api/v1/customers", json=body)
    answer.raise_for_status()
    document: dict[str, object] = answer.json()
    return document


def test_a_created_customer_is_observed_as_it_was_created(target: OpenMeterV1) -> None:
    target.create_customer("acme", "ACME", ["consumer:1", "consumer:2"], MARKS)
    (found,) = target.observe().customers
    assert (found.key, found.name, found.subject_keys) == ("acme", "ACME", ("consumer:1", "consumer:2"))
    assert found.metadata == MARKS
    assert found.active_subscription is None


def test_an_active_subscription_is_observed(target: OpenMeterV1, sandbox: httpx.Client) -> None:
    target.create_customer("acme", "ACME", ["consumer:1"], MARKS)
    sandbox.post("/sandbox/v1/customers/acme/subscriptions").raise_for_status()
    assert target.observe().customers[0].active_subscription


def test_an_edit_keeps_all_that_it_does_not_name(target: OpenMeterV1, sandbox: httpx.Client) -> None:
    before = by_hand(
        sandbox,
        key="acme",
        name="ACME",
        description="Ask Jane",
        primaryEmail="pay@acme.example",
        currency="EUR",
        metadata={**MARKS, "externalId": "crm-7"},
        billingAddress={"country": "DE", "city": "Berlin"},
        usageAttribution={"subjectKeys": ["z", "a"]},
    )
    assert target.edit_customer(
        str(before["id"]), lambda c: CustomerEdit(subject_keys=(*c.subject_keys, "m"))
    )
    after = sandbox.get(f"/api/v1/customers/{before['id']}").json()
    assert sorted(after["usageAttribution"]["subjectKeys"]) == ["a", "m", "z"]
    unchanged = before.keys() - {"usageAttribution", "updatedAt"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}


def test_an_edit_that_changes_nothing_writes_nothing(target: OpenMeterV1, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME")
    fault(sandbox, method="PUT", status=400)
    assert not target.edit_customer(str(made["id"]), lambda _: CustomerEdit(name="ACME"))
    assert not target.edit_customer(str(made["id"]), lambda _: None)


def test_an_edit_whose_answer_was_lost_looks_again_before_it_writes_again(
    target: OpenMeterV1, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="old")
    fault(sandbox, method="PUT", action="accept_then_cut", count=1)
    seen: list[str] = []

    def rename(there: ObservedCustomer) -> CustomerEdit | None:
        seen.append(there.name)
        return None if there.name == "new" else CustomerEdit(name="new")

    target.edit_customer(str(made["id"]), rename)
    assert seen == ["old", "new"]


def test_an_edit_gives_up_after_its_attempts(target: OpenMeterV1, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="old")
    fault(sandbox, method="PUT", status=503)
    with pytest.raises(UnreachableError, match="tried 3 times"):
        target.edit_customer(str(made["id"]), lambda _: CustomerEdit(name="new"))


def test_an_edit_of_a_customer_that_was_deleted_meanwhile_is_blocked(
    target: OpenMeterV1, sandbox: httpx.Client
) -> None:
    made = by_hand(sandbox, key="acme", name="old")
    sandbox.delete(f"/api/v1/customers/{made['id']}").raise_for_status()
    with pytest.raises(BlockedError, match="deleted"):
        target.edit_customer(str(made["id"]), lambda _: CustomerEdit(name="new"))


def test_a_refused_edit_says_what_the_server_said(target: OpenMeterV1, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="acme", name="ACME", usageAttribution={"subjectKeys": ["a"]})
    sandbox.post("/sandbox/v1/customers/acme/subscriptions").raise_for_status()
    with pytest.raises(RefusedError) as caught:
        target.edit_customer(str(made["id"]), lambda _: CustomerEdit(subject_keys=("a", "b")))
    assert caught.value.status == 400
    assert caught.value.detail


def test_a_customer_is_found_by_its_exact_key_only(target: OpenMeterV1, sandbox: httpx.Client) -> None:
    made = by_hand(sandbox, key="consumer:1/ä", name="x")
    found = target.customer_by_key("consumer:1/ä")
    assert found is not None
    assert found.id == made["id"]
    assert target.customer_by_key(str(made["id"])) is None
    assert target.customer_by_key("nobody") is None


def test_a_second_customer_of_the_same_key_is_refused_with_409(target: OpenMeterV1) -> None:
    target.create_customer("acme", "ACME", ["consumer:1"], MARKS)
    with pytest.raises(RefusedError) as caught:
        target.create_customer("acme", "ACME", ["consumer:2"], MARKS)
    assert caught.value.status == 409


def test_subject_entities_are_written_and_observed(target: OpenMeterV1) -> None:
    target.write_subjects([SubjectWrite("s", "S", {"team": "a"}), SubjectWrite("t", None, MARKS)])
    found = {subject.key: subject for subject in target.subjects() or ()}
    assert (found["s"].display_name, dict(found["s"].metadata)) == ("S", {"team": "a"})
    assert (found["t"].display_name, dict(found["t"].metadata)) == (None, MARKS)


def test_a_write_without_a_display_name_leaves_the_one_that_is_there(target: OpenMeterV1) -> None:
    target.write_subjects([SubjectWrite("s", "S", {})])
    target.write_subjects([SubjectWrite("s", None, {"a": "b"})])
    (found,) = target.subjects() or ()
    assert found.display_name == "S"


def test_a_server_without_subject_entities_is_fine() -> None:
    with running_sandbox(subjects=False) as url:
        target = target_at(url)
        assert target.observe().subjects is None
        target.close()


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_missing_or_wrong_token_is_an_authentication_problem(token: str | None) -> None:
    with running_sandbox(token="right") as url:
        target = target_at(url, token=token)
        with pytest.raises(UnauthorizedError, match=r"metering\.token"):
            target.observe()
        target.close()


def test_usage_is_read_by_subject(target: OpenMeterV1, sandbox: httpx.Client) -> None:
    for number, subject in enumerate(["a", "a", "b"]):
        event = {"specversion": "1.0", "id": str(number), "source": "kong", "type": "kong.api_request"}
        answer = sandbox.post(
            "/api/v1/events",
            json={**event, "subject": subject, "time": f"2026-01-0{number + 1}T00:00:00Z", "data": {}},
            headers={"Content-Type": "application/cloudevents+json"},
        )
        answer.raise_for_status()
    assert target.usage("kong_api_requests", None, None) == {"a": 2, "b": 1}
    assert target.usage("kong_api_requests", "2026-01-02T00:00:00Z", None) == {"a": 1, "b": 1}


def test_a_meter_that_is_not_there_is_named(target: OpenMeterV1) -> None:
    with pytest.raises(MeterMissingError, match="no_such_meter"):
        target.usage("no_such_meter", None, None)


# Scripted answers from here on.


def test_an_edit_sends_back_the_usage_attribution_as_it_was_but_for_what_it_adds() -> None:
    attribution = {"type": "customer_usage_attribution.v1", "subjectKeys": ["z", "a", "m"]}
    there = {"id": "C", "name": "C", "usageAttribution": attribution, "annotations": {"x": 1}}
    with serving(lambda _: Answer(there)) as server:
        target = target_at(server.url)
        target.edit_customer("C", lambda c: CustomerEdit(subject_keys=(*c.subject_keys, "b")))
        target.close()
    assert server.paths() == ["GET /api/v1/customers/C", "PUT /api/v1/customers/C"]
    expected = {**attribution, "subjectKeys": ["z", "a", "m", "b"]}
    assert server.asked[1].body == {"name": "C", "usageAttribution": expected}


def page(items: list[object], total: int) -> Answer:
    return Answer({"items": items, "totalCount": total, "page": 1, "pageSize": 2})


def item(identity: str, **fields: object) -> dict[str, object]:
    return {"id": identity, "name": identity, **fields}


def observing(customers: Callable[[Asked], Answer]) -> list[ObservedCustomer]:
    def answer(asked: Asked) -> Answer:
        return customers(asked) if asked.path == "/api/v1/customers" else Answer(status=404)

    with serving(answer) as server:
        target = target_at(server.url)
        try:
            return list(target.observe().customers)
        finally:
            target.close()


def test_all_pages_of_customers_are_read_with_their_subscriptions() -> None:
    asked: list[dict[str, str]] = []

    def pages(request: Asked) -> Answer:
        asked.append(request.query)
        number = int(request.query["page"])
        return page([item(f"{number}a"), item(f"{number}b")] if number < 3 else [item("3a")], 5)

    assert [customer.id for customer in observing(pages)] == ["1a", "1b", "2a", "2b", "3a"]
    assert [query["page"] for query in asked] == ["1", "2", "3"]
    assert {(query["pageSize"], query["expand"]) for query in asked} == {("1000", "subscriptions")}


def test_pages_that_shift_while_they_are_read_are_read_again() -> None:
    reads = 0

    def shifting(request: Asked) -> Answer:
        nonlocal reads
        if request.query["page"] == "1":
            reads += 1
            return page([item("a"), item("b")], 3)
        # During the first reading a customer before the page was deleted, so one was never shown.
        return page([], 2) if reads == 1 else page([item("c")], 3)

    assert [customer.id for customer in observing(shifting)] == ["a", "b", "c"]
    assert reads == 2


def test_a_customer_that_appears_on_two_pages_makes_the_list_be_read_again() -> None:
    reads = 0

    def shifting(request: Asked) -> Answer:
        nonlocal reads
        if request.query["page"] == "1":
            reads += 1
            return page([item("a"), item("b")], 3)
        return page([item("b" if reads == 1 else "c")], 3)

    assert [customer.id for customer in observing(shifting)] == ["a", "b", "c"]


def test_a_list_that_is_never_whole_is_an_error_and_not_a_smaller_world() -> None:
    with pytest.raises(MalformedError, match="try again"):
        observing(lambda asked: page([item("a")] if asked.query["page"] == "1" else [], 2))


@pytest.mark.parametrize(
    "answer",
    [
        Answer([]),
        Answer({"items": [{"name": "no id"}], "totalCount": 1}),
        Answer(b"<html>"),
        Answer({"totalCount": 1}),
    ],
)
def test_an_answer_that_is_no_list_of_customers_is_an_error(answer: Answer) -> None:
    with pytest.raises(MalformedError):
        observing(lambda _: answer)


@pytest.mark.parametrize(
    ("fields", "subscription"),
    [
        ({"subscriptions": [{"id": "S", "status": "active"}]}, "S"),
        ({"subscriptions": [{"id": "S", "status": "canceled"}]}, "S"),
        ({"currentSubscriptionId": "S"}, "S"),
        ({"subscriptions": [{"id": "S", "status": "inactive"}]}, None),
        ({"subscriptions": []}, None),
        ({}, None),
    ],
)
def test_a_subscription_counts_while_it_runs(fields: dict[str, object], subscription: str | None) -> None:
    (customer,) = observing(lambda _: page([item("a", **fields)], 1))
    assert customer.active_subscription == subscription


def test_a_customer_may_lack_everything_but_id_and_name() -> None:
    (customer,) = observing(lambda _: page([item("a", key=None, metadata=None)], 1))
    assert (customer.key, customer.subject_keys, customer.metadata) == (None, (), {})
