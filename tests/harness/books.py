"""Reads the books of a spool for tests, through the plugin's own read models."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from openmeter_plugin.books.equations import Counts
from openmeter_plugin.books.read_models import all_counts, reading
from openmeter_plugin.books.store import DeadLetter


class LedgerLine(NamedTuple):
    """A line of the ledger, as stored."""

    queue: str
    hour: str
    type: str
    subject: str
    accepted: int
    delivered: int
    dead_lettered: int


def read_counts(spool: Path) -> dict[str, Counts]:
    """Return each queue's counts."""
    with reading(spool) as db:
        return all_counts(db)


def total_counts(spool: Path) -> Counts:
    """Return the counts, summed over all queues."""
    return sum(read_counts(spool).values(), Counts())


def read_ledger(spool: Path) -> list[LedgerLine]:
    """Return all lines, ordered by hour."""
    with reading(spool) as db:
        rows = db.execute(
            "SELECT queue, hour, type, subject, accepted, delivered, dead_lettered FROM ledger"
            " ORDER BY hour, subject, type, queue"
        ).fetchall()
    return [LedgerLine(*row) for row in rows]


def read_dead_letters(spool: Path) -> list[tuple[int, str, DeadLetter]]:
    """Return (id, queue, dead letter), oldest first."""
    with reading(spool) as db:
        rows = db.execute(
            "SELECT d.id, queue, event, status, coalesce(text, answer)"
            " FROM dead_letters d LEFT JOIN answers a ON a.id = answer_id ORDER BY d.id"
        ).fetchall()
    return [
        (number, queue, DeadLetter(event, status, answer)) for number, queue, event, status, answer in rows
    ]
