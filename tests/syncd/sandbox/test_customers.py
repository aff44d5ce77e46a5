"""/api/v1/customers: create, replace, delete, list and search."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.syncd.sandbox.support import create_customer, ok, refused

FULL = {
    "name": "Alice Ltd",
    "description": "Our first",
    "metadata": {"crm": "7"},
    "key": "alice",
    "usageAttribution": {"subjectKeys": ["alice-1"]},
    "primaryEmail": "alice@example.com",
    "currency": "EUR",
    "billingAddress": {"city": "Lyon", "country": "FR"},
}


def keys(api: httpx.Client, **filters: Any) -> list[str]:
    return [item["key"] for item in ok(api.get("/api/v1/customers", params=filters))["items"]]


def test_a_customer_is_created_with_all_it_was_given(api: httpx.Client) -> None:
    response = api.post("/api/v1/customers", json=FULL)
    assert response.status_code == 201
    customer = response.json()
    assert re.fullmatch("[0-7][0-9A-HJKMNP-TV-Z]{25}", customer["id"])
    assert customer["createdAt"] == customer["updatedAt"]
    assert {name: customer[name] for name in FULL} == FULL
    assert customer.keys() - FULL.keys() == {"id", "createdAt", "updatedAt"}


def test_a_customer_is_found_by_id_and_by_key(api: httpx.Client) -> None:
    customer = create_customer(api, key="team/alice ä")
    assert ok(api.get(f"/api/v1/customers/{customer['id']}")) == customer
    assert ok(api.get(f"/api/v1/customers/{quote('team/alice ä', safe='')}")) == customer


def test_the_shortest_encoding_of_a_path_is_decoded_twice_as_in_openmeter(api: httpx.Client) -> None:
    slash, percent = create_customer(api, key="a/b"), create_customer(api, key="a%2Fb")
    create_customer(api, key="100%")
    assert ok(api.get("/api/v1/customers/a%252Fb")) == slash
    assert ok(api.get("/api/v1/customers/%61%252Fb")) == percent
    assert "invalid URL escape" in refused(api.get("/api/v1/customers/100%25"), 400)
    assert ok(api.get("/api/v1/customers/%3100%25"))["key"] == "100%"


def test_a_customer_is_not_found_by_its_subjects(api: httpx.Client) -> None:
    create_customer(api, key="k", subjects=["s"])
    refused(api.get("/api/v1/customers/s"), 404)


def test_an_unknown_customer_is_a_404(api: httpx.Client) -> None:
    for method in ("GET", "DELETE"):
        assert "nobody not found" in refused(api.request(method, "/api/v1/customers/nobody"), 404)
    refused(api.put("/api/v1/customers/nobody", json=FULL), 404)


def test_empty_properties_are_not_shown(api: httpx.Client) -> None:
    customer = create_customer(
        api, key="a", metadata={}, usageAttribution={"subjectKeys": []}, billingAddress={}
    )
    assert customer.keys() == {"id", "key", "name", "createdAt", "updatedAt"}


def test_subject_keys_are_shown_sorted(api: httpx.Client) -> None:
    customer = create_customer(api, subjects=["c", "a", "b"])
    assert customer["usageAttribution"]["subjectKeys"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"name": ""}, "/name"),
        ({"name": None}, "/"),
        ({"name": 7}, "/name"),
        ({"name": "n" * 257}, "/name"),
        ({"key": ""}, "/key"),
        ({"key": None}, "/"),
        ({"currency": "euro"}, "/currency"),
        ({"metadata": {"a": 1}}, "/metadata/a"),
        ({"usageAttribution": {}}, "/usageAttribution/subjectKeys"),
        ({"usageAttribution": {"subjectKeys": [""]}}, "/usageAttribution/subjectKeys/0"),
        ({"description": "d" * 1025}, "/description"),
    ],
)
def test_a_body_that_violates_the_specification_is_refused(
    api: httpx.Client, change: Any, pointer: str
) -> None:
    assert f'Error at "{pointer}":' in refused(api.post("/api/v1/customers", json=FULL | change), 400)


def test_a_body_that_is_not_json_is_refused(api: httpx.Client) -> None:
    refused(api.post("/api/v1/customers", content=b"{", headers={"content-type": "application/json"}), 400)


def test_a_customer_needs_a_key_or_a_subject(api: httpx.Client) -> None:
    response = api.post("/api/v1/customers", json={"name": "A", "usageAttribution": {"subjectKeys": []}})
    assert "either key or usageAttribution.subjectKeys must be provided" in refused(response, 400)


def test_put_clears_missing_properties_except_email_and_currency(api: httpx.Client) -> None:
    before = ok(api.post("/api/v1/customers", json=FULL))
    body = {"name": "Alice Inc", "usageAttribution": {"subjectKeys": ["alice-2"]}}
    after = ok(api.put("/api/v1/customers/alice", json=body))
    kept = {name: before[name] for name in ("id", "createdAt", "primaryEmail", "currency")}
    assert after == body | kept | {"updatedAt": after["updatedAt"]}
    assert ok(api.get(f"/api/v1/customers/{before['id']}")) == after


def test_put_without_usage_attribution_clears_the_subjects(api: httpx.Client) -> None:
    api.post("/api/v1/customers", json=FULL)
    after = ok(api.put("/api/v1/customers/alice", json={"name": "Alice", "key": "alice"}))
    assert "usageAttribution" not in after
    assert create_customer(api, "Bob", subjects=["alice-1"])


def test_put_keeps_missing_parts_of_an_address(api: httpx.Client) -> None:
    api.post("/api/v1/customers", json=FULL)
    after = ok(api.put("/api/v1/customers/alice", json=FULL | {"billingAddress": {"city": "Paris"}}))
    assert after["billingAddress"] == {"city": "Paris", "country": "FR"}


def test_null_metadata_clears_the_metadata(api: httpx.Client) -> None:
    api.post("/api/v1/customers", json=FULL)
    assert "metadata" not in ok(api.put("/api/v1/customers/alice", json=FULL | {"metadata": None}))


def test_a_deleted_customer_is_found_by_id_only_and_cannot_be_changed(api: httpx.Client) -> None:
    customer = create_customer(api, key="a", subjects=["s"])
    assert api.delete("/api/v1/customers/a").status_code == 204
    path = f"/api/v1/customers/{customer['id']}"
    assert ok(api.get(path))["deletedAt"]
    refused(api.get("/api/v1/customers/a"), 404)
    assert "customer is deleted" in refused(api.put(path, json=FULL), 412)
    assert "customer is deleted" in refused(api.delete(path), 412)


def test_a_deleted_customer_frees_its_key_and_subjects(api: httpx.Client) -> None:
    create_customer(api, key="a", subjects=["s"])
    api.delete("/api/v1/customers/a")
    assert create_customer(api, key="a", subjects=["s"])["id"] == ok(api.get("/api/v1/customers/a"))["id"]


def test_deleted_customers_are_listed_only_on_request(api: httpx.Client) -> None:
    create_customer(api, "a")
    create_customer(api, "b")
    api.delete("/api/v1/customers/a")
    assert keys(api) == ["b"]
    assert keys(api, includeDeleted="true") == ["a", "b"]


def test_pages_have_the_requested_size_and_the_total(api: httpx.Client) -> None:
    for number in range(5):
        create_customer(api, f"c{number}")
    page = ok(api.get("/api/v1/customers", params={"page": 2, "pageSize": 2}))
    assert [item["key"] for item in page.pop("items")] == ["c2", "c3"]
    assert page == {"totalCount": 5, "page": 2, "pageSize": 2}
    assert ok(api.get("/api/v1/customers", params={"page": 4, "pageSize": 2}))["items"] == []


@pytest.mark.parametrize(
    "query",
    [{"page": 0}, {"pageSize": 0}, {"pageSize": 1001}, {"page": "x"}, {"order": "up"}, {"orderBy": "key"}],
)
def test_a_bad_page_or_order_is_refused(api: httpx.Client, query: dict[str, Any]) -> None:
    assert f'"{next(iter(query))}" in query' in refused(api.get("/api/v1/customers", params=query), 400)


def test_the_largest_page_is_1000(api: httpx.Client) -> None:
    assert ok(api.get("/api/v1/customers", params={"pageSize": 1000}))["pageSize"] == 1000


def test_customers_are_sorted_by_name_or_as_requested(api: httpx.Client) -> None:
    for key, name in (("1", "Zoe"), ("2", "Ada"), ("3", "Kim")):
        create_customer(api, name, key=key)
    assert keys(api) == ["2", "3", "1"]
    assert keys(api, order="DESC") == ["1", "3", "2"]
    assert keys(api, orderBy="createdAt") == ["1", "2", "3"]


@pytest.mark.parametrize(
    "query",
    [
        {"key": "LIC"},
        {"name": "ltd"},
        {"primaryEmail": "alice@"},
        {"subject": "E-1"},
        {"name": "l", "key": "ali"},
    ],
)
def test_customers_are_found_by_part_of_a_text_in_any_case(api: httpx.Client, query: dict[str, str]) -> None:
    api.post("/api/v1/customers", json=FULL)
    create_customer(api, "Bob", key="bob", subjects=["bob-1"], primaryEmail="bob@example.com")
    assert keys(api, **query) == ["alice"]


def test_a_percent_sign_in_a_filter_is_literal(api: httpx.Client) -> None:
    create_customer(api, "a")
    assert keys(api, key="%") == []


def test_a_key_taken_by_another_request_at_the_same_moment_is_a_409(api: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        bodies = [{"name": str(number), "key": "same"} for number in range(16)]
        statuses = list(pool.map(lambda body: api.post("/api/v1/customers", json=body).status_code, bodies))
    assert sorted(statuses) == [201] + [409] * 15
    assert keys(api) == ["same"]
