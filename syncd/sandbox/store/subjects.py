"""Subject entities: display names for subject keys, deprecated in OpenMeter and not needed for billing.

The server itself makes one for each subject of a customer, whenever the customer is written, and removes
none: openmeter/subject/service/hooks.
"""

import sqlite3
from collections.abc import Container, Iterable
from typing import Any

import orjson

from syncd.sandbox.bodies import Body
from syncd.sandbox.problems import NAMESPACE, conflict, invalid, not_found
from syncd.sandbox.values import now_rfc3339, ulid


class SubjectBody(Body):
    """SubjectUpsert of the API, without its deprecated properties."""

    key: str
    display_name: str | None = None
    metadata: dict[str, Any] | None = None

    nullable = frozenset({"displayName", "metadata"})


def known_keys(connection: sqlite3.Connection, keys: Iterable[str]) -> set[str]:
    """Return those of the keys that have an entity."""
    find = "SELECT 1 FROM subjects WHERE key = ?"
    return {key for key in keys if connection.execute(find, (key,)).fetchone()}


def upsert(connection: sqlite3.Connection, body: SubjectBody, known: Container[str]) -> dict[str, Any]:
    """Create a subject, or update the given properties of one (null clears), and return it.

    Raises the 400 for an empty key, which OpenMeter's schema allows, and the 409 for one that was not `known`
    when the request came in and is there now: it was named twice.
    """
    if not body.key:
        raise invalid("key is required")
    given = body.model_dump(by_alias=True, exclude_unset=True, exclude={"key"})
    row = connection.execute("SELECT document FROM subjects WHERE key = ?", (body.key,)).fetchone()
    if row is not None and body.key not in known:
        raise conflict(f"subject with key already exists: {body.key}")
    _write(connection, body.key, (orjson.loads(row["document"]) if row else {}) | given)
    return get(connection, body.key)


def provision(connection: sqlite3.Connection, customer_id: str, keys: Iterable[str]) -> None:
    """Create the entities that are missing for subjects of a customer."""
    document = {"metadata": {"createdBy": "subject.provisioner", "customerId": customer_id}}
    for key in keys:
        if connection.execute("SELECT 1 FROM subjects WHERE key = ?", (key,)).fetchone() is None:
            _write(connection, key, document)


def list_subjects(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """List all subjects by key."""
    return [_subject(row) for row in connection.execute("SELECT * FROM subjects ORDER BY key")]


def get(connection: sqlite3.Connection, id_or_key: str) -> dict[str, Any]:
    """Return a subject. Raises the 404."""
    both = (id_or_key, id_or_key)  # a numbered parameter with a tuple warns on 3.12 and fails on 3.14
    row = connection.execute("SELECT * FROM subjects WHERE id = ? OR key = ?", both).fetchone()
    if row is None:
        raise not_found(f"subject not found [namespace={NAMESPACE} subject.idOrKey={id_or_key}]")
    return _subject(row)


def delete(connection: sqlite3.Connection, id_or_key: str) -> None:
    """Delete a subject. Raises the 404."""
    connection.execute("DELETE FROM subjects WHERE id = ?", (get(connection, id_or_key)["id"],))


def _write(connection: sqlite3.Connection, key: str, document: dict[str, Any]) -> None:
    now = now_rfc3339()
    connection.execute(
        """
        INSERT INTO subjects VALUES (?, ?, ?, ?, ?)
        ON CONFLICT (key) DO UPDATE SET document = excluded.document, updated_at = excluded.updated_at
        """,
        (ulid(), key, orjson.dumps(document).decode(), now, now),
    )


def _subject(row: sqlite3.Row) -> dict[str, Any]:
    document = {name: value for name, value in orjson.loads(row["document"]).items() if value is not None}
    times = {"createdAt": row["created_at"], "updatedAt": row["updated_at"]}
    return {"id": row["id"], "key": row["key"], "metadata": {}, **document, **times}
