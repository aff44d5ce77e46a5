"""The v1 dialect: its own features, and scripted answers. test_contract.py covers both dialects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import unquote

import httpx
import pytest

from syncd.core.model import ObservedCustomer
from syncd.metering.base import SubjectWrite
from syncd.metering.v1 import OpenMeterV1
from syncd.sandbox.testing import running_sandbox
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import OWNERSHIP, target_at


@pytest.fixture
def target(sandbox: httpx.Client) -> Iterator[OpenMeterV1]:
    target = target_at(str(sandbox.base_url))
    yield target
    target.close()


def test_subject_entities_are_written_and_observed(target: OpenMeterV1) -> None:
    target.write_subjects([SubjectWrite("s", "S", {"team": "a"}), SubjectWrite("t", None, OWNERSHIP)])
    found = {subject.key: subject for subject in target.subjects() or ()}
    assert (found["s"].display_name, dict(found["s"].metadata)) == ("S", {"team": "a"})
    assert (found["t"].display_name, dict(found["t"].metadata)) == (None, OWNERSHIP)


@pytest.mark.parametrize("key", ["a%2Fb", "100%", "a%zz", "%2e%2e", "ü%41"])
def test_a_key_with_a_percent_sign_reaches_its_own_customer_and_subject(
    target: OpenMeterV1, key: str
) -> None:
    """OpenMeter decodes the shortest encoding of a path twice: `a%252Fb` is the address of `a/b`."""
    for each in {key, unquote(key)}:
        target.create_customer(each, "name", [], {})
    found = target.customer_by_key(key)
    assert found is not None
    assert found.key == key
    target.write_subjects([SubjectWrite(each, None, {}) for each in {key, unquote(key)}])
    assert target.delete_subject(key, lambda _there: None)
    assert {subject.key for subject in target.subjects() or ()} == {unquote(key)} - {key}


def test_a_write_without_a_display_name_keeps_the_existing_one(target: OpenMeterV1) -> None:
    target.write_subjects([SubjectWrite("s", "S", {})])
    target.write_subjects([SubjectWrite("s", None, {"a": "b"})])
    (found,) = target.subjects() or ()
    assert found.display_name == "S"


def test_a_server_without_subject_entities_is_fine() -> None:
    with running_sandbox(subjects=False) as url:
        target = target_at(url)
        assert target.observe().subjects is None
        target.close()


# Scripted answers


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
        if request.query["pageSize"] == "1":
            return page([item("3a")], 5)
        return page([item(f"{number}a"), item(f"{number}b")] if number < 3 else [item("3a")], 5)

    assert [customer.id for customer in observing(pages)] == ["1a", "1b", "2a", "2b", "3a"]
    assert [(query["page"], query["pageSize"]) for query in asked] == [
        ("1", "1000"),
        ("5", "1"),
        ("1", "1000"),
        ("2", "1000"),
        ("3", "1000"),
    ]
    assert {query["expand"] for query in asked} == {"subscriptions"}


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
def test_a_subscription_counts_while_it_is_active(
    fields: dict[str, object], subscription: str | None
) -> None:
    (customer,) = observing(lambda _: page([item("a", **fields)], 1))
    assert customer.active_subscription == subscription


def test_a_customer_may_lack_everything_but_id_and_name() -> None:
    (customer,) = observing(lambda _: page([item("a", key=None, metadata=None)], 1))
    assert (customer.key, customer.subject_keys, customer.metadata) == (None, (), {})
