"""What delivery remembers: how far each segment is delivered, the counts, and the dead letters.

One SQLite file, written by the delivery process only, far from the thread that serves Kong. The cursor
of a batch, its counts and its dead letters are one transaction, so that the counts hold after kill -9.
A file that is damaged is set aside and begun anew: then events are sent again, and the metering API,
which knows their ids, counts them once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from openmeter_plugin.log import get_logger

FILE: Final = "delivery.db"

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS cursors (
  queue TEXT NOT NULL, segment TEXT NOT NULL, position INTEGER NOT NULL,
  PRIMARY KEY (queue, segment)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (
  queue TEXT NOT NULL, name TEXT NOT NULL, reason TEXT NOT NULL, value INTEGER NOT NULL,
  PRIMARY KEY (queue, name, reason)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead_letters (
  id INTEGER PRIMARY KEY, queue TEXT NOT NULL, event BLOB NOT NULL,
  status INTEGER, answer TEXT NOT NULL, at REAL NOT NULL);
"""

Counts = Counter[tuple[str, str]]
"""By (name, reason); names: requests, events, skipped, quarantined, lost, delivered, dead_lettered,
damaged_bytes."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that the metering API will never take, with its answer."""

    event: bytes
    status: int | None
    answer: str


class DeliveryState:
    """The delivery process's memory; `directory` is the spool."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        try:
            self._db = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = f"{FILE}.damaged-{time.time_ns()}"
            for ending in ("", "-wal", "-shm"):  # the last commits may be in SQLite's log
                with contextlib.suppress(FileNotFoundError):
                    self._path.with_name(FILE + ending).rename(self._path.with_name(aside + ending))
            get_logger().error("delivery_state_damaged", reason=str(error), set_aside_as=aside)
            self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, isolation_level=None, timeout=5)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.executescript(_SCHEMA)
            _check(db)
        except BaseException:
            db.close()
            raise
        self._path.chmod(0o600)
        return db

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def cursors(self, queue: str) -> dict[str, int]:
        """Return the offset up to which each segment of the queue is done with."""
        return dict(self._db.execute("SELECT segment, position FROM cursors WHERE queue = ?", (queue,)))

    def commit(
        self,
        queue: str,
        positions: Mapping[str, int],
        counts: Counts,
        dead_letters: Iterable[DeadLetter] = (),
    ) -> None:
        """Remember that the segments are done with up to these offsets: all of it, or sqlite3.Error."""
        now = time.time()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany(
                "INSERT INTO cursors VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET position = excluded.position",
                [(queue, segment, position) for segment, position in positions.items()],
            )
            self._db.executemany(
                "INSERT INTO counts VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET value = value + excluded.value",
                [(queue, name, reason, value) for (name, reason), value in counts.items()],
            )
            self._db.executemany(
                "INSERT INTO dead_letters (queue, event, status, answer, at) VALUES (?, ?, ?, ?, ?)",
                [(queue, d.event, d.status, d.answer, now) for d in dead_letters],
            )
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def forget(self, queue: str, segment: str) -> None:
        """Drop the cursor of a segment whose file is gone. In this order: never the other way round."""
        self._db.execute("DELETE FROM cursors WHERE queue = ? AND segment = ?", (queue, segment))


def _check(db: sqlite3.Connection) -> None:
    """Read every page; raises sqlite3.DatabaseError, where it would otherwise come in the middle of work."""
    (health,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if health != "ok":
        raise sqlite3.DatabaseError(health)


def read_counts(directory: Path) -> dict[str, Counts]:
    """Return each queue's counts, read beside a delivery that may be running."""
    path = directory / FILE
    if not path.exists():
        return {}
    result: dict[str, Counts] = {}
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
        for queue, name, reason, value in db.execute("SELECT queue, name, reason, value FROM counts"):
            result.setdefault(queue, Counter())[name, reason] = value
    return result


def read_dead_letters(directory: Path) -> list[tuple[str, DeadLetter]]:
    """Return (queue, dead letter) in the order in which they died."""
    path = directory / FILE
    if not path.exists():
        return []
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5)) as db:
        rows = db.execute("SELECT queue, event, status, answer FROM dead_letters ORDER BY id")
        return [(queue, DeadLetter(event, status, answer)) for queue, event, status, answer in rows]
