from __future__ import annotations

from syncd.metering.usage import attribute
from tests.syncd.builders import customer


def test_usage_is_attributed_by_id_key_and_subject_key_of_a_customer() -> None:
    acme = customer("acme", "a", "b", identity="ID")
    usage = attribute((acme,), {"a": 1, "acme": 2, "ID": 4, "stranger": 8}, {"b": 16})
    (found,) = usage.customers
    assert (found.requests, found.tokens) == (7, 16)
    assert [subject.key for subject in found.subjects] == ["ID", "a", "acme", "b"]
    assert [(subject.key, subject.requests) for subject in usage.unbilled] == [("stranger", 8)]


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
                "subjects": [{"key": "a", "requests": 0, "tokens": 0}],
            }
        ],
        "unbilled": [],
        "totals": {"requests": 0, "tokens": 0},
    }


def test_usage_without_any_subject_is_unbilled() -> None:
    usage = attribute((customer("acme", "a"),), {"": 3}, {})
    assert [(subject.key, subject.requests) for subject in usage.unbilled] == [("", 3)]


def test_usage_counted_for_two_customers_is_shown_for_both_and_once_in_the_totals() -> None:
    named, carrier = customer("x"), customer("acme", "x")
    usage = attribute((named, carrier), {"x": 3}, {"x": 10})
    assert {one.key: (one.requests, one.tokens) for one in usage.customers} == {"x": (3, 10), "acme": (3, 10)}
    assert usage.unbilled == ()
    assert usage.to_json()["totals"] == {"requests": 3, "tokens": 10}
