"""The store of the books: positions in each segment, counts, ledger, dead letters and redeliveries.

The delivery process writes it. Counts are committed together with the position up to which they were
counted, so that the books hold after kill -9. `equations` has what always holds, besides

    events = accepted in the ledger + in pruned lines

`database` handles a damaged file. Only the process that opened the books last writes them: two processes
that deliver the same spool would count everything twice.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from openmeter_plugin.books import pruning
from openmeter_plugin.books.database import FILE, open_file, transaction
from openmeter_plugin.books.equations import Counts, violations
from openmeter_plugin.log import get_logger
from openmeter_plugin.spool.reader import Position
from openmeter_plugin.spool.segment import Damage


class LedgerKey(NamedTuple):
    """The key of a ledger line; `hour` is the event time's hour in UTC, such as 2026-11-22T07."""

    hour: str
    type: str
    subject: str


Lines = Counter[LedgerKey]


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
    damage: list[tuple[str, Damage]] = field(default_factory=list)
    quarantined: list[tuple[str, bytes]] = field(default_factory=list)

    def count_gap(self, gap: str | None, requests: int = 1) -> None:
        """Count requests with a gap in their AI usage, if there is one."""
        if gap is not None:
            self.counts["ai_usage_gaps", gap] += requests

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
    events: int = field(kw_only=True)
    """How many events the batches held."""


@dataclass(slots=True)
class Losses:
    """Events in the books that can no longer be delivered, because their bytes are damaged or gone."""

    reason: str
    lines: Lines = field(default_factory=Counter)
    damage: list[tuple[str, Damage]] = field(default_factory=list)
    """The damage that was found, by segment."""
    gone: list[str] = field(default_factory=list)
    """Segments that no longer exist: the books forget them."""
    unreadable: list[str] = field(default_factory=list)
    """Segments that cannot be read and are set aside."""
    returned: list[str] = field(default_factory=list)
    """Segments that were set aside and can be read again: their lines are negative."""


class BooksTakenError(Exception):
    """Another process has opened the books for writing since: this one must stop delivering."""


