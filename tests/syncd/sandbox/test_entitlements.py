"""Features, entitlements and credits: what a customer has access to, and what is left."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import httpx

from syncd.sandbox.store import entitlements
from syncd.sandbox.values import parse_time, rfc3339
from tests.syncd.sandbox.support import create_customer, event, ok, refused, send

V3 = "/api/v3/openmeter"


def left(api: httpx.Client, feature: str = "api") -> float:
    value: float = ok(api.get(f"/api/v1/customers/k/entitlements/{feature}/value"))["balance"]
    return value


@contextmanager
def at(seconds: float) -> Iterator[None]:
    with patch("syncd.sandbox.store.entitlements.time.time", lambda: seconds):
        yield


def test_a_metered_entitlement_is_used_up_by_the_events_of_all_subjects_of_its_customer(
    api: httpx.Client,
) -> None:
    create_customer(api, key="k", subjects=["a", "b"])
    ok(api.post("/sandbox/v1/customers/k/entitlements", json={"feature_key": "api", "allowance": 3}))
    assert left(api) == 3
    assert send(
        api, event("1", subject="a"), event("2", subject="b"), event("3", subject="nobody")
    ).is_success
    assert left(api) == 1
    assert send(api, event("4", subject="k"), event("5", subject="k")).is_success
    access = ok(api.get("/api/v1/customers/k/access"))["entitlements"]["api"]
    assert "hasAccess" not in access  # as the real server, which leaves out what is false
    assert (access["balance"], access["overage"]) == (0, 1)
    asked = {"customer": {"keys": ["b"]}, "feature": {"keys": ["api"]}}
    [found] = ok(api.post(f"{V3}/entitlement-access/query", json=asked))["data"]
    assert found["features"]["api"]["reason"]["code"] == "usage_limit_reached"


def test_usage_counts_in_its_own_period_only(api: httpx.Client) -> None:
    create_customer(api, key="k")
    wanted = {"feature_key": "api", "allowance": 3, "interval": "HOUR"}
    ok(api.post("/sandbox/v1/customers/k/entitlements", json=wanted))
    assert send(api, event("1", subject="k")).is_success
    assert left(api) == 2
    shown = ok(api.get("/api/v2/customers/k/entitlements/api"))["currentUsagePeriod"]
    with at(parse_time(shown["to"]).timestamp() + 1):
        assert (
            ok(api.get("/api/v2/customers/k/entitlements/api"))["currentUsagePeriod"]["from"] == shown["to"]
        )
        assert left(api) == 3


def test_a_month_ends_on_the_last_day_of_a_month_that_lacks_the_day_of_the_anchor() -> None:
    period = {"interval": "MONTH", "anchor": "2026-01-31T10:00:00Z"}
    now = parse_time("2026-03-01T00:00:00Z").timestamp()
    start, end = entitlements._period(period, now)
    assert rfc3339(start) == "2026-02-28T10:00:00Z"
    assert rfc3339(end) == "2026-03-31T10:00:00Z"


def test_a_feature_counts_only_the_part_of_its_meter_that_its_filters_name(api: httpx.Client) -> None:
    create_customer(api, key="k")
    feature = {
        "key": "input",
        "name": "Input",
        "meterSlug": "kong_llm_tokens",
        "meterGroupByFilters": {"type": "input"},
    }
    ok(api.post("/api/v1/features", json=feature))
    wanted = {
        "type": "metered",
        "featureKey": "input",
        "issueAfterReset": 100,
        "usagePeriod": {"interval": "DAY"},
    }
    ok(api.post("/api/v2/customers/k/entitlements", json=wanted))
    for kind in ("input", "output"):
        data = {"tokens": 40, "type": kind}
        assert send(api, event(kind, type="kong.llm_request", subject="k", data=data)).is_success
    assert left(api, "input") == 60


def test_a_meter_that_a_feature_counts_by_cannot_be_deleted(api: httpx.Client) -> None:
    feature = {"key": "api", "name": "API", "meterSlug": "kong_api_requests"}
    ok(api.post("/api/v1/features", json=feature))
    refused(api.delete("/api/v1/meters/kong_api_requests"), 409)


def test_credits_are_summed_by_currency_and_can_be_spent(api: httpx.Client) -> None:
    customer = create_customer(api, key="k")
    path = f"{V3}/customers/{customer['id']}/credits"
    for amount in ("10", "2.50"):
        given = {"name": "Prepaid", "currency": "EUR", "amount": amount}
        ok(api.post(f"{path}/grants", json=given))
    assert ok(api.get(f"{path}/balance"))["balances"] == [
        {"currency": "EUR", "live": "12.5", "pending": "0", "settled": "12.5"}
    ]
    assert api.delete("/sandbox/v1/customers/k/credits").status_code == 204
    balance = ok(api.get(f"{path}/balance", params={"filter[currency]": "EUR"}))["balances"]
    assert [it["live"] for it in balance] == ["0"]
