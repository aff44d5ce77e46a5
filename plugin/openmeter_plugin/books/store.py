"""The store of the books: positions in each segment, counts, ledger, dead letters and redeliveries.

The delivery process writes it. Counts are committed together with the position up to which they were
counted, so that the books hold after kill -9:

    requests = metered + skipped (by reason) + quarantined + resent
    events   = delivered + dead_lettered + waiting in the spool
    events   = accepted in the ledger + in pruned lines

`database` handles a damaged file.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from openmeter_plugin.books import pruning
from openmeter_plugin.books.database import FILE, open_file, transaction

Counts = Counter[tuple[str, str]]
"""By (name, reason): requests, metered, skipped, quarantined, resent; events, delivered, dead_lettered;
lost, damaged_bytes, unreadable_segments, redelivered. The reason is empty for all but skipped and lost."""


class LedgerKey(NamedTuple):
    """The key of a ledger line; `hour` is the event time's hour in UTC, such as 2026-11-22T07."""

    hour: str
    type: str
    subject: str


Lines = Counter[LedgerKey]


@dataclass(frozen=True, slots=True)
class Position:
    """Offsets in a segment, up to which it is in the books (`accounted`) and up to which it is delivered."""

    accounted: int
    delivered: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that the metering API refused, with its answer; `status` is None for one that grew too old."""

    event: bytes
    status: int | None
    answer: str


@dataclass(slots=True)
class Accounting:
    """Counts of what was read of a queue, committed as one; from then on its events may be delivered."""

    positions: dict[str, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counter)
    accepted: Lines = field(default_factory=Counter)
    resent: list[tuple[str, int]] = field(default_factory=list)
    unsendable: list[tuple[str, int]] = field(default_factory=list)
    """(segment, offset after the record) of usage records that cannot be parsed."""
    quarantined: list[tuple[str, bytes]] = field(default_factory=list)

    def count_requests(self) -> None:
        """Complete the counts: each request is metered, skipped, quarantined or resent."""
        counts = self.counts
        counts["resent", ""] = len(self.resent)
        counts["quarantined", ""] = len(self.quarantined)
        skipped = sum(value for (name, _), value in counts.items() if name == "skipped")
        counts["requests", ""] = (
            counts["metered", ""] + skipped + counts["quarantined", ""] + counts["resent", ""]
        )


@dataclass(slots=True)
class Delivery:
    """The outcome of one or more batches, committed as one."""

    positions: Mapping[str, int]
    delivered: Lines = field(default_factory=Counter)
    dead_lettered: Lines = field(default_factory=Counter)
    dead_letters: list[DeadLetter] = field(default_factory=list)


class Books:
    """The books of the spool in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._db = open_file(directory / FILE)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def positions(self, queue: str) -> dict[str, Position]:
        """Return the position of each segment of the queue."""
        rows = self._db.execute(
            "SELECT segment, accounted, delivered FROM positions WHERE queue = ?", (queue,)
        )
        return {segment: Position(accounted, delivered) for segment, accounted, delivered in rows}

    def resent(self, queue: str) -> set[tuple[str, int]]:
        """Return (segment, offset after it) of each record that is not sent: resent or unsendable."""
        rows = self._db.execute("SELECT segment, position FROM resent WHERE queue = ?", (queue,))
        return set(rows)

    def account(self, queue: str, accounting: Accounting) -> None:
        """Commit what was read: all of it, or raise sqlite3.Error."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO positions VALUES (?, ?, ?, 0)"
                " ON CONFLICT DO UPDATE SET accounted = excluded.accounted",
                [(queue, segment, position) for segment, position in accounting.positions.items()],
            )
            db.executemany(
                "INSERT OR IGNORE INTO resent VALUES (?, ?, ?)",
                [(queue, *record) for record in (*accounting.resent, *accounting.unsendable)],
            )
            now = time.time()
            db.executemany(
                "INSERT INTO quarantine (reason, record, at) VALUES (?, ?, ?)",
                [(reason, record, now) for reason, record in accounting.quarantined],
            )
            add_counts(db, queue, accounting.counts)
            add_to_ledger(db, queue, "accepted", accounting.accepted)

    def deliver(self, queue: str, delivery: Delivery) -> None:
        """Commit the outcome of batches: all of it, or raise sqlite3.Error."""
        with self._transaction() as db:
            db.executemany(
                "UPDATE positions SET delivered = ? WHERE queue = ? AND segment = ?",
                [(position, queue, segment) for segment, position in delivery.positions.items()],
            )
            now = time.time()
            db.executemany(
                "INSERT INTO dead_letters (queue, event, status, answer, at) VALUES (?, ?, ?, ?, ?)",
                [(queue, d.event, d.status, d.answer, now) for d in delivery.dead_letters],
            )
            _add_settled(db, queue, delivery.delivered, delivery.dead_lettered)

    def forget(self, queue: str, segment: str) -> None:
        """Delete the positions of a segment. Remove its file first, never the other way round."""
        with self._transaction() as db:
            db.execute("DELETE FROM positions WHERE queue = ? AND segment = ?", (queue, segment))
            db.execute("DELETE FROM resent WHERE queue = ? AND segment = ?", (queue, segment))

    def count(self, queue: str, name: str, value: int = 1) -> None:
        """Add to a count that has no reason and no position."""
        with self._transaction() as db:
            add_counts(db, queue, Counter({(name, ""): value}))

    def prune(self, days: int, now: datetime) -> int:
        """Prune some ledger lines older than this many days; returns how many."""
        return pruning.prune(self._db, days, now)

    def to_replay(self, queue: str, limit: int, max_bytes: int) -> list[tuple[int, bytes]]:
        """Return (id, event) of dead letters that are marked for replay."""
        rows = self._db.execute(
            "SELECT id, event FROM dead_letters WHERE queue = ? AND replay ORDER BY id LIMIT ?",
            (queue, limit),
        )
        letters: list[tuple[int, bytes]] = []
        with closing(rows):
            for number, event in rows:
                max_bytes -= len(event)
                if letters and max_bytes < 0:
                    break
                letters.append((number, event))
        return letters

    def replayed(
        self, queue: str, delivered: Mapping[int, LedgerKey], refused: Mapping[int, DeadLetter]
    ) -> None:
        """Commit the outcome of replayed dead letters."""
        with self._transaction() as db:
            db.executemany("DELETE FROM dead_letters WHERE id = ?", [(number,) for number in delivered])
            db.executemany(
                "UPDATE dead_letters SET replay = 0, status = ?, answer = ? WHERE id = ?",
                [(letter.status, letter.answer, number) for number, letter in refused.items()],
            )
            lines = Counter(delivered.values())
            _add_settled(db, queue, lines, Counter({key: -count for key, count in lines.items()}))

    def redeliveries(self) -> list[Redelivery]:
        """Return the redeliveries that are not done, in the order of their requests."""
        rows = self._db.execute(
            "SELECT id, since, until, subject FROM redeliveries WHERE state = 'waiting' ORDER BY id"
        ).fetchall()
        return [
            Redelivery(number, since, until, subject, self._progress(number))
            for number, since, until, subject in rows
        ]

    def redelivered(self, number: int, queue: str, sent: int, done_up_to: str, *, done: bool) -> None:
        """Commit a redelivery's progress; `done_up_to` is the queue's last finished segment."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO redelivery_progress VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET done_up_to = excluded.done_up_to, done = excluded.done",
                (number, queue, done_up_to, done),
            )
            db.execute("UPDATE redeliveries SET sent = sent + ? WHERE id = ?", (sent, number))
            add_counts(db, queue, Counter({("redelivered", ""): sent}))

    def redelivery_done(self, number: int) -> None:
        """Mark a redelivery as done in all queues."""
        with self._transaction() as db:
            db.execute("UPDATE redeliveries SET state = 'done' WHERE id = ?", (number,))
            db.execute("DELETE FROM redelivery_progress WHERE redelivery = ?", (number,))

    def _progress(self, number: int) -> dict[str, Progress]:
        rows = self._db.execute(
            "SELECT queue, done_up_to, done FROM redelivery_progress WHERE redelivery = ?", (number,)
        )
        return {queue: Progress(done_up_to, bool(done)) for queue, done_up_to, done in rows}

    def _transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        return transaction(self._db)


