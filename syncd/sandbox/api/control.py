"""Routes that OpenMeter does not have: /healthz, and /sandbox/v1 to set up and observe a test."""

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from syncd.sandbox.api.common import (
    Db,
    FaultsInForce,
    IdOrKey,
    RejectedCounts,
    RequestCounts,
    answer,
    no_content,
)
from syncd.sandbox.bodies import SandboxBody
from syncd.sandbox.faults import Fault, Lag
from syncd.sandbox.store import billing, customers, entitlements, events, meters
from syncd.sandbox.store.entitlements import EntitlementBody, FeatureBody

router = APIRouter(tags=["Sandbox only"])

_CUSTOMER = "/sandbox/v1/customers/{id_or_key}"


class SubscriptionBody(SandboxBody):
    """The body of POST .../subscriptions."""

    plan_key: str | None = None
    starts_in: float = Field(default=0, ge=0)


class SandboxEntitlementBody(SandboxBody):
    """The body of POST .../entitlements: boolean, or metered with an allowance in each period."""

    feature_key: str = Field(default="sandbox", min_length=1)
    allowance: float | None = Field(default=None, ge=0)
    meter_slug: str = "kong_api_requests"
    interval: Literal["HOUR", "DAY", "WEEK", "MONTH", "YEAR"] = "MONTH"


class InvoiceBody(SandboxBody):
    """The body of POST .../invoices."""

    status: Literal["gathering", "draft", "issuing", "issued"] = "gathering"


@router.get("/healthz")
def healthz() -> Response:
    """Return {"status": "ok"}; needs no token."""
    return answer({"status": "ok"})


@router.get("/sandbox/v1/stats")
def stats(db: Db, rejected: RejectedCounts, requests: RequestCounts) -> Response:
    """Count the events and customers in the database, and the refusals and requests since the start."""
    with db.reading() as connection:
        counts = events.statistics(connection) | {"customers": customers.count(connection)}
    return answer(counts | {"events_rejected": rejected["events"], "requests_by_endpoint": dict(requests)})


@router.post("/sandbox/v1/reset")
def reset(db: Db, faults: FaultsInForce, rejected: RejectedCounts, requests: RequestCounts) -> Response:
    """Reset to a new database with only the standard meters, and clear all faults; 204."""
    db.empty()
    with db.writing() as connection:
        meters.create_standard_meters(connection)
    faults.clear()
    rejected.clear()
    requests.clear()
    return no_content()


@router.get("/sandbox/v1/duplicates")
def list_duplicates(db: Db) -> Response:
    """List the events that were received more than once: [{source, id, received}]."""
    with db.reading() as connection:
        return answer(events.duplicates(connection))


@router.post(_CUSTOMER + "/subscriptions")
def subscribe(id_or_key: IdOrKey, db: Db, body: SubscriptionBody | None = None) -> Response:
    """Give a customer a subscription that starts now or in so many seconds; 201."""
    wanted = body or SubscriptionBody()
    with db.writing() as connection:
        customer = customers.get_live(connection, id_or_key)
        made = billing.subscribe(connection, customer["id"], wanted.plan_key, starts_in=wanted.starts_in)
    return answer(made, 201)


@router.delete(_CUSTOMER + "/subscriptions")
def unsubscribe(id_or_key: IdOrKey, db: Db, ends_in: float = 0) -> Response:
    """End the subscriptions of a customer, now or in so many seconds; 204."""
    with db.writing() as connection:
        billing.unsubscribe(connection, customers.get_live(connection, id_or_key)["id"], ends_in=ends_in)
    return no_content()


@router.post(_CUSTOMER + "/entitlements")
def entitle(id_or_key: IdOrKey, db: Db, body: SandboxEntitlementBody | None = None) -> Response:
    """Give a customer an entitlement in place of the one it has; makes the feature if there is none; 201."""
    wanted = body or SandboxEntitlementBody()
    metered = wanted.allowance is not None
    with db.writing() as connection:
        customer = customers.get_live(connection, id_or_key)
        if wanted.feature_key not in {feature["key"] for feature in entitlements.list_features(connection)}:
            meter = {"meterSlug": wanted.meter_slug} if metered else {}
            feature = {"key": wanted.feature_key, "name": wanted.feature_key} | meter
            entitlements.create_feature(connection, FeatureBody.model_validate(feature))
        found = entitlements.entitlements(connection, customer["id"])
        if any(had["featureKey"] == wanted.feature_key for had in found):
            entitlements.withdraw(connection, customer["id"], wanted.feature_key)
        details: dict[str, Any] = {"type": "boolean", "featureKey": wanted.feature_key}
        if metered:
            period = {"interval": wanted.interval}
            details |= {"type": "metered", "issueAfterReset": wanted.allowance, "usagePeriod": period}
        made = EntitlementBody.model_validate(details)
        entitlement = entitlements.entitle(connection, customer, made)
    return answer({"id": entitlement["id"], "feature_key": wanted.feature_key}, 201)


@router.delete(_CUSTOMER + "/entitlements")
def withdraw(id_or_key: IdOrKey, db: Db) -> Response:
    """Remove all entitlements of a customer; 204."""
    with db.writing() as connection:
        entitlements.withdraw(connection, customers.get_live(connection, id_or_key)["id"])
    return no_content()


@router.delete(_CUSTOMER + "/credits")
def spend_credits(id_or_key: IdOrKey, db: Db) -> Response:
    """Take all credits of a customer away; 204."""
    with db.writing() as connection:
        entitlements.spend_credits(connection, customers.get_live(connection, id_or_key)["id"])
    return no_content()


@router.post(_CUSTOMER + "/invoices")
def invoice(id_or_key: IdOrKey, db: Db, body: InvoiceBody | None = None) -> Response:
    """Give a customer an open invoice; 201."""
    with db.writing() as connection:
        customer = customers.get_live(connection, id_or_key)
        status = (body or InvoiceBody()).status
        return answer(billing.open_invoice(connection, customer["id"], status), 201)


@router.delete(_CUSTOMER + "/invoices")
def finish_invoices(id_or_key: IdOrKey, db: Db) -> Response:
    """Finish all invoices of a customer; 204."""
    with db.writing() as connection:
        billing.finish_invoices(connection, customers.get_live(connection, id_or_key)["id"])
    return no_content()


@router.put("/sandbox/v1/lag")
def set_lag(lag: Lag, faults: FaultsInForce) -> Response:
    """Let lists lag behind, as those of an eventually consistent server; 204. By id all is current."""
    faults.lag = lag
    return no_content()


@router.get("/sandbox/v1/faults")
def list_faults(faults: FaultsInForce) -> Response:
    """List the faults and how often each was triggered."""
    return answer(faults.describe())


@router.post("/sandbox/v1/faults")
def add_fault(fault: Fault, faults: FaultsInForce) -> Response:
    """Add a fault; 201."""
    return answer(faults.add(fault), 201)


@router.delete("/sandbox/v1/faults")
def clear_faults(faults: FaultsInForce) -> Response:
    """Remove all faults; 204."""
    faults.clear()
    return no_content()
