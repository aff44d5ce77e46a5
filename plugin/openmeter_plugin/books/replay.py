"""Requests to replay dead letters or to redeliver events, written into the books.

The delivery process finds them there, whichever process it is. All functions raise sqlite3.Error if the
books cannot be written.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from openmeter_plugin.books.database import (
    FILE,
    MAX_ROW_ID,
    VERSION,
    connect,
    open_file,
    transaction,
    version_of,
)
from openmeter_plugin.books.equations import Counts
from openmeter_plugin.books.refusals import with_groups
from openmeter_plugin.books.store import LedgerKey, Lines, add_counts, add_dead_letters, add_to_ledger
from openmeter_plugin.spool.destination import QUARANTINE

_PER_TRANSACTION: Final = 1000  # rows, so that the delivery need not wait long
_KEPT_REPLAYS: Final = 1000  # that are over


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


class StartedReplay(NamedTuple):
    """A replay's id, None if nothing was marked, and the number of dead letters that it newly marked."""

    id: int | None
    marked: int


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters to replay: those with these ids, of this group, or all; none after `up_to`.

    `up_to` leaves out what became a dead letter after the page was loaded.
    """

    ids: Collection[int] | None = None
    group: str | None = None
    up_to: int = MAX_ROW_ID


def replay_dead_letters(spool: Path, ids: Collection[int] | None = None) -> int:
    """Mark dead letters for replay, all or those with these ids; returns how many are newly marked."""
    return start_replay(spool, Selection(ids)).marked


def start_replay(spool: Path, selection: Selection) -> StartedReplay:
    """Mark dead letters for one replay, which counts what becomes of them.

    One that is marked already stays with its own replay: whoever asks twice, or at the same time, has each
    event sent once.
    """
    with writing(spool) as db:
        wanted = _unmarked(db, selection)
        replay, marked = None, 0
        for start in range(0, len(wanted), _PER_TRANSACTION):
            with transaction(db):
                replay = replay or _new_replay(db)
                newly = db.executemany(
                    "UPDATE dead_letters SET replay = ? WHERE id = ? AND NOT replay",
                    [(replay, number) for number in wanted[start : start + _PER_TRANSACTION]],
                ).rowcount
                db.execute("UPDATE replays SET marked = marked + ? WHERE id = ?", (newly, replay))
                marked += newly
        if replay is not None and not marked:
            db.execute("DELETE FROM replays WHERE id = ?", (replay,))
            replay = None
    return StartedReplay(replay, marked)


def _unmarked(db: sqlite3.Connection, selection: Selection) -> list[int]:
    """Return the selected dead letters; of `ids` also those that are marked or not there."""
    if selection.ids is not None:
        return [number for number in selection.ids if number <= selection.up_to]
    if selection.group is None:
        rows = db.execute(
            "SELECT id FROM dead_letters WHERE NOT replay AND id <= ? ORDER BY id", (selection.up_to,)
        )
    else:
        with_groups(db)
        rows = db.execute(
            "SELECT d.id FROM dead_letters d LEFT JOIN answers a ON a.id = answer_id"
            " WHERE NOT replay AND d.id <= ? AND refusal_group(queue, status, coalesce(text, answer)) = ?"
            " ORDER BY d.id",
            (selection.up_to, selection.group),
        )
    return [number for (number,) in rows]


def _new_replay(db: sqlite3.Connection, marked: int = 0) -> int:
    """Add a replay and return its id; the oldest that are over are forgotten."""
    number = db.execute("INSERT INTO replays (asked, marked) VALUES (?, ?)", (time.time(), marked)).lastrowid
    assert number is not None  # noqa: S101 - it was inserted
    db.execute(
        "DELETE FROM replays WHERE id <= ? AND delivered + refused >= marked", (number - _KEPT_REPLAYS,)
    )
    return number


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
    if letters:
        add_dead_letters(db, letters, replay=_new_replay(db, len(letters)))
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