class Progress(NamedTuple):
    """A redelivery's progress in a queue: the last finished segment, and whether all are finished."""

    done_up_to: str
    done: bool


@dataclass(frozen=True, slots=True)
class Redelivery:
    """A span of event time, from `since` up to but not including `until`, whose events are sent again."""

    id: int
    since: str
    until: str
    subject: str | None
    progress: Mapping[str, Progress] = field(default_factory=dict)


def add_counts(db: sqlite3.Connection, queue: str, counts: Counts) -> None:
    """Add to a queue's counts."""
    db.executemany(
        "INSERT INTO counts VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
        [(queue, name, reason, value) for (name, reason), value in counts.items() if value],
    )


def add_to_ledger(db: sqlite3.Connection, queue: str, column: str, lines: Lines) -> None:
    """Add to one column of the ledger's lines."""
    values = {name: "?" if name == column else "0" for name in ("accepted", "delivered", "dead_lettered")}
    db.executemany(
        f"INSERT INTO ledger VALUES (?, ?, ?, ?, {', '.join(values.values())})"  # noqa: S608 - our own names
        f" ON CONFLICT DO UPDATE SET {column} = {column} + excluded.{column}",
        [(queue, *key, count) for key, count in lines.items()],
    )


def _add_settled(db: sqlite3.Connection, queue: str, delivered: Lines, dead_lettered: Lines) -> None:
    add_to_ledger(db, queue, "delivered", delivered)
    add_to_ledger(db, queue, "dead_lettered", dead_lettered)
    totals = {("delivered", ""): delivered.total(), ("dead_lettered", ""): dead_lettered.total()}
    add_counts(db, queue, Counter({name: total for name, total in totals.items() if total}))
