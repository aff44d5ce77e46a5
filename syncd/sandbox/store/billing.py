"""Subscriptions and invoices, just enough to make customers as hard to change as real ones.

OpenMeter creates them from plans; here a test creates them directly, under /sandbox/v1.
"""

import sqlite3
from hashlib import sha256
from typing import Any

from syncd.sandbox.values import now_rfc3339, ulid


def subscribe(
    connection: sqlite3.Connection, customer_id: str, plan_key: str | None, *, starts_in: float = 0
) -> dict[str, Any]:
    """Give a customer a subscription that starts in so many seconds, in the shape of Subscription."""
    made, since = now_rfc3339(), now_rfc3339(plus=starts_in)
    connection.execute(
        "INSERT INTO subscriptions VALUES (?, ?, ?, ?, NULL, ?)",
        (ulid(), customer_id, plan_key, since, made),
    )
    return all_subscriptions(connection, customer_id)[-1]


def unsubscribe(connection: sqlite3.Connection, customer_id: str, *, ends_in: float = 0) -> None:
    """End the running subscriptions of a customer in so many seconds; until then they are canceled."""
    connection.execute(
        "UPDATE subscriptions SET active_to = ? WHERE customer_id = ? AND active_to IS NULL",
        (now_rfc3339(plus=ends_in), customer_id),
    )


def active_subscriptions(connection: sqlite3.Connection, customer_id: str) -> list[dict[str, Any]]:
    """List the subscriptions of a customer that run now, oldest first, in the shape of Subscription."""
    found = all_subscriptions(connection, customer_id)
    return [subscription for subscription in found if subscription["status"] in ("active", "canceled")]


def all_subscriptions(connection: sqlite3.Connection, customer_id: str | None = None) -> list[dict[str, Any]]:
    """List the subscriptions of all customers or of one, including ended ones, by id, as Subscription."""
    rows = connection.execute(
        "SELECT * FROM subscriptions WHERE :one IS NULL OR customer_id = :one ORDER BY id",
        {"one": customer_id},
    )
    return [_subscription(row) for row in rows]


def open_invoice(connection: sqlite3.Connection, customer_id: str, status: str) -> dict[str, Any]:
    """Give a customer an invoice that is not finished, and return it as {id, status}."""
    invoice_id = ulid()
    connection.execute(
        "INSERT INTO invoices VALUES (?, ?, ?, ?)", (invoice_id, customer_id, status, now_rfc3339())
    )
    return {"id": invoice_id, "status": status}


def finish_invoices(connection: sqlite3.Connection, customer_id: str) -> None:
    """Mark all invoices of a customer as paid."""
    connection.execute("UPDATE invoices SET status = 'paid' WHERE customer_id = ?", (customer_id,))


def open_invoices(connection: sqlite3.Connection, customer_id: str) -> list[dict[str, Any]]:
    """List the invoices of a customer that forbid its deletion, as {id, status}."""
    rows = connection.execute(
        "SELECT id, status FROM invoices WHERE customer_id = ? AND status != 'paid' ORDER BY id",
        (customer_id,),
    )
    return [dict(row) for row in rows]


def invoices(
    connection: sqlite3.Connection, customer_ids: list[str], statuses: list[str]
) -> list[dict[str, Any]]:
    """List invoices, of all customers or of some, in the shape of Invoice as far as one reads it.

    Those still gathering are shown only to those who ask for them (openmeter/billing/httpdriver/invoice.go).
    """
    rows = connection.execute("SELECT * FROM invoices ORDER BY id").fetchall()
    return [
        {
            "id": row["id"],
            "number": f"GATHER-{row['id'][-4:]}",
            "type": "standard",
            "status": row["status"],
            "currency": "USD",
            "customer": {"id": row["customer_id"]},
            "createdAt": row["created_at"],
            "updatedAt": row["created_at"],
        }
        for row in rows
        if (not customer_ids or row["customer_id"] in customer_ids)
        and (row["status"] in statuses if statuses else row["status"] != "gathering")
    ]


def _subscription(row: sqlite3.Row) -> dict[str, Any]:
    since, made = row["active_from"], row["created_at"]
    subscription: dict[str, Any] = {
        "id": row["id"],
        "customerId": row["customer_id"],
        "status": _status(row),
        "name": (row["plan_key"] or "sandbox").title(),
        "createdAt": made,
        "updatedAt": made,
        "activeFrom": since,
        "alignment": {"billablesMustAlign": True},
        "billingAnchor": since,
        "billingCadence": "P1M",
        "currency": "USD",
        "costBasisMode": "dynamic",
        "costBasisPins": [],
        "proRatingConfig": {"enabled": True, "mode": "prorate_prices"},
        "settlementMode": "credit_then_invoice",
    }
    if row["active_to"] is not None:
        subscription["activeTo"] = row["active_to"]
    if row["plan_key"]:
        plan_id = "0" + sha256(row["plan_key"].encode()).hexdigest()[:25].upper()
        subscription["plan"] = {"id": plan_id, "key": row["plan_key"], "version": 1}
    return subscription


def _status(row: sqlite3.Row) -> str:
    now = now_rfc3339()
    if row["active_from"] > now:
        return "scheduled"
    if row["active_to"] is None:
        return "active"
    return "canceled" if row["active_to"] > now else "inactive"
