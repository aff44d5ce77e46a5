"""Requests to replay dead letters or to redeliver events, written into the books.

The delivery process finds them there, whichever process it is. All functions raise sqlite3.Error if the
books cannot be written.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from openmeter_plugin.books.database import FILE, VERSION, connect, open_file, transaction, version_of
from openmeter_plugin.books.equations import Counts
from openmeter_plugin.books.store import LedgerKey, Lines, add_counts, add_dead_letters, add_to_ledger
from openmeter_plugin.spool.destination import QUARANTINE

_PER_TRANSACTION: Final = 1000  # rows, so that the delivery need not wait long


def request_redelivery(
    spool: Path, since: datetime | str, until: datetime | str, subject: str | None = None
) -> int:
    """Request that retained events be sent again, with times from `since` up to but not including `until`.

    Returns the redelivery's id. Raises ValueError if the span is invalid.
    """
    first, end = _moment(since, "since"), _moment(until, "until")
    if first >= end:
        raise ValueError("since must be before until")
    if subject == "":
        raise ValueError("subject must not be empty; omit it to redeliver the events of all subjects")
    with writing(spool) as db, transaction(db):
        number = db.execute(
            "INSERT INTO redeliveries (since, until, subject, state, sent, asked)"
            " VALUES (?, ?, ?, 'waiting', 0, ?)",
            (_text(first), _text(end), subject, time.time()),
        ).lastrowid
    assert number is not None  # noqa: S101 - it was inserted
    return number


def replay_dead_letters(spool: Path, ids: Iterable[int] | None = None) -> int:
    """Mark dead letters for replay, all or those with these ids; returns how many are newly marked."""
    with writing(spool) as db:
        if ids is None:
            ids = [number for (number,) in db.execute("SELECT id FROM dead_letters WHERE NOT replay")]
        wanted = [(number,) for number in ids]
        marked = 0
        for start in range(0, len(wanted), _PER_TRANSACTION):
            with transaction(db):
                marked += db.executemany(
                    "UPDATE dead_letters SET replay = 1 WHERE id = ? AND NOT replay",
                    wanted[start : start + _PER_TRANSACTION],
                ).rowcount
    return marked


@dataclass(slots=True)
class ReplayedRequests:
    """Requests that leave the quarantine: their events and skips."""

    ids: list[int] = field(default_factory=list)
    events: list[tuple[str, LedgerKey, bytes, str]] = field(default_factory=list)
    """(queue, ledger line, event, why it was not sent so far)"""
    skipped: Counter[str] = field(default_factory=Counter)
    gaps: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many have a gap in their AI usage, by (queue, gap)."""


def quarantined(db: sqlite3.Connection, after: int, limit: int) -> list[tuple[int, bytes]]:
    """Return (id, record) of quarantined requests, oldest first."""
    query = "SELECT id, record FROM quarantine WHERE id > ? ORDER BY id LIMIT ?"
    return db.execute(query, (after, limit)).fetchall()


def replay_quarantined(db: sqlite3.Connection, replayed: ReplayedRequests) -> None:
    """Move requests out of the quarantine; their events become dead letters that are marked for replay."""
    counts: Counts = Counter({("quarantined", ""): -len(replayed.ids)})
    counts["metered", ""] = len(replayed.ids) - replayed.skipped.total()
    counts.update({("skipped", reason): number for reason, number in replayed.skipped.items()})
    add_counts(db, QUARANTINE, counts)
    for (queue, gap), number in replayed.gaps.items():
        add_counts(db, queue, Counter({("ai_usage_gaps", gap): number}))
    lines: dict[str, Lines] = {}
    for queue, line, _, _ in replayed.events:
        lines.setdefault(queue, Counter())[line] += 1
    for queue, accepted in lines.items():
        number = accepted.total()
        add_counts(db, queue, Counter({("events", ""): number, ("dead_lettered", ""): number}))
        add_to_ledger(db, queue, "accepted", accepted)
        add_to_ledger(db, queue, "dead_lettered", accepted)
    letters = [(queue, event, None, answer) for queue, _, event, answer in replayed.events]
    add_dead_letters(db, letters, to_be_replayed=True)
    db.executemany("DELETE FROM quarantine WHERE id = ?", [(number,) for number in replayed.ids])


@contextmanager
def writing(spool: Path) -> Iterator[sqlite3.Connection]:
    """Open the books for writing while a delivery may write them too."""
    path = spool / FILE
    db = connect(path)
    try:
        if version_of(db) != VERSION:
            db.close()
            db = open_file(path)  # reads the whole file, so only where the books must be created or migrated
        yield db
    finally:
        db.close()


def _moment(value: datetime | str, name: str) -> datetime:
    """Return the moment in UTC; raises ValueError if it cannot be parsed or has no time zone."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{name} must be a time such as 2026-11-22T07:00:00Z") from None
    if value.tzinfo is None:
        raise ValueError(f"{name} must have a time zone, such as 2026-11-22T07:00:00Z")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name} cannot be expressed in UTC") from None


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
