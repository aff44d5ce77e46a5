"""The v3 dialect, with scripted answers. test_contract.py covers both dialects."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from syncd.core.errors import MalformedError
from syncd.core.model import ObservedCustomer, ObservedState
from syncd.metering.base import CustomerEdit, SubjectWrite
from syncd.metering.v3 import OpenMeterV3
from tests.syncd.servers import Answer, Asked, Server, serving
from tests.syncd.targets import v3_target_at as target_at

EMPTY = {"data": [], "meta": {"page": {"number": 1, "size": 1000, "total": 0}}}


def page(*items: object, total: int | None = None) -> Answer:
    meta = {"page": {"number": 1, "size": 1000, "total": len(items) if total is None else total}}
    return Answer({"data": list(items), "meta": meta})


def doing(act: Callable[[OpenMeterV3], object], answer: Callable[[Asked], Answer]) -> Server:
    def or_empty(asked: Asked) -> Answer:
        return Answer(EMPTY) if asked.path.endswith("/subscriptions") else answer(asked)

    with serving(or_empty) as server:
        target = target_at(server.url)
        try:
            act(target)
        finally:
            target.close()
    return server


def test_there_are_no_subject_entities() -> None:
    target = target_at("http://127.0.0.1:9")
    assert target.subjects() is None
    target.write_subjects([])
    with pytest.raises(MalformedError, match="no subject entities"):
        target.write_subjects([SubjectWrite("s", None, {})])
    target.close()


def test_labels_that_the_server_would_refuse_are_omitted(sandbox: httpx.Client) -> None:
    target = target_at(f"{sandbox.base_url}/api/v3")
    mixed = {
        "sync-owner": "default",
        "email": "a@b.example",
        "kong-thing": "x",
        "name": "Ä",
        "long": "x" * 64,
    }
    target.create_customer("acme", "ACME", ["consumer:1"], mixed)
    (found,) = target.observe().customers
    assert found.metadata == {"sync-owner": "default"}
    target.close()


def test_labels_that_the_server_created_are_not_sent_back() -> None:
    there = {"id": "C", "key": "c", "name": "C", "labels": {"team": "a", "openmeter_managed": "x"}}
    server = doing(
        lambda target: target.edit_customer("C", lambda _: CustomerEdit(name="D")), lambda _: Answer(there)
    )
    assert server.asked[-1].body == {"name": "D", "labels": {"team": "a"}}


def test_active_subscriptions_include_canceled_ones() -> None:
    running = {"id": "S", "customer_id": "C", "status": "canceled"}

    def answer(asked: Asked) -> Answer:
        return (
            page(running)
            if asked.path.endswith("/subscriptions")
            else page({"id": "C", "name": "C", "key": "c"})
        )

    with serving(answer) as server:
        target = target_at(server.url)
        observed = target.observe()
        target.close()
    assert observed == ObservedState((ObservedCustomer("C", "c", "C", (), {}, "S"),), None)
    assert server.asked[0].query["filter[status][oeq]"] == "active,canceled"


def test_all_pages_are_read_even_if_the_server_makes_them_smaller() -> None:
    everyone = [
        {"id": f"{n}", "name": f"{n}", "key": f"{n}", "created_at": f"2026-01-0{n}T00:00:00Z"}
        for n in range(1, 6)
    ]

    def pages(asked: Asked) -> Answer:
        size = min(int(asked.query["page[size]"]), 2)
        start = (int(asked.query["page[number]"]) - 1) * size
        return page(*everyone[start : start + size], total=5)

    keys: list[str | None] = []
    doing(lambda target: keys.extend(c.key for c in target.observe().customers), pages)
    assert keys == ["1", "2", "3", "4", "5"]


def usage_from(row: dict[str, object]) -> dict[str, float]:
    found: dict[str, float] = {}

    def answer(asked: Asked) -> Answer:
        return Answer({"data": [row]}) if asked.path.endswith("/query") else page({"id": "M", "key": "m"})

    doing(lambda target: found.update(target.usage("m", None, None)), answer)
    return found


def test_a_usage_value_is_a_string_and_its_subject_may_be_missing() -> None:
    assert usage_from({"value": "12.5", "dimensions": {"subject": "a"}}) == {"a": 12.5}
    assert usage_from({"value": "3", "dimensions": {}}) == {"": 3}


@pytest.mark.parametrize("value", [None, "many", True])
def test_a_usage_value_that_is_not_a_number_is_an_error(value: object) -> None:
    with pytest.raises(MalformedError, match="no number"):
        usage_from({"value": value, "dimensions": {"subject": "a"}})
