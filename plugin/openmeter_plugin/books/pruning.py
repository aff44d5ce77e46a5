"""Pruning the ledger: lines of hours long gone are dropped, and what they came to is kept.

    accepted in the books = accepted in the ledger + pruned, and delivered likewise

Only a line that is settled goes: all its events are delivered, none waits, none is a dead letter. So a pruned
line's events were accepted and delivered, and one number says both.

A clock that is wrong must not cost the ledger. Time is the process's own from its start on, is never later
than the newest hour in the ledger, and lines go a few at a time.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

from openmeter_plugin.books.database import transaction

_AT_ONCE: Final = 500  # lines in a step
_AN_HOUR: Final = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]T[0-9][0-9]"


class Pruned(NamedTuple):
    """What was pruned of a queue: so many lines with so many events, none of an hour after `up_to`."""

    up_to: str
    lines: int
    events: int


class Clock:
    """The time at the start of the process and what has passed since: later jumps are not in it."""

    def __init__(
        self, wall: Callable[[], float] = time.time, passed: Callable[[], float] = time.monotonic
    ) -> None:
        self._passed = passed
        self._offset = wall() - passed()

    def now(self) -> datetime:
        """Return the time in UTC."""
        return datetime.fromtimestamp(self._offset + self._passed(), UTC)


def prune(db: sqlite3.Connection, days: int, now: datetime) -> int:
    """Drop some settled lines of hours that ended more than so many days ago; returns how many.

    With 0 days none is dropped, ever. Raises sqlite3.Error.
    """
    if not days:
        return 0
    with transaction(db):
        queues = [queue for (queue,) in db.execute("SELECT DISTINCT queue FROM counts")]
        hours = [hour for queue in queues if (hour := _newest_hour(db, queue)) is not None]
        if not hours:
            return 0
        before = _text(min(now, max(hours)) - timedelta(days=days))
        left = _AT_ONCE
        for queue in queues:
            left -= _prune_queue(db, queue, before, left)
        return _AT_ONCE - left


def _newest_hour(db: sqlite3.Connection, queue: str) -> datetime | None:
    row = db.execute(
        "SELECT hour FROM ledger WHERE queue = ? AND hour GLOB ? ORDER BY hour DESC LIMIT 1",
        (queue, _AN_HOUR),
    ).fetchone()
    try:
        return datetime.fromisoformat(f"{row[0]}:00:00+00:00") if row else None
    except ValueError:
        return None


def _prune_queue(db: sqlite3.Connection, queue: str, before: str, limit: int) -> int:
    rows = db.execute(
        "SELECT hour, type, subject, accepted FROM ledger WHERE queue = ? AND hour < ? AND hour GLOB ?"
        " AND accepted = delivered AND dead_lettered = 0 ORDER BY hour LIMIT ?",
        (queue, before, _AN_HOUR, limit),
    ).fetchall()
    if rows:
        db.executemany(
            "DELETE FROM ledger WHERE queue = ? AND hour = ? AND type = ? AND subject = ?",
            [(queue, hour, kind, subject) for hour, kind, subject, _ in rows],
        )
        db.execute(
            "INSERT INTO ledger_pruned VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " up_to = max(up_to, excluded.up_to), lines = lines + excluded.lines,"
            " events = events + excluded.events",
            (queue, rows[-1][0], len(rows), sum(accepted for *_, accepted in rows)),
        )
    return len(rows)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()[: len("2026-11-22T07")]
