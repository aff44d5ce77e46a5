"""Pruning of the ledger: old lines are deleted and their totals kept.

    accepted in the books = accepted in the ledger + pruned, and the same for delivered

Only settled lines are pruned: all their events are delivered, none waits, none is a dead letter. So one
number gives both the accepted and the delivered events of pruned lines.

A wrong clock cannot delete the ledger. The time is that of a `SteadyClock`, never later than the newest
hour in the ledger, and each step prunes only a few lines.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from openmeter_plugin.books.database import transaction

_LINES_PER_STEP: Final = 500
_HOUR_PATTERN: Final = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9]"


class Pruned(NamedTuple):
    """Totals of a queue's pruned lines; `up_to` is the last hour of which a line was pruned."""

    up_to: str
    lines: int
    events: int


def prune(db: sqlite3.Connection, days: int, now: datetime) -> int:
    """Prune some settled lines of hours more than this many days ago; returns how many.

    With 0 days none is ever pruned. Raises sqlite3.Error.
    """
    if not days:
        return 0
    with transaction(db):
        queues = [queue for (queue,) in db.execute("SELECT DISTINCT queue FROM counts")]
        hours = [hour for queue in queues if (hour := _newest_hour(db, queue)) is not None]
        if not hours:
            return 0
        before = _hour_text(min(now, max(hours)) - timedelta(days=days))
        left = _LINES_PER_STEP
        for queue in queues:
            left -= _prune_queue(db, queue, before, left)
        return _LINES_PER_STEP - left


def _newest_hour(db: sqlite3.Connection, queue: str) -> datetime | None:
    row = db.execute(
        "SELECT hour FROM ledger WHERE queue = ? AND hour GLOB ? ORDER BY hour DESC LIMIT 1",
        (queue, _HOUR_PATTERN),
    ).fetchone()
    try:
        return datetime.fromisoformat(f"{row[0]}:00:00+00:00") if row else None
    except ValueError:
        return None


def _prune_queue(db: sqlite3.Connection, queue: str, before: str, limit: int) -> int:
    rows = db.execute(
        "SELECT hour, type, subject, accepted FROM ledger WHERE queue = ? AND hour < ? AND hour GLOB ?"
        " AND accepted = delivered AND dead_lettered = 0 ORDER BY hour LIMIT ?",
        (queue, before, _HOUR_PATTERN, limit),
    ).fetchall()
    if rows:
        db.executemany(
            "DELETE FROM ledger WHERE queue = ? AND hour = ? AND type = ? AND subject = ?",
            [(queue, hour, kind, subject) for hour, kind, subject, _ in rows],
        )
        db.execute(
            "INSERT INTO ledger_pruned VALUES (?, ?, ?, ?) ON CONFLICT (queue) DO UPDATE SET"
            " up_to = max(up_to, excluded.up_to), lines = lines + excluded.lines,"
            " events = events + excluded.events",
            (queue, rows[-1][0], len(rows), sum(accepted for *_, accepted in rows)),
        )
    return len(rows)


def _hour_text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()[: len("2026-11-22T07")]
