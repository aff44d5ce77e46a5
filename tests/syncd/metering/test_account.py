"""What a customer has, over both dialects: subscriptions, entitlements with what remains, credits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import pytest

from syncd.core.errors import UnreliableApiError
from syncd.metering.base import Account, Credit
from tests.specs import checked
from tests.syncd.metering.test_contract import specs_of
from tests.syncd.sandbox.support import create_customer, event, ok, send
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import Target, open_target, target_with

pytestmark = pytest.mark.slow


@pytest.fixture
def target(sandbox: httpx.Client, dialect: str) -> Iterator[Target]:
    target = open_target(dialect, str(sandbox.base_url))
    checked(target._client, specs_of(dialect))
    yield target
    target.close()


def test_a_customer_without_anything_has_nothing(target: Target, sandbox: httpx.Client) -> None:
    assert target.account(create_customer(sandbox)["id"]) == Account()


def test_an_entitlement_says_how_much_is_left_of_what(
    target: Target, sandbox: httpx.Client, dialect: str
) -> None:
    customer = create_customer(sandbox, "Acme", key="acme", subjects=["alice", "bob"])
    ok(sandbox.post("/sandbox/v1/customers/acme/entitlements", json={"feature_key": "api", "allowance": 5}))
    ok(sandbox.post("/sandbox/v1/customers/acme/entitlements", json={"feature_key": "sso"}))
    send(sandbox, event("1"), event("2", subject="bob"))
    api, sso = target.account(customer["id"]).entitlements
    assert (api.feature, api.has_access, api.left, api.used, api.quota, api.overage) == (
        "api",
        True,
        3,
        2,
        5,
        0,
    )
    assert (sso.feature, sso.has_access, sso.left, sso.quota) == ("sso", True, None, None)
    send(sandbox, *(event(f"more {number}") for number in range(4)))
    api, _ = target.account(customer["id"]).entitlements
    assert (api.has_access, api.left, api.used, api.overage) == (False, 0, 6, 1)
    if dialect == "openmeter-v1":
        assert api.resets_at is not None
        assert api.resets_at > datetime.now(UTC)


def test_a_subscription_names_its_plan_until_it_has_ended(target: Target, sandbox: httpx.Client) -> None:
    customer = create_customer(sandbox, "Acme", key="acme")
    made = ok(sandbox.post("/sandbox/v1/customers/acme/subscriptions", json={"plan_key": "gold"}))
    (found,) = target.account(customer["id"]).subscriptions
    assert (found.id, found.name, found.plan, found.version, found.status) == (
        made["id"],
        "Gold",
        "gold",
        1,
        "active",
    )
    assert found.active_from is not None
    assert found.active_to is None
    sandbox.delete("/sandbox/v1/customers/acme/subscriptions").raise_for_status()
    assert target.account(customer["id"]).subscriptions == ()


@pytest.mark.parametrize("dialect", ["openmeter-v3"])
def test_credits_are_listed_by_currency(target: Target, sandbox: httpx.Client) -> None:
    customer = create_customer(sandbox, "Acme", key="acme")
    grant = {"name": "start", "currency": "EUR", "amount": "12.50"}
    ok(sandbox.post(f"/api/v3/openmeter/customers/{customer['id']}/credits/grants", json=grant))
    assert target.account(customer["id"]).credits == (Credit("EUR", "12.5", "0"),)


def test_konnect_is_asked_for_the_value_of_each_metered_feature() -> None:
    """Konnect has no v1 beside v3; its value path is that of its plugin `entitlement-enforcement`."""

    def answer(asked: Asked) -> Answer:
        if asked.path.endswith("/entitlement-access"):
            metered = {"feature_key": "api", "type": "metered", "has_access": True}
            return Answer({"data": [metered, {"feature_key": "sso", "type": "boolean", "has_access": True}]})
        if asked.path.endswith("/features/api/value"):
            return Answer(
                {"has_access": True, "balance": "7", "usage": 3, "total_available_grant_amount": "10"}
            )
        if asked.path.endswith("/credits/balance"):
            return Answer(status=403)
        return Answer({"data": []})

    with serving(answer) as server:
        target = target_with("openmeter-v3", f"{server.url}/v3")
        api, sso = target.account("01M8HR1JDKQ044VK14HCTP37G4").entitlements
        target.close()
        assert (api.left, api.used, api.quota) == (7, 3, 10)
        assert (sso.has_access, sso.left) == (True, None)
        assert len(server.asked) == 4, "a boolean feature has no value to ask for"


@pytest.mark.parametrize(
    ("dialect", "answered"),
    [
        ("openmeter-v1", {"items": [{"id": "s", "customerId": "other", "status": "active"}]}),
        ("openmeter-v3", {"data": [{"id": "s", "customer_id": "other", "status": "active"}]}),
    ],
)
def test_the_subscription_of_another_customer_is_never_shown(dialect: str, answered: object) -> None:
    with serving(lambda _asked: Answer(answered)) as server:
        target = target_with(dialect, server.url)
        with pytest.raises(UnreliableApiError):
            target.account("01M8HR1JDKQ044VK14HCTP37G4")
        target.close()
