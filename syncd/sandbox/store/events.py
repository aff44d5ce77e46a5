"""Events: stored once per (source, id), and attributed to customers at query time."""

import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from syncd.sandbox.cloudevents import Event
from syncd.sandbox.problems import NAMESPACE, invalid
from syncd.sandbox.store import meters
from syncd.sandbox.values import rfc3339

# A duplicate only increases the count: within a flush always, beyond it if the sink deduplicates.
_INSERT = """
INSERT INTO events (source, id, type, subject, time, data, ingested_at, flush, stored_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (source, id, flush) DO UPDATE SET received = received + 1
"""


@dataclass(frozen=True, slots=True)
class Flush:
    """One write of the sink-worker: what arrives until `ends_at` is stored, and visible, then."""

    number: int
    ends_at: float


def current_flush(flush_seconds: float) -> Flush:
    """Return the flush that is now being collected; without an interval each call is one of its own."""
    if not flush_seconds:
        return Flush(time.time_ns(), time.time())
    number = int(time.time() // flush_seconds) + 1
    return Flush(number, number * flush_seconds)


def store(connection: sqlite3.Connection, events: Iterable[Event], flush: Flush, *, dedupe: bool) -> None:
    """Store the new events and count the duplicates."""
    number = 0 if dedupe else flush.number
    connection.executemany(_INSERT, ((*event, number, flush.ends_at) for event in events))


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events to list. Times are seconds since 1970; each `_from` is inclusive, each `_to` exclusive.

    `id` matches a part of ids and `id_is` a whole one. `after` is the time and the row of the last event of
    the page before.
    """

    time_from: int
    time_to: int | None = None
    ingested_from: int | None = None
    ingested_to: int | None = None
    id: str | None = None
    subject: str | None = None
    customer_ids: Sequence[str] = ()
    limit: int = 100
    id_is: str | None = None
    type_is: str | None = None
    source_is: str | None = None
    ascending: bool = False
    after: tuple[int, int] | None = None


def list_events(connection: sqlite3.Connection, wanted: EventFilter) -> list[dict[str, Any]]:
    """Return events as IngestedEvent, latest first. Raises the 400 for an unknown customer id."""
    _refuse_unknown_customers(connection, wanted.customer_ids)
    known_meters = meters.list_meters(connection)
    return [_ingested_event(row, known_meters) for row in find(connection, wanted)]


def page_of_events(
    connection: sqlite3.Connection, wanted: EventFilter
) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Return events as `list_events` does, each with its time and row, after which a page can begin."""
    known_meters = meters.list_meters(connection)
    return [
        ((row["time"], row["rowid"]), _ingested_event(row, known_meters)) for row in find(connection, wanted)
    ]


def find(connection: sqlite3.Connection, wanted: EventFilter) -> list[sqlite3.Row]:
    """Return the rows of events, each with the customer that it is attributed to."""
    order = "ASC" if wanted.ascending else "DESC"
    after_time, after_row = wanted.after or (None, None)
    customer_ids = orjson.dumps(list(wanted.customer_ids)).decode()
    return connection.execute(
        # The id matches partially, the subject only whole: openmeter/streaming/clickhouse/event_query.go.
        f"""
        SELECT events.*, events.rowid, (
            SELECT customer_id FROM attribution WHERE attribution.subject = events.subject
              AND (:customer_ids = '[]' OR customer_id IN (SELECT value FROM json_each(:customer_ids)))
            ORDER BY role LIMIT 1
        ) AS customer_id
        FROM events
        WHERE stored_at <= :now AND time >= :time_from AND (:time_to IS NULL OR time < :time_to)
          AND (:ingested_from IS NULL OR ingested_at >= :ingested_from)
          AND (:ingested_to IS NULL OR ingested_at < :ingested_to)
          AND (:id IS NULL OR instr(lower(id), lower(:id))) AND (:id_is IS NULL OR id = :id_is)
          AND (:type_is IS NULL OR type = :type_is) AND (:source_is IS NULL OR source = :source_is)
          AND (:after_time IS NULL
               OR (time, events.rowid) {">" if wanted.ascending else "<"} (:after_time, :after_row))
          AND (:subject IS NULL OR subject = :subject)
          AND (:customer_ids = '[]' OR EXISTS (
                SELECT 1 FROM attribution WHERE attribution.subject = events.subject
                  AND customer_id IN (SELECT value FROM json_each(:customer_ids))))
        ORDER BY time {order}, events.rowid {order} LIMIT :limit
        """,  # noqa: S608 - the variable parts are constants
        {
            "time_from": wanted.time_from,
            "time_to": wanted.time_to,
            "ingested_from": wanted.ingested_from,
            "ingested_to": wanted.ingested_to,
            "id": wanted.id,
            "subject": wanted.subject,
            "customer_ids": customer_ids,
            "limit": wanted.limit,
            "id_is": wanted.id_is,
            "type_is": wanted.type_is,
            "source_is": wanted.source_is,
            "after_time": after_time,
            "after_row": after_row,
            "now": time.time(),
        },
    ).fetchall()


def statistics(connection: sqlite3.Connection) -> dict[str, Any]:
    """Count received, stored, duplicate, and currently unattributed events."""
    stored, received = connection.execute(
        "SELECT count(*), coalesce(sum(received), 0) FROM events"
    ).fetchone()
    unattributed = connection.execute(
        """
        SELECT subject, count(*) AS events FROM events
        WHERE subject NOT IN (SELECT subject FROM attribution) GROUP BY subject ORDER BY subject
        """
    ).fetchall()
    return {
        "events_received": received,
        "events_stored": stored,
        "duplicates_received": received - stored,
        "unattributed": {
            "events": sum(row["events"] for row in unattributed),
            "subjects": [row["subject"] for row in unattributed],
        },
    }


def duplicates(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """List each event that was received more than once: {source, id, received}."""
    rows = connection.execute(
        """
        SELECT source, id, sum(received) AS received FROM events WHERE received > 1 OR flush > 0
        GROUP BY source, id HAVING sum(received) > 1 ORDER BY source, id
        """
    )
    return [dict(row) for row in rows]


def _refuse_unknown_customers(connection: sqlite3.Connection, customer_ids: Iterable[str]) -> None:
    find = "SELECT 1 FROM customers WHERE id = ? AND deleted_at IS NULL"
    missing = [id_ for id_ in customer_ids if connection.execute(find, (id_,)).fetchone() is None]
    if missing:
        raise invalid(f"customers not found in namespace {NAMESPACE}: {', '.join(missing)}")


def _ingested_event(row: sqlite3.Row, known_meters: Iterable[dict[str, Any]]) -> dict[str, Any]:
    # As in OpenMeter, which stores no extension attributes and no fractions of a second.
    event = {"specversion": "1.0", "id": row["id"], "source": row["source"], "type": row["type"]}
    event |= {"subject": row["subject"], "time": rfc3339(row["time"])}
    if row["data"] is not None:
        event["datacontenttype"] = "application/json"
        if (data := orjson.loads(row["data"])) is not None:
            event["data"] = data
    item: dict[str, Any] = {"event": event, "ingestedAt": rfc3339(row["ingested_at"])}
    item["storedAt"] = rfc3339(int(row["stored_at"]))
    if row["customer_id"] is not None:
        item["customerId"] = row["customer_id"]
    if errors := _validation_errors(event, row["customer_id"], known_meters):
        item["validationError"] = "\n".join(errors)
    return item


def _validation_errors(
    event: dict[str, Any], customer_id: str | None, known_meters: Iterable[dict[str, Any]]
) -> list[str]:
    # Order and wording: openmeter/meterevent/adapter/event.go, validateEvents.
    matching = [meter for meter in known_meters if meter["eventType"] == event["type"]]
    errors = [error for meter in matching if (error := meters.why_not_metered(meter, event.get("data")))]
    if not matching:
        errors.append(f"no meter found for event type: {event['type']}")
    if customer_id is None:
        errors.append(f"no customer found for event subject: {event['subject']}")
    return errors
