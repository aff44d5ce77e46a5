"""Customers, with the same refusals as the real server.

Sources: openmeter/customer/adapter/customer.go and openmeter/subscription/validators/customer/validator.go. A
key that is a subject of another customer is refused, but a subject may be the key of another customer: then
both get its events, and every later change of the customer with that key fails on the first rule. The real
server behaves the same.
"""

import sqlite3
from dataclasses import dataclass
from typing import Any

import orjson

from syncd.sandbox.problems import (
    NAMESPACE,
    ProblemError,
    conflict,
    invalid,
    not_found,
    precondition_failed,
)
from syncd.sandbox.store import billing, entitlements, subjects
from syncd.sandbox.store.customer_body import CustomerBody, replaced, subject_keys
from syncd.sandbox.values import now_rfc3339, ulid


@dataclass(frozen=True, slots=True)
class CustomerFilter:
    """Which customers to list, and in which order.

    Texts match partially and ignore case; `plan_key`, `key_is` and `subject_is` match exactly. Customers
    younger than `lag` in seconds are left out.
    """

    page: int = 1
    page_size: int = 100
    order_by: str = "name"
    order: str = "ASC"
    include_deleted: bool = False
    key: str | None = None
    name: str | None = None
    primary_email: str | None = None
    subject: str | None = None
    plan_key: str | None = None
    key_is: str | None = None
    subject_is: str | None = None
    lag: float = 0


_WHERE = """
WHERE (:include_deleted OR deleted_at IS NULL)
  AND (:created_until IS NULL OR created_at <= :created_until)
  AND (:key IS NULL OR instr(lower(key), lower(:key)))
  AND (:name IS NULL OR instr(lower(name), lower(:name)))
  AND (:primary_email IS NULL OR instr(lower(primary_email), lower(:primary_email)))
  AND (:subject IS NULL OR EXISTS (
        SELECT 1 FROM json_each(document, '$.usageAttribution.subjectKeys')
        WHERE instr(lower(value), lower(:subject))))
  AND (:key_is IS NULL OR key = :key_is)
  AND (:subject_is IS NULL OR EXISTS (
        SELECT 1 FROM json_each(document, '$.usageAttribution.subjectKeys') WHERE value = :subject_is))
  AND (:plan_key IS NULL OR EXISTS (
        SELECT 1 FROM subscriptions
        WHERE customer_id = customers.id AND plan_key = :plan_key
          AND active_from <= :now AND (active_to IS NULL OR active_to > :now)))
"""
_COLUMNS = {"id": "id", "name": "name", "createdAt": "created_at"}


