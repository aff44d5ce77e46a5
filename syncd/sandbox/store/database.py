"""The SQLite database: one writer at a time, concurrent readers (WAL), one transaction per request."""

import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncd.sandbox.store.aggregates import register_functions

SCHEMA_VERSION = 4

_SCHEMA = """
-- Deduplicated by (source, id, flush): with deduplication `flush` is 0, without it the number of the flush.
-- `received` counts how often each event was received. It is visible from `stored_at` on.
CREATE TABLE events (
    source TEXT NOT NULL, id TEXT NOT NULL, type TEXT NOT NULL, subject TEXT NOT NULL,
    time INTEGER NOT NULL, data TEXT, ingested_at INTEGER NOT NULL, flush INTEGER NOT NULL,
    stored_at REAL NOT NULL, received INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (source, id, flush)
);
CREATE INDEX events_by_subject ON events (type, subject, time);
CREATE INDEX events_by_time ON events (time);

CREATE TABLE customers (
    id TEXT PRIMARY KEY, document TEXT NOT NULL,
    created_at TEXT NOT NULL, updated_at TEXT NOT NULL, deleted_at TEXT,
    name TEXT AS (json_extract(document, '$.name')),
    key TEXT AS (json_extract(document, '$.key')),
    primary_email TEXT AS (json_extract(document, '$.primaryEmail'))
);
CREATE INDEX customers_by_name ON customers (name, id);

-- The customers to which a subject is attributed now. `role` is key or subject; customers not deleted only.
-- If a subject of one customer is the key of another, its events are those of the key's owner, unless the
-- usage of the other one is asked for alone.
CREATE TABLE attribution (
    subject TEXT NOT NULL, customer_id TEXT NOT NULL, role TEXT NOT NULL, PRIMARY KEY (subject, role)
) WITHOUT ROWID;
CREATE INDEX attribution_by_customer ON attribution (customer_id, subject);

CREATE TABLE subscriptions (
    id TEXT PRIMARY KEY, customer_id TEXT NOT NULL, plan_key TEXT, active_from TEXT NOT NULL, active_to TEXT,
    created_at TEXT NOT NULL
);
CREATE INDEX subscriptions_by_customer ON subscriptions (customer_id);

CREATE TABLE features (id TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, document TEXT NOT NULL);

CREATE TABLE entitlements (
    id TEXT PRIMARY KEY, customer_id TEXT NOT NULL, feature_key TEXT NOT NULL, document TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE INDEX entitlements_by_customer ON entitlements (customer_id);

CREATE TABLE credits (id TEXT PRIMARY KEY, customer_id TEXT NOT NULL, document TEXT NOT NULL);
CREATE INDEX credits_by_customer ON credits (customer_id);

CREATE TABLE invoices (
    id TEXT PRIMARY KEY, customer_id TEXT NOT NULL, status TEXT NOT NULL, created_at TEXT NOT NULL
);
CREATE INDEX invoices_by_customer ON invoices (customer_id);

CREATE TABLE subjects (
    id TEXT PRIMARY KEY, key TEXT NOT NULL UNIQUE, document TEXT NOT NULL,
    created_at TEXT NOT NULL, updated_at TEXT NOT NULL
);

CREATE TABLE meters (
    id TEXT PRIMARY KEY, slug TEXT NOT NULL UNIQUE, document TEXT NOT NULL,
    created_at TEXT NOT NULL, updated_at TEXT NOT NULL
);
"""


class Database:
    """Lends connections: `writing()` to one request at a time, `reading()` to any number."""

    def __init__(self, path: Path) -> None:
        if str(path) == ":memory:":  # SQLite would give each connection an empty database of its own
            raise sqlite3.OperationalError("the database cannot be in memory; name a file")
        self._path = path
        self._write_lock = threading.Lock()
        self._idle_readers: deque[sqlite3.Connection] = deque()
        self._writer = self._connect()
        try:
            self.is_new = self._create_schema()
            # A commit need not wait for the disk: the sandbox has to survive a kill, not a power cut.
            # The cache (in KiB) holds the index of ids, which arrive in random order, for fast inserts.
            self._writer.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA cache_size = -65536;"
            )
        except sqlite3.Error:
            self.close()
            raise

    def empty(self) -> None:
        """Delete everything, in one transaction of its own."""
        with self.writing() as connection:
            tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
            for (table,) in tables:
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - the names are those of _SCHEMA

    def close(self) -> None:
        """Close all connections; no request may be running."""
        while self._idle_readers:
            self._idle_readers.pop().close()
        with self._write_lock:
            self._writer.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend the writer for one transaction: committed at the end, rolled back on an exception."""
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                # After severe errors SQLite has already rolled back.
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a reader for one transaction, so that all its queries see the same snapshot."""
        try:
            reader = self._idle_readers.pop()
        except IndexError:
            reader = self._connect()
            reader.execute("PRAGMA query_only = ON")
        reader.execute("BEGIN")
        try:
            yield reader
        finally:
            reader.execute("ROLLBACK")
            self._idle_readers.append(reader)

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: the sqlite3 module starts no transactions; the two methods above do.
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        register_functions(connection)
        return connection

    def _create_schema(self) -> bool:
        with self.writing() as connection:
            version: int = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == SCHEMA_VERSION:
                return False
            if version or connection.execute("SELECT 1 FROM sqlite_schema").fetchone():
                raise sqlite3.DatabaseError(f"{self._path} is not a database of this sandbox version")
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return True
