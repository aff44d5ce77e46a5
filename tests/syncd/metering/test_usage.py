from __future__ import annotations

import pytest

from syncd.metering.usage import attribute
from tests.syncd.builders import customer


def test_usage_is_attributed_by_key_and_subject_key_of_a_customer() -> None:
    acme = customer("acme", "a", "b")
    usage = attribute((acme,), {"a": 1, "acme": 2, "stranger": 8}, {"b": 16})
    (found,) = usage.customers
    assert (found.requests, found.tokens) == (3, 16)
    assert [subject.key for subject in found.subjects] == ["a", "acme", "b"]
    assert [(subject.key, subject.requests) for subject in usage.unbilled] == [("stranger", 8)]


def test_usage_under_the_id_of_a_customer_is_nobodys() -> None:
    usage = attribute((customer("acme", "a", identity="ID"),), {"ID": 4}, {})
    assert [customer.requests for customer in usage.customers] == [0]
    assert [(subject.key, subject.requests) for subject in usage.unbilled] == [("ID", 4)]


def test_a_customer_without_usage_is_listed_with_zeros() -> None:
    usage = attribute((customer("acme", "a"),), {}, {})
    assert usage.to_json() == {
        "customers": [
            {
                "key": "acme",
                "id": "id-acme",
                "name": "acme",
                "requests": 0,
                "tokens": 0,
                "subjects": [{"key": "a", "name": None, "requests": 0, "tokens": 0}],
            }
        ],
        "unbilled": [],
        "totals": {"requests": 0, "tokens": 0},
    }


def test_usage_without_any_subject_is_unbilled() -> None:
    usage = attribute((customer("acme", "a"),), {"": 3}, {})
    assert [(subject.key, subject.requests) for subject in usage.unbilled] == [("", 3)]


@pytest.mark.parametrize("key_first", [True, False])
def test_a_subject_that_is_the_key_of_another_customer_counts_once_and_for_that_customer(
    key_first: bool,
) -> None:
    named, carrier = customer("x"), customer("acme", "x", "a")
    customers = (named, carrier) if key_first else (carrier, named)
    usage = attribute(customers, {"x": 3, "a": 1}, {"x": 10})
    assert {one.key: (one.requests, one.tokens) for one in usage.customers} == {"x": (3, 10), "acme": (1, 0)}
    assert usage.unbilled == ()
    assert usage.to_json()["totals"] == {"requests": 4, "tokens": 10}
