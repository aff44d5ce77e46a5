"""The SQLite file of the books: schema, connections and transactions.

The delivery process writes it, far from the thread that serves Kong. Commands and API requests that replay
dead letters or request a redelivery write it too; the writers wait for each other.

A damaged file is renamed and a new one created. What is retained is then counted and sent again, and the
metering API, which knows the ids, counts it once.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from openmeter_plugin.log import get_logger

MAX_ROW_ID: Final = 2**63 - 1
"""The largest id of a row (SQLite)."""
FILE: Final = "books.db"

SCHEMA: Final = """
BEGIN;
CREATE TABLE IF NOT EXISTS positions (
  queue TEXT NOT NULL, segment TEXT NOT NULL, accounted INTEGER NOT NULL, delivered INTEGER NOT NULL,
  PRIMARY KEY (queue, segment)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS resent (
  queue TEXT NOT NULL, segment TEXT NOT NULL, position INTEGER NOT NULL,
  PRIMARY KEY (queue, segment, position)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counts (
  queue TEXT NOT NULL, name TEXT NOT NULL, reason TEXT NOT NULL, value INTEGER NOT NULL,
  PRIMARY KEY (queue, name, reason)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger (
  queue TEXT NOT NULL, hour TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL,
  accepted INTEGER NOT NULL, delivered INTEGER NOT NULL, dead_lettered INTEGER NOT NULL,
  PRIMARY KEY (queue, hour, type, subject)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger_pruned (
  queue TEXT NOT NULL PRIMARY KEY, up_to TEXT NOT NULL, lines INTEGER NOT NULL, events INTEGER NOT NULL)
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead_letters (
  id INTEGER PRIMARY KEY, queue TEXT NOT NULL, event BLOB NOT NULL, status INTEGER,
  answer TEXT NOT NULL, at REAL NOT NULL, replay INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS dead_letters_to_replay ON dead_letters (queue, id) WHERE replay;
CREATE TABLE IF NOT EXISTS quarantine (
  id INTEGER PRIMARY KEY, reason TEXT NOT NULL, record BLOB NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS redeliveries (
  id INTEGER PRIMARY KEY, since TEXT NOT NULL, until TEXT NOT NULL, subject TEXT,
  state TEXT NOT NULL, sent INTEGER NOT NULL, asked REAL NOT NULL);
CREATE TABLE IF NOT EXISTS redelivery_progress (
  redelivery INTEGER NOT NULL, queue TEXT NOT NULL, done_up_to TEXT NOT NULL, done INTEGER NOT NULL,
  PRIMARY KEY (redelivery, queue)) WITHOUT ROWID;
COMMIT;
"""


def open_file(path: Path) -> sqlite3.Connection:
    """Open the file, or create it; raises sqlite3.OperationalError if neither is possible."""
    try:
        return _open(path)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        damaged = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        # Rename the journal too: SQLite would apply the old file's journal to the new file.
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                path.with_name(path.name + suffix).rename(f"{damaged}{suffix}")
        get_logger().error("books_damaged", reason=str(error), renamed_to=damaged.name)
        return _open(path)


def _open(path: Path) -> sqlite3.Connection:
    db = connect(path)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA wal_autocheckpoint=100")  # so that the journal stays small on a full disk
        db.executescript(SCHEMA)
        _check(db)
    except BaseException:
        db.close()
        raise
    path.chmod(0o600)
    return db


def connect(path: Path) -> sqlite3.Connection:
    """Connect to the file of the books; waits while another connection writes."""
    db = sqlite3.connect(path, isolation_level=None, timeout=5, check_same_thread=False)
    db.execute("PRAGMA synchronous=NORMAL")
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit all that the block writes, or nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def is_damage(error: BaseException | None) -> bool:
    """Return whether an error means that the file is damaged, not just unusable at the moment."""
    # Subclasses of DatabaseError are errors of the disk or a lock, or internal errors.
    return type(error) is sqlite3.DatabaseError


def _check(db: sqlite3.Connection) -> None:
    """Read every page; raises sqlite3.DatabaseError now rather than in the middle of work."""
    (health,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if health != "ok":
        raise sqlite3.DatabaseError(health)
