"""/api/v1/customers: refusals caused by other customers, subscriptions or entitlements."""

from typing import Any

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.syncd.sandbox.support import create_customer, event, listed, ok, refused, send, usage


def body_of(customer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        name: customer[name] for name in ("name", "key", "usageAttribution") if name in customer
    } | changes


def subscribed(api: httpx.Client, **properties: Any) -> dict[str, Any]:
    customer = create_customer(api, **properties)
    ok(api.post(f"/sandbox/v1/customers/{customer['id']}/subscriptions", json={"plan_key": "pro"}))
    return customer


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": "a-key"}, 'key "a-key" is already used'),
        ({"key": "a-subject"}, "key a-subject overlaps with subject of another customer"),
        ({"usageAttribution": {"subjectKeys": ["new", "a-subject"]}}, "already associated"),
    ],
)
def test_a_key_or_subject_that_reaches_another_customer_is_a_409(
    api: httpx.Client, change: dict[str, Any], reason: str
) -> None:
    create_customer(api, "a", key="a-key", subjects=["a-subject"])
    assert reason in refused(api.post("/api/v1/customers", json={"name": "b", "key": "b"} | change), 409)
    other = create_customer(api, "b", key="b", subjects=["b-subject"])
    assert reason in refused(api.put("/api/v1/customers/b", json=body_of(other) | change), 409)
    assert ok(api.get("/api/v1/customers/b")) == other


def test_a_subject_that_is_the_key_of_another_customer_is_counted_for_both(api: httpx.Client) -> None:
    """CreateCustomer and UpdateCustomer look at keys only: openmeter/customer/adapter/customer.go."""
    named = create_customer(api, "named", key="both", subjects=["a"])
    carrier = create_customer(api, "carrier", key="carrier", subjects=["both"])
    assert send(api, event("1", subject="both")).status_code == 204
    for customer in (named, carrier):
        [row] = usage(api, filterCustomerId=customer["id"])
        assert row["value"] == 1
        assert len(listed(api, customerId=customer["id"])) == 1
    assert len(listed(api)) == 1


@pytest.mark.parametrize("how", ["created", "changed"])
def test_a_customer_whose_key_became_a_subject_of_another_can_no_longer_change(
    api: httpx.Client, how: str
) -> None:
    named = create_customer(api, "named", key="both", subjects=["a"])
    carrier = create_customer(api, "carrier", key="carrier", subjects=["both"] if how == "created" else ["c"])
    if how == "changed":
        wanted = body_of(carrier, usageAttribution={"subjectKeys": ["both", "c"]})
        carrier = ok(api.put("/api/v1/customers/carrier", json=wanted))
    change = body_of(named, name="renamed")
    said = refused(api.put(f"/api/v1/customers/{named['id']}", json=change), 409)
    assert f"overlaps with subject of another customer: {carrier['id']}" in said
    # The other customer can, so the way out is to remove the subject from it.
    ok(api.put("/api/v1/customers/carrier", json=body_of(carrier, usageAttribution={"subjectKeys": ["c"]})))
    assert ok(api.put(f"/api/v1/customers/{named['id']}", json=change))["name"] == "renamed"


def test_a_subject_that_is_key_and_subject_of_one_customer_cannot_be_a_subject_of_another(
    api: httpx.Client,
) -> None:
    create_customer(api, "a", key="both", subjects=["both"])
    body = {"name": "b", "key": "b", "usageAttribution": {"subjectKeys": ["both"]}}
    assert "already associated" in refused(api.post("/api/v1/customers", json=body), 409)


def test_a_key_that_is_the_id_of_a_customer_is_a_409(api: httpx.Client) -> None:
    customer_id = create_customer(api, "a")["id"]
    response = api.post("/api/v1/customers", json={"name": "b", "key": customer_id})
    assert f"key {customer_id} overlaps with id of another customer" in refused(response, 409)


def test_a_key_may_be_a_subject_of_the_same_customer(api: httpx.Client) -> None:
    customer = create_customer(api, key="a", subjects=["a"])
    assert ok(api.put("/api/v1/customers/a", json=body_of(customer)))["usageAttribution"] == {
        "subjectKeys": ["a"]
    }