class Books:
    """The books of the spool in `directory`. Whoever opened them last may write."""

    def __init__(self, directory: Path) -> None:
        self._db = open_file(directory / FILE)
        self._journal = directory / f"{FILE}-wal"
        self._token = secrets.token_hex(8)
        self._differences: dict[str, dict[str, int]] = {}
        with transaction(self._db) as db:
            db.execute("INSERT OR REPLACE INTO owner VALUES (1, ?)", (self._token,))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def positions(self, queue: str) -> dict[str, Position]:
        """Return the position of each segment of the queue."""
        rows = self._db.execute(
            "SELECT segment, accounted, delivered FROM positions WHERE queue = ?", (queue,)
        )
        return {segment: Position(accounted, delivered) for segment, accounted, delivered in rows}

    def is_empty(self, queue: str) -> bool:
        """Return whether neither segments nor dead letters of the queue are left, and nothing waits."""
        (found,) = self._db.execute(
            "SELECT EXISTS (SELECT 1 FROM positions WHERE queue = :queue)"
            " OR EXISTS (SELECT 1 FROM dead_letters WHERE queue = :queue)"
            " OR EXISTS (SELECT 1 FROM counts WHERE queue = :queue AND name = 'waiting' AND value != 0)",
            {"queue": queue},
        ).fetchone()
        return not found

    def resent(self, queue: str) -> set[tuple[str, int]]:
        """Return (segment, offset after it) of each record that is not sent: resent or unsendable."""
        rows = self._db.execute("SELECT segment, position FROM resent WHERE queue = ?", (queue,))
        return set(rows)

    def account(self, queue: str, accounting: Accounting) -> None:
        """Commit what was read: all of it, or raise sqlite3.Error."""
        with self._transaction(queue) as db:
            db.executemany(
                "INSERT INTO positions VALUES (?, ?, ?, 0)"
                " ON CONFLICT (queue, segment) DO UPDATE SET accounted = excluded.accounted",
                [(queue, segment, position) for segment, position in accounting.positions.items()],
            )
            db.executemany(
                "INSERT OR IGNORE INTO resent VALUES (?, ?, ?)",
                [(queue, *record) for record in (*accounting.resent, *accounting.unsendable)],
            )
            _add_damage(db, queue, accounting.damage)
            now = time.time()
            db.executemany(
                "INSERT INTO quarantine (reason, record, at) VALUES (?, ?, ?)",
                [(reason, record, now) for reason, record in accounting.quarantined],
            )
            add_counts(db, queue, accounting.counts)
            add_counts(db, queue, Counter({("waiting", ""): accounting.accepted.total()}))
            add_to_ledger(db, queue, "accepted", accounting.accepted)

    def deliver(self, queue: str, delivery: Delivery) -> None:
        """Commit the outcome of batches: all of it, or raise sqlite3.Error."""
        with self._transaction(queue) as db:
            db.executemany(
                "UPDATE positions SET delivered = ? WHERE queue = ? AND segment = ?",
                [(position, queue, segment) for segment, position in delivery.positions.items()],
            )
            letters = [(queue, d.event, d.status, d.answer) for d in delivery.dead_letters]
            add_dead_letters(db, letters)
            _add_settled(db, queue, delivery.delivered, delivery.dead_lettered)
            add_counts(db, queue, Counter({("waiting", ""): -delivery.events}))

    def damage(self, queue: str) -> list[tuple[str, Damage]]:
        """Return the damage that is counted already, by segment."""
        rows = self._db.execute("SELECT segment, start, stop FROM damage WHERE queue = ?", (queue,))
        return [(segment, Damage(start, stop)) for segment, start, stop in rows]

    def set_aside(self, queue: str) -> set[str]:
        """Return the unreadable segments whose events are counted as lost."""
        return {
            name for (name,) in self._db.execute("SELECT segment FROM set_aside WHERE queue = ?", (queue,))
        }

    def open_lines(self, queue: str) -> Lines:
        """Return how many events of each line of the ledger wait for delivery."""
        rows = self._db.execute(
            "SELECT hour, type, subject, accepted - delivered - dead_lettered - lost AS open FROM ledger"
            " WHERE queue = ? AND open > 0",
            (queue,),
        )
        return Counter({LedgerKey(hour, kind, subject): number for hour, kind, subject, number in rows})

    def lose(self, queue: str, losses: Losses) -> None:
        """Commit what was lost: all of it, or raise sqlite3.Error."""
        lost = sum(number for number in losses.lines.values() if number > 0)
        found_again = lost - losses.lines.total()
        size = sum(damage.end - damage.start for _, damage in losses.damage)
        with self._transaction(queue) as db:
            add_to_ledger(db, queue, "lost", losses.lines)
            counts: Counts = Counter({("waiting", ""): found_again - lost, ("damaged_bytes", ""): size})
            counts["lost_events", losses.reason] += lost
            counts["lost_events", "unreadable"] -= found_again
            add_counts(db, queue, counts)
            _add_damage(db, queue, losses.damage)
            db.executemany(
                "INSERT OR IGNORE INTO set_aside VALUES (?, ?)",
                [(queue, segment) for segment in losses.unreadable],
            )
            db.executemany(
                "DELETE FROM set_aside WHERE queue = ? AND segment = ?",
                [(queue, segment) for segment in losses.returned],
            )
            for segment in losses.gone:
                _forget(db, queue, segment)

    def sync(self) -> None:
        """Write everything that is committed through to the disk; raises OSError. Any thread may call it.

        Until then a power loss may take back the last commits. Call it before a segment is removed: without
        its file, books that still have its events as waiting would count them as lost.
        """
        # A checkpoint would do it too, but waits for readers.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self._journal, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def forget(self, queue: str, segment: str) -> None:
        """Delete the positions of a segment. Remove its file first, never the other way round."""
        with self._transaction(queue) as db:
            _forget(db, queue, segment)

    def count(self, queue: str, name: str, value: int = 1) -> None:
        """Add to a count that has no reason and no position."""
        with self._transaction(queue) as db:
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
        """Commit the outcome of replayed dead letters, and count it for the replays that marked them."""
        with self._transaction(queue) as db:
            _count_replayed(db, "delivered", delivered)
            _count_replayed(db, "refused", refused)
            db.executemany("DELETE FROM dead_letters WHERE id = ?", [(number,) for number in delivered])
            _add_answers(db, {letter.answer for letter in refused.values()})
            db.executemany(
                "UPDATE dead_letters SET replay = 0, status = ?, answer = '',"
                " answer_id = (SELECT id FROM answers WHERE text = ?) WHERE id = ?",
                [(letter.status, letter.answer, number) for number, letter in refused.items()],
            )
            db.execute("DELETE FROM answers WHERE NOT EXISTS (SELECT 1 FROM dead_letters)")
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
        with self._transaction(queue) as db:
            db.execute(
                "INSERT INTO redelivery_progress VALUES (?, ?, ?, ?)"
                " ON CONFLICT (redelivery, queue) DO UPDATE"
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

    @contextmanager
    def _transaction(self, queue: str | None = None) -> Iterator[sqlite3.Connection]:
        """Commit all that the block writes, or nothing; raises BooksTakenError, sqlite3.Error.

        Checks the equations of the books for the queue.
        """
        with transaction(self._db) as db:
            (token,) = db.execute("SELECT token FROM owner").fetchone()
            if token != self._token:
                raise BooksTakenError("another process has opened the books of this spool for delivery")
            yield db
            if queue is not None:
                self._check(db, queue)

    def _check(self, db: sqlite3.Connection, queue: str) -> None:
        """Count and report equations that do not hold, once until the difference changes."""
        rows = db.execute("SELECT name, reason, value FROM counts WHERE queue = ?", (queue,))
        found = violations(Counter({(name, reason): value for name, reason, value in rows}))
        differences = {violation.equation: violation.difference for violation in found}
        if differences != self._differences.get(queue, {}):
            self._differences[queue] = differences
            if found:
                add_counts(db, queue, Counter({("violations", ""): 1}))
                get_logger().critical(
                    "books_violated",
                    queue=queue,
                    equations=[violation.text for violation in found],
                    consequence="delivery continues; the counts of this queue cannot be trusted",
                    remedy="run `openmeter-plugin spool verify` and report the difference as a bug",
                )


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
        "INSERT INTO counts VALUES (?, ?, ?, ?)"
        " ON CONFLICT (queue, name, reason) DO UPDATE SET value = value + excluded.value",
        [(queue, name, reason, value) for (name, reason), value in counts.items() if value],
    )


