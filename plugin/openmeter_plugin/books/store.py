"""The books: how far each segment is accounted for and delivered, the counts, the ledger, the dead letters.

One SQLite file, written by the delivery process, far from the thread that serves Kong. Whatever is counted
is committed together with the position up to which it was counted, so that the books hold after kill -9:

    requests = metered + skipped (by reason) + quarantined + resent
    events   = delivered + dead_lettered + what waits in the spool
    events   = accepted in the ledger + in lines that were pruned

`books_file` says what becomes of a file that is damaged.
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
from openmeter_plugin.books.database import FILE, SCHEMA, open_file, transaction

__all__ = [
    "FILE",
    "SCHEMA",
    "Accounting",
    "Books",
    "Counts",
    "DeadLetter",
    "Delivery",
    "LedgerKey",
    "Lines",
    "Position",
    "Progress",
    "Redelivery",
    "add_counts",
    "add_to_ledger",
]

Counts = Counter[tuple[str, str]]
"""By (name, reason): requests, metered, skipped, quarantined, resent; events, delivered, dead_lettered;
lost, damaged_bytes, unreadable_segments, redelivered. The reason is empty for all but skipped and lost."""


class LedgerKey(NamedTuple):
    """A line of the ledger: `hour` of event time, UTC, as 2026-11-22T07."""

    hour: str
    type: str
    subject: str


Lines = Counter[LedgerKey]


@dataclass(frozen=True, slots=True)
class Position:
    """Offsets in a segment: up to where it is accounted for, and up to where it is delivered."""

    accounted: int
    delivered: int


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that the metering API will never take, with its answer; `status` is HTTP's, if any."""

    event: bytes
    status: int | None
    answer: str


@dataclass(slots=True)
class Accounting:
    """What was read of a queue, to be committed as one: from then on it counts and may be delivered."""

    positions: dict[str, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counter)
    accepted: Lines = field(default_factory=Counter)
    resent: list[tuple[str, int]] = field(default_factory=list)
    unsendable: list[tuple[str, int]] = field(default_factory=list)
    """(segment, offset behind it) of records of usage that cannot be read."""
    quarantined: list[tuple[str, bytes]] = field(default_factory=list)

    def count_requests(self) -> None:
        """Complete the counts: a request was metered or skipped, is quarantined, or was there before."""
        counts = self.counts
        counts["resent", ""] = len(self.resent)
        counts["quarantined", ""] = len(self.quarantined)
        skipped = sum(value for (name, _), value in counts.items() if name == "skipped")
        counts["requests", ""] = (
            counts["metered", ""] + skipped + counts["quarantined", ""] + counts["resent", ""]
        )


@dataclass(slots=True)
class Delivery:
    """What became of a batch, to be committed as one."""

    positions: Mapping[str, int]
    delivered: Lines = field(default_factory=Counter)
    dead_lettered: Lines = field(default_factory=Counter)
    dead_letters: list[DeadLetter] = field(default_factory=list)


