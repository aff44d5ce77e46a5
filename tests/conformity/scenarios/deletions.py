"""Customers go, as policy `sync` has it, and those that people gave something stay."""

from __future__ import annotations

from typing import Any

from tests.conformity.server import Server, reason
from tests.conformity.stage import APPLIED, BLOCKED, IN_SYNC, NotOffered, Stage, expect

_SYNC = {"policy": "sync", "policy_options": {"detach_after": "1s", "delete_after": "1s"}}


def _customer_then_its_consumer_goes(stage: Stage) -> dict[str, Any]:
    """Create two customers with currencies, and set the policy for the deletion of the first."""
    leaver, _ = stage.users("leaver", "stays")
    # By id: over openmeter-v3 nothing else tells a subject that syncd attached from one of a person.
    mapping = {"subject_field": "id", "key": "{username}", "create": {"currency": "USD"}}
    stage.configure(**_SYNC, mapping=mapping)
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    return stage.customers()[leaver]


def _leave(stage: Stage) -> None:
    """Remove the consumer, and run until what was marked may be deleted."""
    stage.users("stays")
    stage.syncd("apply", "--yes", "--allow-empty", ends_with=(APPLIED, BLOCKED))


def _kinds(plan: dict[str, Any]) -> set[str]:
    return {change["kind"] for change in plan["changes"]}


def _plan_of_due(stage: Stage, seconds: float = 10) -> dict[str, Any]:
    """Return the first plan after the grace period, which says something of the leaver."""

    def probe() -> dict[str, Any]:
        plan = stage.plan()
        return plan if {"delete-customer", "blocked"} & _kinds(plan) else {}

    return stage.eventually(probe, "the plan neither deletes the customer nor says why not", seconds)


def a_customer_whose_consumer_went_is_deleted(stage: Stage) -> None:
    foreign = stage.by_hand(stage.named("finance"), stage.named("finance-subject"))
    leaver = _customer_then_its_consumer_goes(stage)
    _leave(stage)
    plan = _plan_of_due(stage)
    expect("blocked" not in _kinds(plan), f"the plan has {plan['changes']!r:.300}")
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    there = {each["id"] for each in stage.customers().values()}
    expect(leaver["id"] not in there, "the customer is still there")
    expect(foreign["id"] in there, "a customer that a person created was deleted")
    stage.syncd("plan", ends_with=IN_SYNC)


def a_subscription_forbids_a_deletion(stage: Stage) -> None:
    leaver = _customer_then_its_consumer_goes(stage)
    _subscribe(stage, leaver, billed=False)
    _leave(stage)
    _stays(stage, leaver, "subscription")


def an_entitlement_forbids_a_deletion(stage: Stage) -> None:
    leaver = _customer_then_its_consumer_goes(stage)
    _entitle(stage, leaver)
    _leave(stage)
    _stays(stage, leaver, "entitlement")


def an_open_invoice_forbids_a_deletion(stage: Stage) -> None:
    leaver = _customer_then_its_consumer_goes(stage)
    _open_invoice(stage, leaver)
    _leave(stage)
    _stays(stage, leaver, "invoice")


def _stays(stage: Stage, leaver: dict[str, Any], why: str) -> None:
    """The customer stays; plan and apply come to rest over it and name the reason."""
    _plan_of_due(stage)
    # Some reasons show only when the deletion is refused; the plan knows them from then on.
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    plan = stage.plan()
    expect("delete-customer" not in _kinds(plan), "after a refusal the plan deletes again")
    reasons = [change["reason"] for change in plan["changes"] if change["kind"] == "blocked"]
    expect(any(why in each for each in reasons), f"the plan does not name the {why}: {reasons}")
    there = {each["id"] for each in stage.customers().values()}
    expect(leaver["id"] in there, "the customer was deleted")
    stage.syncd("apply", "--yes", ends_with=APPLIED)


# What people give a customer: features, plans, subscriptions of OpenMeter, or the sandbox's own paths.


def _sandbox(server: Server, customer: str, part: str) -> bool:
    """Use the sandbox's path for what OpenMeter does with features and plans."""
    return server.ask("POST", f"/sandbox/v1/customers/{customer}/{part}").is_success


def _needs_v1(server: Server, what: str) -> None:
    if not server.v1:
        raise NotOffered(f"{what} are set up over openmeter-v1")


def _entitle(stage: Stage, customer: dict[str, Any]) -> None:
    server, feature = stage.server, stage.named("feature").lower().replace("-", "_")
    _needs_v1(server, "entitlements")
    if _sandbox(server, customer["id"], "entitlements"):
        return
    answer = server.ask("POST", "/api/v1/features", {"key": feature, "name": feature})
    if not answer.is_success:
        raise NotOffered(f"features: {reason(answer)}")
    server.features.append(answer.json()["id"])
    body = {"type": "boolean", "featureKey": feature}
    server.made("POST", f"/api/v2/customers/{customer['id']}/entitlements", body)


def _subscribe(stage: Stage, customer: dict[str, Any], *, billed: bool) -> str:
    """Subscribe the customer to a plan of its own; return the subscription's id."""
    server, key = stage.server, stage.named("plan").lower().replace("-", "_")
    _needs_v1(server, "subscriptions")
    if _sandbox(server, customer["id"], "subscriptions"):
        return ""
    price = {"type": "flat", "amount": "10", "paymentTerm": "in_advance"} if billed else None
    fee = {"type": "flat_fee", "key": "fee", "name": "Fee", "billingCadence": "P1M", "price": price}
    phase = {"key": "main", "name": "Main", "duration": None, "rateCards": [fee]}
    body = {"key": key, "name": key, "currency": "USD", "billingCadence": "P1M", "phases": [phase]}
    answer = server.ask("POST", "/api/v1/plans", body)
    if not answer.is_success:
        raise NotOffered(f"plans: {reason(answer)}")
    plan = answer.json()["id"]
    server.plans.append(plan)
    server.made("POST", f"/api/v1/plans/{plan}/publish")
    wanted = {"customerId": customer["id"], "plan": {"key": key}}
    identity: str = server.made("POST", "/api/v1/subscriptions", wanted)["id"]
    return identity


def _open_invoice(stage: Stage, customer: dict[str, Any]) -> None:
    """Give the customer an invoice that is not final and no subscription that still runs."""
    if _sandbox(stage.server, customer["id"], "invoices"):
        return
    subscription = _subscribe(stage, customer, billed=True)
    # Without a billing worker the invoice is only made when somebody tries to delete the customer.
    stage.server.made("POST", f"/api/v1/subscriptions/{subscription}/cancel", {"timing": "immediate"})


SCENARIOS = (
    a_customer_whose_consumer_went_is_deleted,
    a_subscription_forbids_a_deletion,
    an_entitlement_forbids_a_deletion,
    an_open_invoice_forbids_a_deletion,
)
