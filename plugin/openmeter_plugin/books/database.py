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

VERSION: Final = 3
"""The version of the schema, in `PRAGMA user_version`; 0 is that of the versions before 0.1.0."""

SCHEMA: Final = """
CREATE TABLE positions (
  queue TEXT NOT NULL, segment TEXT NOT NULL, accounted INTEGER NOT NULL, delivered INTEGER NOT NULL,
  PRIMARY KEY (queue, segment)) WITHOUT ROWID;
CREATE TABLE resent (
  queue TEXT NOT NULL, segment TEXT NOT NULL, position INTEGER NOT NULL,
  PRIMARY KEY (queue, segment, position)) WITHOUT ROWID;
CREATE TABLE damage (
  queue TEXT NOT NULL, segment TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
  PRIMARY KEY (queue, segment, start, stop)) WITHOUT ROWID;
CREATE TABLE counts (
  queue TEXT NOT NULL, name TEXT NOT NULL, reason TEXT NOT NULL, value INTEGER NOT NULL,
  PRIMARY KEY (queue, name, reason)) WITHOUT ROWID;
CREATE TABLE ledger (
  queue TEXT NOT NULL, hour TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL,
  accepted INTEGER NOT NULL, delivered INTEGER NOT NULL, dead_lettered INTEGER NOT NULL,
  lost INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (queue, hour, type, subject)) WITHOUT ROWID;
CREATE TABLE ledger_pruned (
  queue TEXT NOT NULL PRIMARY KEY, up_to TEXT NOT NULL, lines INTEGER NOT NULL, events INTEGER NOT NULL)
  WITHOUT ROWID;
CREATE TABLE answers (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
CREATE TABLE dead_letters (
  id INTEGER PRIMARY KEY, queue TEXT NOT NULL, event BLOB NOT NULL, status INTEGER,
  answer TEXT NOT NULL, at REAL NOT NULL, replay INTEGER NOT NULL DEFAULT 0, answer_id INTEGER);
CREATE INDEX dead_letters_to_replay ON dead_letters (queue, id) WHERE replay;
CREATE TABLE replays (
  id INTEGER PRIMARY KEY, asked REAL NOT NULL, marked INTEGER NOT NULL,
  delivered INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT NULL DEFAULT 0);
CREATE TABLE quarantine (
  id INTEGER PRIMARY KEY, reason TEXT NOT NULL, record BLOB NOT NULL, at REAL NOT NULL);
CREATE TABLE redeliveries (
  id INTEGER PRIMARY KEY, since TEXT NOT NULL, until TEXT NOT NULL, subject TEXT,
  state TEXT NOT NULL, sent INTEGER NOT NULL, asked REAL NOT NULL);
CREATE TABLE redelivery_progress (
  redelivery INTEGER NOT NULL, queue TEXT NOT NULL, done_up_to TEXT NOT NULL, done INTEGER NOT NULL,
  PRIMARY KEY (redelivery, queue)) WITHOUT ROWID;
CREATE TABLE set_aside (
  queue TEXT NOT NULL, segment TEXT NOT NULL, PRIMARY KEY (queue, segment)) WITHOUT ROWID;
CREATE TABLE owner (id INTEGER PRIMARY KEY CHECK (id = 1), token TEXT NOT NULL);
"""

_MIGRATIONS: Final = {
    1: """
ALTER TABLE ledger ADD COLUMN lost INTEGER NOT NULL DEFAULT 0;
CREATE TABLE damage (
  queue TEXT NOT NULL, segment TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
  PRIMARY KEY (queue, segment, start, stop)) WITHOUT ROWID;
CREATE TABLE set_aside (
  queue TEXT NOT NULL, segment TEXT NOT NULL, PRIMARY KEY (queue, segment)) WITHOUT ROWID;
CREATE TABLE owner (id INTEGER PRIMARY KEY CHECK (id = 1), token TEXT NOT NULL);
INSERT INTO counts SELECT queue, 'waiting', '',
  sum(CASE name WHEN 'events' THEN value ELSE -value END)
  FROM counts WHERE name IN ('events', 'delivered', 'dead_lettered') GROUP BY queue;
""",
    # Earlier answers stay where they are: moving them could take a full disk's last bytes.
    2: """
CREATE TABLE answers (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
ALTER TABLE dead_letters ADD COLUMN answer_id INTEGER;
""",
    # A mark was 1 before; from now on it is the id of a replay, and replay 1 has the marks of before.
    3: """
CREATE TABLE replays (
  id INTEGER PRIMARY KEY, asked REAL NOT NULL, marked INTEGER NOT NULL,
  delivered INTEGER NOT NULL DEFAULT 0, refused INTEGER NOT NULL DEFAULT 0);
INSERT INTO replays (asked, marked)
  SELECT CAST(strftime('%s', 'now') AS REAL), marked
  FROM (SELECT count(*) AS marked FROM dead_letters WHERE replay) WHERE marked > 0;
""",
}
"""By the version that a script leads to, from the one before."""


class NewerBooksError(sqlite3.OperationalError):
    """A later version of the plugin wrote the books: this one does not touch them."""

    def __init__(self, version: int) -> None:
        super().__init__(
            f"they have version {version}, which a later version of openmeter-plugin wrote; this one"
            f" knows up to {VERSION}: install the later version again"
        )


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
        migrate(db)
        _check(db)
    except BaseException:
        db.close()
        raise
    path.chmod(0o600)
    return db


def version_of(db: sqlite3.Connection) -> int | None:
    """Return the version of the schema; None if there is none yet."""
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema WHERE type = 'table'").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version) if tables else None


def migrate(db: sqlite3.Connection) -> None:
    """Create the schema, or bring it to this version, in one transaction; raises NewerBooksError."""
    if version_of(db) == VERSION:
        return
    with transaction(db):
        version = version_of(db)
        if version is None:
            scripts = [SCHEMA]
        elif version > VERSION:
            raise NewerBooksError(version)
        else:
            scripts = [_MIGRATIONS[step] for step in range(version + 1, VERSION + 1)]
            if scripts:
                get_logger().info("books_migrated", from_version=version, to_version=VERSION)
        # `executescript` would commit.
        for statement in ";".join(scripts).split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")


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
