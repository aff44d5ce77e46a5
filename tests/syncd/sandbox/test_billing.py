"""Entitlements, subscriptions, accounts and credits of a customer, in both dialects."""

import httpx
import pytest

from tests.syncd.sandbox.support import create_customer, ok, refused

V3 = "/api/v3/openmeter"


def test_entitlements_are_shown_as_access(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    assert ok(api.get("/api/v1/customers/k/access")) == {"entitlements": {}}
    ok(api.post("/sandbox/v1/customers/k/entitlements", json={"feature_key": "gpt"}))
    assert ok(api.get("/api/v1/customers/k/access")) == {"entitlements": {"gpt": {"hasAccess": True}}}
    shown = ok(api.get(f"{V3}/customers/{customer['id']}/entitlement-access"))["data"]
    assert shown == [{"type": "boolean", "feature_key": "gpt", "has_access": True}]


def test_subscriptions_are_listed_including_ended_ones(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    ok(api.post("/sandbox/v1/customers/k/subscriptions"))
    api.delete("/sandbox/v1/customers/k/subscriptions")
    ok(api.post("/sandbox/v1/customers/k/subscriptions"))
    create_customer(api, "other")
    ok(api.post("/sandbox/v1/customers/other/subscriptions"))
    listed = ok(api.get("/api/v1/customers/k/subscriptions", params={"page": 1, "pageSize": 1}))
    assert (listed["totalCount"], len(listed["items"])) == (2, 1)
    assert listed["items"][0]["activeTo"]
    mine = {"filter[customer_id][eq]": customer["id"]}
    shown = ok(api.get(f"{V3}/subscriptions", params=mine))["data"]
    assert [subscription["status"] for subscription in shown] == ["inactive", "active"]
    running = ok(api.get(f"{V3}/subscriptions", params={**mine, "filter[status][oeq]": "active,canceled"}))
    assert running["data"] == shown[1:]


def test_there_are_no_accounts_and_no_credits(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    assert ok(api.get("/api/v1/customers/k/apps"))["items"] == []
    assert ok(api.get(f"{V3}/customers/{customer['id']}/billing"))["app_data"] == {}
    assert ok(api.get(f"{V3}/customers/{customer['id']}/credits/grants"))["data"] == []


@pytest.mark.parametrize("part", ["access", "subscriptions", "apps"])
def test_a_deleted_or_unknown_customer_is_refused(api: httpx.Client, part: str) -> None:
    customer = create_customer(api, key="k")
    api.delete("/api/v1/customers/k")
    refused(api.get(f"/api/v1/customers/{customer['id']}/{part}"), 412)
    refused(api.get(f"/api/v1/customers/nobody/{part}"), 404)


def test_over_v3_only_the_access_of_a_deleted_customer_is_refused(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    api.delete("/api/v1/customers/k")
    refused(api.get(f"{V3}/customers/{customer['id']}/entitlement-access"), 412)
    for part in ("billing", "credits/grants"):
        ok(api.get(f"{V3}/customers/{customer['id']}/{part}"))


@pytest.mark.parametrize("part", ["entitlement-access", "billing", "credits/grants"])
def test_over_v3_what_is_no_id_is_not_found(api: httpx.Client, part: str) -> None:
    refused(api.get(f"{V3}/customers/nobody/{part}"), 404)


def test_an_open_invoice_forbids_the_deletion_of_its_customer(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    invoice = ok(api.post("/sandbox/v1/customers/k/invoices"))
    reason = f"invoice {invoice['id']} is still in gathering state"
    assert reason in refused(api.delete("/api/v1/customers/k"), 400)
    assert reason in refused(api.delete(f"{V3}/customers/{customer['id']}"), 400)
    assert api.delete("/sandbox/v1/customers/k/invoices").status_code == 204
    assert api.delete("/api/v1/customers/k").status_code == 204


def test_each_reason_against_a_deletion_has_a_line(api: httpx.Client) -> None:
    create_customer(api, key="k")
    ok(api.post("/sandbox/v1/customers/k/subscriptions"))
    ok(api.post("/sandbox/v1/customers/k/invoices"))
    subscription, invoice = refused(api.delete("/api/v1/customers/k"), 400).splitlines()
    assert "still have active subscriptions" in subscription
    assert "still in gathering state" in invoice


def test_a_gathering_invoice_is_shown_only_over_v1_to_those_who_ask_for_it(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    create_customer(api, "other")
    invoice = ok(api.post("/sandbox/v1/customers/k/invoices"))
    ok(api.post("/sandbox/v1/customers/other/invoices"))
    mine = {"customers": customer["id"]}
    assert ok(api.get("/api/v1/billing/invoices", params=mine))["items"] == []
    shown = ok(api.get("/api/v1/billing/invoices", params=mine | {"statuses": "gathering"}))["items"]
    assert [(item["id"], item["customer"]["id"]) for item in shown] == [(invoice["id"], customer["id"])]
    assert ok(api.get(f"{V3}/billing/invoices"))["data"] == []
    refused(api.get(f"{V3}/billing/invoices", params={"filter[status][eq]": "gathering"}), 400)


def test_over_v3_deleting_an_unknown_customer_is_not_an_error(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    for _ in range(2):
        assert api.delete(f"{V3}/customers/{customer['id']}").status_code == 204
    assert api.delete(f"{V3}/customers/01G65Z755AFWAKHE12NY0CQ9FH").status_code == 204


def test_over_v3_a_customer_with_a_subscription_or_an_entitlement_cannot_be_deleted(
    api: httpx.Client,
) -> None:
    customer = create_customer(api, key="k")
    ok(api.post("/sandbox/v1/customers/k/subscriptions"))
    refused(api.delete(f"{V3}/customers/{customer['id']}"), 400)
    api.delete("/sandbox/v1/customers/k/subscriptions")
    ok(api.post("/sandbox/v1/customers/k/entitlements"))
    refused(api.delete(f"{V3}/customers/{customer['id']}"), 409)


def test_a_subscription_that_is_still_to_start_allows_everything(api: httpx.Client) -> None:
    customer = create_customer(api, key="k", subjects=["a"])
    made = ok(api.post("/sandbox/v1/customers/k/subscriptions", json={"starts_in": 3600}))
    assert made["status"] == "scheduled"
    assert "currentSubscriptionId" not in ok(api.get("/api/v1/customers/k"))
    body = {"name": "Alice", "key": "k", "usageAttribution": {"subjectKeys": ["b"]}}
    ok(api.put("/api/v1/customers/k", json=body))
    assert api.delete(f"/api/v1/customers/{customer['id']}").status_code == 204


def test_a_canceled_subscription_forbids_as_much_as_an_active_one(api: httpx.Client) -> None:
    create_customer(api, key="k", subjects=["a"])
    made = ok(api.post("/sandbox/v1/customers/k/subscriptions"))
    api.delete("/sandbox/v1/customers/k/subscriptions", params={"ends_in": 3600})
    shown = ok(api.get("/api/v1/customers/k"))
    assert [(item["id"], item["status"]) for item in shown["subscriptions"]] == [(made["id"], "canceled")]
    body = {"name": "Alice", "key": "k", "usageAttribution": {"subjectKeys": ["b"]}}
    refused(api.put("/api/v1/customers/k", json=body), 400)
    refused(api.delete("/api/v1/customers/k"), 400)