def test_a_subject_can_move_once_the_other_customer_released_it(api: httpx.Client) -> None:
    old = create_customer(api, "old", key="old", subjects=["s", "t"])
    new = create_customer(api, "new", key="new", subjects=["n"])
    wanted = body_of(new, usageAttribution={"subjectKeys": ["n", "s"]})
    refused(api.put("/api/v1/customers/new", json=wanted), 409)
    ok(api.put("/api/v1/customers/old", json=body_of(old, usageAttribution={"subjectKeys": ["t"]})))
    assert ok(api.put("/api/v1/customers/new", json=wanted))["usageAttribution"]["subjectKeys"] == ["n", "s"]


@pytest.mark.parametrize("subjects", [["b", "a"], ["a"], ["a", "b", "c"], ["a", "c"], []])
def test_subject_keys_cannot_change_under_a_subscription_not_even_their_order(
    api: httpx.Client, subjects: list[str]
) -> None:
    customer = subscribed(api, key="k", subjects=["a", "b"])
    change = body_of(customer, usageAttribution={"subjectKeys": subjects})
    detail = refused(api.put("/api/v1/customers/k", json=change), 400)
    assert "cannot change subject keys for customer with active subscriptions" in detail


def test_the_rest_of_a_customer_may_change_under_a_subscription(api: httpx.Client) -> None:
    customer = subscribed(api, key="k", subjects=["a", "b"])
    assert ok(api.put("/api/v1/customers/k", json=body_of(customer, name="New", key="l")))["name"] == "New"


def test_omitting_usage_attribution_bypasses_the_subscription_check_as_on_the_real_server(
    api: httpx.Client,
) -> None:
    subscribed(api, key="k", subjects=["a"])
    assert "usageAttribution" not in ok(api.put("/api/v1/customers/k", json={"name": "A", "key": "k"}))


def test_subject_keys_may_change_once_the_subscription_has_ended(api: httpx.Client) -> None:
    customer = subscribed(api, key="k", subjects=["a", "b"])
    assert api.delete("/sandbox/v1/customers/k/subscriptions").status_code == 204
    change = body_of(customer, usageAttribution={"subjectKeys": ["c"]})
    assert ok(api.put("/api/v1/customers/k", json=change))["usageAttribution"]["subjectKeys"] == ["c"]


def test_an_active_subscription_is_shown_with_its_customer(api: httpx.Client) -> None:
    customer = subscribed(api, key="k")
    create_customer(api, "other")
    expanded = {"expand": "subscriptions"}
    shown = ok(api.get("/api/v1/customers/k", params=expanded))
    [subscription] = shown["subscriptions"]
    assert shown["currentSubscriptionId"] == subscription["id"]
    assert (subscription["customerId"], subscription["status"]) == (customer["id"], "active")
    listed = ok(api.get("/api/v1/customers", params=expanded | {"orderBy": "createdAt"}))["items"]
    assert listed[0] == shown
    assert "subscriptions" not in listed[1]
    assert ok(api.get("/api/v1/customers", params={"planKey": "pro"}))["items"] == [shown]


def test_an_ended_subscription_is_not_shown(api: httpx.Client) -> None:
    subscribed(api, key="k")
    api.delete("/sandbox/v1/customers/k/subscriptions")
    assert ok(api.get("/api/v1/customers/k")).keys().isdisjoint({"subscriptions", "currentSubscriptionId"})


def test_a_customer_with_a_subscription_cannot_be_deleted(api: httpx.Client) -> None:
    subscribed(api, key="k")
    assert "active subscriptions" in refused(api.delete("/api/v1/customers/k"), 400)
    api.delete("/sandbox/v1/customers/k/subscriptions")
    assert api.delete("/api/v1/customers/k").status_code == 204


def test_a_customer_with_an_entitlement_cannot_be_deleted(api: httpx.Client) -> None:
    create_customer(api, key="k")
    assert ok(api.post("/sandbox/v1/customers/k/entitlements"))["feature_key"] == "sandbox"
    assert "active entitlements" in refused(api.delete("/api/v1/customers/k"), 409)
    assert api.delete("/sandbox/v1/customers/k/entitlements").status_code == 204
    assert api.delete("/api/v1/customers/k").status_code == 204


def test_the_number_of_subjects_of_a_customer_can_be_limited() -> None:
    with running_sandbox(max_subjects_per_customer=1) as url, httpx.Client(base_url=url) as api:
        customer = create_customer(api, key="k", subjects=["a"])
        two = {"usageAttribution": {"subjectKeys": ["a", "b"]}}
        assert "at most 1" in refused(api.post("/api/v1/customers", json={"name": "b"} | two), 400)
        assert "at most 1" in refused(api.put("/api/v1/customers/k", json=body_of(customer) | two), 400)