def list_customers(
    connection: sqlite3.Connection, wanted: CustomerFilter, *, expand: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Return the number of matching customers and the requested page of them, in the shape of Customer."""
    order = "DESC" if wanted.order == "DESC" else "ASC"
    parameters = {name: getattr(wanted, name) for name in CustomerFilter.__slots__}
    parameters["now"] = now_rfc3339()
    parameters["created_until"] = now_rfc3339(plus=-wanted.lag) if wanted.lag else None
    parameters["offset"] = (wanted.page - 1) * wanted.page_size
    total: int = connection.execute(f"SELECT count(*) FROM customers {_WHERE}", parameters).fetchone()[0]  # noqa: S608
    rows = connection.execute(
        f"SELECT * FROM customers {_WHERE} "  # noqa: S608 - the variable parts are constants
        f"ORDER BY {_COLUMNS[wanted.order_by]} {order}, id {order} LIMIT :page_size OFFSET :offset",
        parameters,
    ).fetchall()
    return total, [_customer(connection, row, expand=expand) for row in rows]


def get(connection: sqlite3.Connection, id_or_key: str, *, expand: bool = False) -> dict[str, Any]:
    """Return a customer by id, even if deleted, or by key if it is not deleted. Raises the 404."""
    return _customer(connection, _find(connection, id_or_key), expand=expand)


def get_live(connection: sqlite3.Connection, id_or_key: str) -> dict[str, Any]:
    """Return a customer in order to change it. Raises the 404, or the 412 for a deleted one."""
    customer = get(connection, id_or_key)
    if "deletedAt" in customer:
        raise precondition_failed(f"customer is deleted [namespace={NAMESPACE} customer.id={customer['id']}]")
    return customer


def create(connection: sqlite3.Connection, body: CustomerBody, *, provision: bool = True) -> dict[str, Any]:
    """Create a customer and return it in the shape of Customer. Raises the 400s and 409s of its rules.

    With `provision` each of its subjects without an entity gets one, as the real server's provisioner does.
    """
    customer_id = ulid()
    document = replaced({}, body)
    given = body.usage_attribution.subject_keys if body.usage_attribution else []
    _attribute(connection, customer_id, document, given)
    if len(set(given)) < len(given):  # a PUT takes them
        raise _taken_subjects(given)
    now = now_rfc3339()
    connection.execute(
        "INSERT INTO customers VALUES (?, ?, ?, ?, NULL)", (customer_id, _stored(document), now, now)
    )
    if provision:
        subjects.provision(connection, customer_id, subject_keys(document))
    return get(connection, customer_id)


def replace(
    connection: sqlite3.Connection, id_or_key: str, body: CustomerBody, *, provision: bool = True
) -> dict[str, Any]:
    """Replace a customer: properties missing from the body are cleared, except e-mail address and currency.

    `provision` is that of `create`.

    Raises the 404, the 412 for a deleted customer, the 409s, and, while a subscription is active, the 400 for
    subject keys that differ in any way, order included, from those the API shows (sorted). A body without
    usageAttribution passes that check and clears the subjects: a trap of the real server, reproduced on
    purpose.
    """
    customer = get_live(connection, id_or_key)
    given = body.usage_attribution
    differs = given is not None and given.subject_keys != subject_keys(customer)
    if differs and billing.active_subscriptions(connection, customer["id"]):
        raise invalid("cannot change subject keys for customer with active subscriptions")
    document = replaced(customer, body)
    had = subject_keys(customer)
    added = [key for key in given.subject_keys if key not in had] if given else []
    _attribute(connection, customer["id"], document, added)
    connection.execute(
        "UPDATE customers SET document = ?, updated_at = ? WHERE id = ?",
        (_stored(document), now_rfc3339(), customer["id"]),
    )
    if provision:
        subjects.provision(connection, customer["id"], subject_keys(document))
    return get(connection, customer["id"])


def delete(connection: sqlite3.Connection, id_or_key: str) -> None:
    """Mark a customer as deleted and free its key and subjects.

    Raises the 404, the 412 of one deleted before, the 400 of an active subscription or an open invoice, and
    the 409 of an active entitlement (whose status is from
    openmeter/entitlement/validators/customer/validator.go).
    """
    customer_id = get_live(connection, id_or_key)["id"]
    reasons = [
        f"invoice {invoice['id']} is still in {invoice['status']} state"
        for invoice in billing.open_invoices(connection, customer_id)
    ]
    if billing.active_subscriptions(connection, customer_id):
        reasons.insert(
            0,
            f"customer {customer_id} still have active subscriptions, "
            "please cancel them before deleting the customer",
        )
    if reasons:
        raise invalid("\n".join(reasons))
    if entitlements.entitlements(connection, customer_id):
        raise conflict(
            f"customer {customer_id} still has active entitlements, "
            "please remove them before deleting the customer"
        )
    now = now_rfc3339()
    connection.execute(
        "UPDATE customers SET deleted_at = ?, updated_at = ? WHERE id = ?", (now, now, customer_id)
    )
    connection.execute("DELETE FROM attribution WHERE customer_id = ?", (customer_id,))


def count(connection: sqlite3.Connection) -> int:
    """Count the customers that are not deleted."""
    live: int = connection.execute("SELECT count(*) FROM customers WHERE deleted_at IS NULL").fetchone()[0]
    return live


def _find(connection: sqlite3.Connection, id_or_key: str) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute(
        """
        SELECT * FROM customers WHERE id = :it
        UNION ALL
        SELECT customers.* FROM attribution JOIN customers ON customers.id = customer_id
        WHERE subject = :it AND role = 'key'
        """,
        {"it": id_or_key},
    ).fetchone()
    if row is None:
        raise not_found(f"customer with id or key {id_or_key} not found in {NAMESPACE} namespace")
    return row


def _stored(document: dict[str, Any]) -> str:
    text = orjson.dumps(document).decode()
    if "\\u0000" in text:
        # PostgreSQL cannot hold NUL in any text, and OpenMeter does not check.
        raise ProblemError(500, "")
    return text


def _attribute(
    connection: sqlite3.Connection, customer_id: str, document: dict[str, Any], added: list[str]
) -> None:
    """Attribute the customer's key and subject keys to it, and nothing else. Raises the 409s.

    Its id does not attract events. A refusal names the subjects that were `added`, in the order sent.
    """
    key, keys = document.get("key"), subject_keys(document)
    connection.execute("DELETE FROM attribution WHERE customer_id = ?", (customer_id,))
    if key is not None:
        _refuse_taken_key(connection, key)
    for subject in keys:
        taken = "SELECT 1 FROM attribution WHERE subject = ? AND role = 'subject'"
        if connection.execute(taken, (subject,)).fetchone():
            raise _taken_subjects(added)
    attributed = [(subject, "subject") for subject in keys]
    attributed += [(key, "key")] if key else []
    connection.executemany(
        "INSERT INTO attribution VALUES (?, ?, ?)", [(name, customer_id, role) for name, role in attributed]
    )


def _taken_subjects(added: list[str]) -> ProblemError:
    return conflict(
        f"one or multiple subject keys of [{', '.join(added)}] are already associated with "
        f"an different customer in the namespace {NAMESPACE}"
    )


def _refuse_taken_key(connection: sqlite3.Connection, key: str) -> None:
    if connection.execute("SELECT 1 FROM customers WHERE id = ?", (key,)).fetchone():
        raise conflict(f"key {key} overlaps with id of another customer")
    rows = connection.execute("SELECT role, customer_id FROM attribution WHERE subject = ?", (key,))
    taken: dict[str, str] = dict(map(tuple, rows))
    if "subject" in taken:
        raise conflict(f"key {key} overlaps with subject of another customer: {taken['subject']}")
    if taken:
        raise conflict(f'key "{key}" is already used by an another customer in the namespace {NAMESPACE}')


def _customer(connection: sqlite3.Connection, row: sqlite3.Row, *, expand: bool) -> dict[str, Any]:
    customer = {"id": row["id"], **orjson.loads(row["document"])}
    customer |= {"createdAt": row["created_at"], "updatedAt": row["updated_at"]}
    if row["deleted_at"] is not None:
        customer["deletedAt"] = row["deleted_at"]
    active = billing.active_subscriptions(connection, row["id"]) if expand else []
    if active:
        customer |= {"currentSubscriptionId": active[0]["id"], "subscriptions": active}
    return customer
