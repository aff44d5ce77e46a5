"""Reading the books of a spool, beside a delivery that may be running."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmeter_plugin.delivery.books import FILE, Counts, DeadLetter


@dataclass(frozen=True, slots=True)
class LedgerLine:
    """How many events of a queue, an hour of event time, a type and a subject there were."""

    queue: str
    hour: str
    type: str
    subject: str
    accepted: int
    delivered: int
    dead_lettered: int


def read_counts(spool: Path) -> dict[str, Counts]:
    """Return each queue's counts."""
    result: dict[str, Counts] = {}
    for queue, name, reason, value in _rows(spool, "SELECT queue, name, reason, value FROM counts"):
        result.setdefault(queue, Counter())[name, reason] = value
    return result


def read_ledger(
    spool: Path, since: str = "", until: str = "~", subject: str | None = None
) -> list[LedgerLine]:
    """Return the lines of the hours from `since` up to, not including, `until`, all written 2026-11-22T07."""
    rows = _rows(
        spool,
        "SELECT queue, hour, type, subject, accepted, delivered, dead_lettered FROM ledger"
        " WHERE hour >= ? AND hour < ? AND (? IS NULL OR subject = ?) ORDER BY hour, subject, type, queue",
        (since, until, subject, subject),
    )
    return [LedgerLine(*row) for row in rows]


def read_dead_letters(spool: Path, limit: int = -1, after: int = 0) -> list[tuple[int, str, DeadLetter]]:
    """Return (id, queue, dead letter) in the order in which they died, those after an id."""
    rows = _rows(
        spool,
        "SELECT id, queue, event, status, answer FROM dead_letters WHERE id > ? ORDER BY id LIMIT ?",
        (after, limit),
    )
    return [
        (number, queue, DeadLetter(event, status, answer)) for number, queue, event, status, answer in rows
    ]


def _rows(spool: Path, query: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
    path = spool / FILE
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
        if not db.execute("SELECT 1 FROM sqlite_schema").fetchone():
            return []  # it is being made
        return db.execute(query, parameters).fetchall()
