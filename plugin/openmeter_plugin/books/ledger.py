"""Queries of the ledger and of redeliveries."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import orjson

from openmeter_plugin.books.models import Ledger, LedgerLine, RedeliveryStatus
from openmeter_plugin.books.read_models import (
    SpoolError,
    all_counts,
    all_positions,
    all_pruned,
    queue_names,
    reading,
    timestamp,
)
from openmeter_plugin.books.status import QueueFiles, unaccounted
from openmeter_plugin.spool.destination import QUARANTINE

FIRST_HOUR: Final = ""
LAST_HOUR: Final = "~"  # sorts after every hour
_CURSOR_PARTS: Final = 4


def read_ledger(
    spool: Path,
    since: str = FIRST_HOUR,
    until: str = LAST_HOUR,
    subject: str | None = None,
    *,
    after: str | None = None,
    limit: int = 10_000,
) -> Ledger:
    """Return the lines of the hours from `since` up to but not including `until`, such as 2026-11-22T07.

    Raises SpoolError, and ValueError if `after` is not the `next` of a page.
    """
    start = _cursor(after) if after else ("", "", "", "")
    with reading(spool) as db:
        rows = db.execute(
            "SELECT queue, hour, type, subject, accepted, delivered, dead_lettered, lost FROM ledger"
            # Name the queues, because the key begins with them: otherwise SQLite reads the whole ledger.
            " WHERE queue IN (SELECT queue FROM counts) AND hour >= ? AND hour < ?"
            " AND (? IS NULL OR subject = ?)"
            " AND (hour, subject, type, queue) > (?, ?, ?, ?)"
            " ORDER BY hour, subject, type, queue LIMIT ?",
            (since, until, subject, subject, *start, limit + 1),
        ).fetchall()
        waiting = {
            hour
            for (hour,) in db.execute(
                "SELECT DISTINCT hour FROM ledger"
                " WHERE queue IN (SELECT queue FROM counts) AND hour >= ? AND hour < ?"
                " AND accepted > delivered + dead_lettered + lost",
                (since, until),
            )
        }
        queues, positions = queue_names(spool, all_counts(db)), all_positions(db)
        pruned = [queue.up_to for queue in all_pruned(db).values()]
    for queue in queues:
        if queue != QUARANTINE:
            found = unaccounted(QueueFiles.of(spool, queue, positions.get(queue, {})))
            if found.unreadable:
                # Otherwise an hour could seem complete although some of its events are in there.
                raise SpoolError(f"segments that cannot be read: {', '.join(found.unreadable)}")
            waiting |= {key.hour for key in found.lines if since <= key.hour < until}
    lines = [_line(*row) for row in rows[:limit]]
    return Ledger(
        lines=lines,
        hours_with_waiting_events=sorted(waiting),
        pruned_up_to=max(pruned, default=None),
        next=_cursor_of(lines[-1]) if len(rows) > limit else None,
    )


def _line(
    queue: str, hour: str, kind: str, subject: str, accepted: int, delivered: int, dead: int, lost: int
) -> LedgerLine:
    return LedgerLine(
        destination=queue,
        hour=hour,
        type=kind,
        subject=subject,
        accepted=accepted,
        delivered=delivered,
        dead_lettered=dead,
        lost=lost,
        waiting=accepted - delivered - dead - lost,
    )


def _cursor_of(line: LedgerLine) -> str:
    parts = [line.hour, line.subject, line.type, line.destination]
    return base64.urlsafe_b64encode(orjson.dumps(parts)).decode()


def _cursor(text: str) -> tuple[str, ...]:
    try:
        parts = orjson.loads(base64.urlsafe_b64decode(text))
    except (binascii.Error, ValueError):
        parts = None
    if not isinstance(parts, list) or len(parts) != _CURSOR_PARTS or not all(type(p) is str for p in parts):
        raise ValueError("after must be the `next` of the previous page")
    return tuple(parts)


def hour_of(moment: datetime, *, up: bool = False) -> str:
    """Return a moment's hour; with `up`, round up to the next full hour."""
    try:
        utc = moment.astimezone(UTC)
        begin = utc.replace(minute=0, second=0, microsecond=0)
        if up and begin != utc:
            begin += timedelta(hours=1)
    except OverflowError:  # before the first year, or after the last
        return LAST_HOUR if moment.year > 1 else FIRST_HOUR
    return begin.isoformat()[: len("2026-11-22T07")]


def read_redelivery(spool: Path, number: int) -> RedeliveryStatus | None:
    """Return a redelivery, or None if there is none with this id; raises SpoolError."""
    with reading(spool) as db:
        row = db.execute(
            "SELECT id, since, until, subject, state, sent, asked FROM redeliveries WHERE id = ?", (number,)
        ).fetchone()
    if row is None:
        return None
    found, since, until, subject, state, sent, asked = row
    return RedeliveryStatus(
        id=found,
        since=since,
        until=until,
        subject=subject,
        state=state,
        sent=sent,
        asked_at=timestamp(asked),
    )