class Books:
    """The books of a spool; `directory` is the spool."""

    def __init__(self, directory: Path) -> None:
        self._db = open_file(directory / FILE)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def positions(self, queue: str) -> dict[str, Position]:
        """Return how far each segment of the queue is."""
        rows = self._db.execute(
            "SELECT segment, accounted, delivered FROM positions WHERE queue = ?", (queue,)
        )
        return {segment: Position(accounted, delivered) for segment, accounted, delivered in rows}

    def resent(self, queue: str) -> set[tuple[str, int]]:
        """Return (segment, offset behind it) of each record that Kong had handed over before."""
        rows = self._db.execute("SELECT segment, position FROM resent WHERE queue = ?", (queue,))
        return set(rows)

    def account(self, queue: str, accounting: Accounting) -> None:
        """Enter what was read: all of it, or sqlite3.Error."""
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
        """Enter what became of a batch: all of it, or sqlite3.Error."""
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
            _settle(db, queue, delivery.delivered, delivery.dead_lettered)

    def forget(self, queue: str, segment: str) -> None:
        """Drop what is known of a segment whose file is gone. In this order: never the other way round."""
        with self._transaction() as db:
            db.execute("DELETE FROM positions WHERE queue = ? AND segment = ?", (queue, segment))
            db.execute("DELETE FROM resent WHERE queue = ? AND segment = ?", (queue, segment))

    def count(self, queue: str, name: str, value: int = 1) -> None:
        """Count something that has no reason and no position."""
        with self._transaction() as db:
            add_counts(db, queue, Counter({(name, ""): value}))

    def prune(self, days: int, now: datetime) -> int:
        """Prune some lines of the ledger that are older than so many days; returns how many."""
        return pruning.prune(self._db, days, now)

    def to_replay(self, queue: str, limit: int, most_bytes: int) -> list[tuple[int, bytes]]:
        """Return (id, event) of dead letters that somebody wants sent again."""
        rows = self._db.execute(
            "SELECT id, event FROM dead_letters WHERE queue = ? AND replay ORDER BY id LIMIT ?",
            (queue, limit),
        )
        letters: list[tuple[int, bytes]] = []
        with closing(rows):
            for number, event in rows:
                most_bytes -= len(event)
                if letters and most_bytes < 0:
                    break
                letters.append((number, event))
        return letters

    def replayed(self, queue: str, taken: Mapping[int, LedgerKey], refused: Mapping[int, DeadLetter]) -> None:
        """Enter what became of dead letters that were sent again."""
        with self._transaction() as db:
            db.executemany("DELETE FROM dead_letters WHERE id = ?", [(number,) for number in taken])
            db.executemany(
                "UPDATE dead_letters SET replay = 0, status = ?, answer = ? WHERE id = ?",
                [(letter.status, letter.answer, number) for number, letter in refused.items()],
            )
            lines = Counter(taken.values())
            _settle(db, queue, lines, Counter({key: -count for key, count in lines.items()}))

    def redeliveries(self) -> list[Redelivery]:
        """Return the redeliveries that are not done, in the order in which they were asked for."""
        rows = self._db.execute(
            "SELECT id, since, until, subject FROM redeliveries WHERE state = 'waiting' ORDER BY id"
        ).fetchall()
        return [
            Redelivery(number, since, until, subject, self._progress(number))
            for number, since, until, subject in rows
        ]

    def redelivered(self, number: int, queue: str, sent: int, done_up_to: str, *, done: bool) -> None:
        """Enter a redelivery's progress: `done_up_to` names the queue's last segment that is done."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO redelivery_progress VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE"
                " SET done_up_to = excluded.done_up_to, done = excluded.done",
                (number, queue, done_up_to, done),
            )
            db.execute("UPDATE redeliveries SET sent = sent + ? WHERE id = ?", (sent, number))
            add_counts(db, queue, Counter({("redelivered", ""): sent}))

    def redelivery_done(self, number: int) -> None:
        """Enter that a redelivery is done in all queues."""
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
    """How far a redelivery is in a queue: the last segment that is done, and whether all are."""

    done_up_to: str
    done: bool


@dataclass(frozen=True, slots=True)
class Redelivery:
    """A span of event time, `since` included and `until` not, whose retained events are sent again."""

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
    """Add to a column of the ledger's lines."""
    values = {name: "?" if name == column else "0" for name in ("accepted", "delivered", "dead_lettered")}
    db.executemany(
        f"INSERT INTO ledger VALUES (?, ?, ?, ?, {', '.join(values.values())})"  # noqa: S608 - our own names
        f" ON CONFLICT DO UPDATE SET {column} = {column} + excluded.{column}",
        [(queue, *key, count) for key, count in lines.items()],
    )


def _settle(db: sqlite3.Connection, queue: str, delivered: Lines, dead_lettered: Lines) -> None:
    add_to_ledger(db, queue, "delivered", delivered)
    add_to_ledger(db, queue, "dead_lettered", dead_lettered)
    totals = {("delivered", ""): delivered.total(), ("dead_lettered", ""): dead_lettered.total()}
    add_counts(db, queue, Counter({name: total for name, total in totals.items() if total}))