def add_dead_letters(
    db: sqlite3.Connection, letters: Sequence[tuple[str, bytes, int | None, str]], *, replay: int = 0
) -> None:
    """Add dead letters: queue, event, status and answer of each. An answer that many have is stored once.

    `replay` is the replay that they are marked for, 0 for none.
    """
    _add_answers(db, {answer for *_, answer in letters})
    now = time.time()
    db.executemany(
        "INSERT INTO dead_letters (queue, event, status, answer, answer_id, at, replay)"
        " VALUES (?, ?, ?, '', (SELECT id FROM answers WHERE text = ?), ?, ?)",
        [(*letter, now, replay) for letter in letters],
    )


def _count_replayed(
    db: sqlite3.Connection, column: Literal["delivered", "refused"], letters: Iterable[int]
) -> None:
    """Count an outcome for the replays that marked these dead letters, which still have their marks."""
    db.executemany(
        f"UPDATE replays SET {column} = {column} + 1"  # noqa: S608 - our own names
        " WHERE id = (SELECT replay FROM dead_letters WHERE id = ?)",
        [(number,) for number in letters],
    )


def _add_answers(db: sqlite3.Connection, texts: Iterable[str]) -> None:
    db.executemany(
        "INSERT INTO answers (text) VALUES (?) ON CONFLICT DO NOTHING", [(text,) for text in texts]
    )


def _forget(db: sqlite3.Connection, queue: str, segment: str) -> None:
    for table in ("positions", "resent", "damage", "set_aside"):
        db.execute(f"DELETE FROM {table} WHERE queue = ? AND segment = ?", (queue, segment))  # noqa: S608


def _add_damage(db: sqlite3.Connection, queue: str, damage: Iterable[tuple[str, Damage]]) -> None:
    db.executemany(
        "INSERT OR IGNORE INTO damage VALUES (?, ?, ?, ?)",
        [(queue, segment, item.start, item.end) for segment, item in damage],
    )


def add_to_ledger(db: sqlite3.Connection, queue: str, column: str, lines: Lines) -> None:
    """Add to one column of the ledger's lines."""
    values = ["?" if name == column else "0" for name in ("accepted", "delivered", "dead_lettered", "lost")]
    db.executemany(
        f"INSERT INTO ledger VALUES (?, ?, ?, ?, {', '.join(values)})"  # noqa: S608 - our own names
        f" ON CONFLICT (queue, hour, type, subject) DO UPDATE SET {column} = {column} + excluded.{column}",
        [(queue, *key, count) for key, count in lines.items()],
    )


def _add_settled(db: sqlite3.Connection, queue: str, delivered: Lines, dead_lettered: Lines) -> None:
    add_to_ledger(db, queue, "delivered", delivered)
    add_to_ledger(db, queue, "dead_lettered", dead_lettered)
    totals = {("delivered", ""): delivered.total(), ("dead_lettered", ""): dead_lettered.total()}
    add_counts(db, queue, Counter({name: total for name, total in totals.items() if total}))
