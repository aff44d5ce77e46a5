"""Asking the delivery to send again: what was refused, what was set aside, what the metering API lost.

It is written into the books, where the delivery finds it, whichever process that is. All of these raise
sqlite3.Error where the books cannot be written.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from openmeter_plugin.books.database import FILE, connect, open_file, transaction

_PER_TRANSACTION: Final = 1000  # rows, so that the delivery need not wait long


def request_redelivery(
    spool: Path, since: datetime | str, until: datetime | str, subject: str | None = None
) -> int:
    """Have retained events sent again whose time is from `since` up to, not including, `until`.

    Returns the redelivery's id. Raises ValueError where the span is none.
    """
    first, end = _moment(since, "since"), _moment(until, "until")
    if first >= end:
        raise ValueError("since must be before until")
    if subject == "":
        raise ValueError("subject must not be empty; without one, the events of all are sent")
    with writing(spool) as db, transaction(db):
        number = db.execute(
            "INSERT INTO redeliveries (since, until, subject, state, sent, asked)"
            " VALUES (?, ?, ?, 'waiting', 0, ?)",
            (_text(first), _text(end), subject, time.time()),
        ).lastrowid
    assert number is not None  # noqa: S101 - it was inserted
    return number


def replay_dead_letters(spool: Path, ids: Iterable[int] | None = None) -> int:
    """Have dead letters sent again, all or those with these ids; returns how many were not marked before."""
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


@contextmanager
def writing(spool: Path) -> Iterator[sqlite3.Connection]:
    """Open the books to write in them beside the delivery."""
    path = spool / FILE
    # Only where there are none yet are they made, which reads all of them.
    db = connect(path) if path.exists() and path.stat().st_size else open_file(path)
    try:
        yield db
    finally:
        db.close()


def _moment(value: datetime | str, name: str) -> datetime:
    """Return the moment in UTC; raises ValueError where it is none, or has no zone."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(f"{name} must be a time such as 2026-11-22T07:00:00Z") from None
    if value.tzinfo is None:
        raise ValueError(f"{name} must say its time zone, such as 2026-11-22T07:00:00Z")
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{name} is no time that can be written in UTC") from None


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
