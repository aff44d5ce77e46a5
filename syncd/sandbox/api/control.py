"""Routes that OpenMeter does not have: /healthz, and /sandbox/v1 to set up and observe a test."""

from typing import Literal

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
from syncd.sandbox.store import billing, customers, events, meters

router = APIRouter(tags=["Sandbox only"])

_CUSTOMER = "/sandbox/v1/customers/{id_or_key}"


class SubscriptionBody(SandboxBody):
    """The body of POST .../subscriptions."""

    plan_key: str | None = None
    starts_in: float = Field(default=0, ge=0)


class EntitlementBody(SandboxBody):
    """The body of POST .../entitlements."""

    feature_key: str = Field(default="sandbox", min_length=1)


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
def entitle(id_or_key: IdOrKey, db: Db, body: EntitlementBody | None = None) -> Response:
    """Give a customer an active entitlement; 201."""
    with db.writing() as connection:
        customer = customers.get_live(connection, id_or_key)
        return answer(
            billing.entitle(connection, customer["id"], (body or EntitlementBody()).feature_key), 201
        )


@router.delete(_CUSTOMER + "/entitlements")
def withdraw(id_or_key: IdOrKey, db: Db) -> Response:
    """Remove all entitlements of a customer; 204."""
    with db.writing() as connection:
        billing.withdraw(connection, customers.get_live(connection, id_or_key)["id"])
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
