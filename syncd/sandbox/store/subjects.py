"""Subject entities: display names for subject keys, deprecated in OpenMeter and not needed for billing."""

import sqlite3
from collections.abc import Iterable
from typing import Any

import orjson
from pydantic import Field

from syncd.sandbox.bodies import Body
from syncd.sandbox.problems import NAMESPACE, not_found
from syncd.sandbox.values import now_rfc3339, ulid


class SubjectBody(Body):
    """SubjectUpsert of the API, without its deprecated properties."""

    key: str = Field(min_length=1)
    display_name: str | None = None
    metadata: dict[str, Any] | None = None

    nullable = frozenset({"displayName", "metadata"})


def upsert(connection: sqlite3.Connection, bodies: Iterable[SubjectBody]) -> list[dict[str, Any]]:
    """Create new subjects, update the given properties of others (null clears), and return them all."""
    return [_upsert(connection, body) for body in bodies]


def list_subjects(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """List all subjects by key."""
    return [_subject(row) for row in connection.execute("SELECT * FROM subjects ORDER BY key")]


def get(connection: sqlite3.Connection, id_or_key: str) -> dict[str, Any]:
    """Return a subject. Raises the 404."""
    both = (id_or_key, id_or_key)  # a numbered parameter with a tuple warns on 3.12 and fails on 3.14
    row = connection.execute("SELECT * FROM subjects WHERE id = ? OR key = ?", both).fetchone()
    if row is None:
        raise not_found(f"subject with id or key {id_or_key} not found in {NAMESPACE} namespace")
    return _subject(row)


def delete(connection: sqlite3.Connection, id_or_key: str) -> None:
    """Delete a subject. Raises the 404."""
    connection.execute("DELETE FROM subjects WHERE id = ?", (get(connection, id_or_key)["id"],))


def _upsert(connection: sqlite3.Connection, body: SubjectBody) -> dict[str, Any]:
    given = body.model_dump(by_alias=True, exclude_unset=True, exclude={"key"})
    row = connection.execute("SELECT document FROM subjects WHERE key = ?", (body.key,)).fetchone()
    document = orjson.dumps((orjson.loads(row["document"]) if row else {}) | given).decode()
    now = now_rfc3339()
    connection.execute(
        """
        INSERT INTO subjects VALUES (?, ?, ?, ?, ?)
        ON CONFLICT (key) DO UPDATE SET document = excluded.document, updated_at = excluded.updated_at
        """,
        (ulid(), body.key, document, now, now),
    )
    return get(connection, body.key)


def _subject(row: sqlite3.Row) -> dict[str, Any]:
    document = {name: value for name, value in orjson.loads(row["document"]).items() if value is not None}
    times = {"createdAt": row["created_at"], "updatedAt": row["updated_at"]}
    return {"id": row["id"], "key": row["key"], **document, **times}
