"""Consistent reads of the books while a delivery may write them, or of a read-only copy."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from openmeter_plugin.books.database import (
    FILE,
    SCHEMA,
    VERSION,
    NewerBooksError,
    connect,
    is_damage,
    migrate,
    version_of,
)
from openmeter_plugin.books.equations import Counts
from openmeter_plugin.books.pruning import Pruned
from openmeter_plugin.books.store import LedgerKey
from openmeter_plugin.spool.destination import DELIVERY_LOCK, queues_directory
from openmeter_plugin.spool.reader import Position
from openmeter_plugin.spool.segment import Damage

_BUSY_SECONDS: Final = 5.0


class SpoolError(Exception):
    """A spool cannot be used; the message is one sentence for the user."""


def check_spool(spool: Path) -> None:
    """Raise SpoolError if there is no spool: an empty answer to a mistyped path would be misleading."""
    if not spool.is_dir():
        raise SpoolError(f"{spool} is not a directory")
    if not os.access(spool, os.R_OK | os.X_OK):
        raise SpoolError(f"{spool} cannot be read by this user")
    if not (spool / FILE).exists() and not queues_directory(spool).is_dir():
        raise SpoolError(f"{spool} is not a spool: it contains neither {FILE} nor queues")


@contextmanager
def reading(spool: Path) -> Iterator[sqlite3.Connection]:
    """Read the books in one transaction; raises SpoolError if they cannot be read."""
    with ExitStack() as stack:
        try:
            db = stack.enter_context(closing(_open(spool / FILE, stack)))
            db.execute("BEGIN")
            yield db
        except sqlite3.Error as error:
            remedy = "; serve, deliver or drain renames them and creates new ones" if is_damage(error) else ""
            raise SpoolError(f"the books ({FILE}) cannot be read: {error}{remedy}") from error


def _open(path: Path, stack: ExitStack) -> sqlite3.Connection:
    if not path.exists():
        return _empty()
    try:
        db = _connected(path)
    except sqlite3.OperationalError:
        if os.access(path.parent, os.W_OK):
            raise
        # SQLite reads a write-ahead log only if it can create an index in the same directory.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="openmeter-plugin-")))
        for name in (f"{FILE}-wal", FILE):
            with suppress(FileNotFoundError):
                shutil.copyfile(path.with_name(name), directory / name)
        db = _connected(directory / FILE)
    version = version_of(db)
    if version == VERSION:
        return db
    with closing(db):
        if version is None:  # it is just being created
            return _empty()
        if version > VERSION:
            raise NewerBooksError(version)
        return _migrated_copy(db, stack)


def _migrated_copy(db: sqlite3.Connection, stack: ExitStack) -> sqlite3.Connection:
    """Return a copy of an earlier version's books, which only the delivery process may migrate."""
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="openmeter-plugin-"))
    copy = connect(Path(directory) / FILE)
    try:
        db.backup(copy)
        migrate(copy)
    except BaseException:
        copy.close()
        raise
    return copy


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        version_of(db)  # reads the file
    except BaseException:
        db.close()
        raise
    return db


def _empty() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.executescript(SCHEMA)
    return db


def check_books(spool: Path) -> None:
    """Raise SpoolError if the books cannot be read."""
    with reading(spool) as db:
        db.execute("SELECT count(*) FROM counts").fetchone()


def all_counts(db: sqlite3.Connection) -> dict[str, Counts]:
    """Return each queue's counts."""
    counts: dict[str, Counts] = {}
    for queue, name, reason, value in db.execute("SELECT queue, name, reason, value FROM counts"):
        counts.setdefault(queue, Counter())[name, reason] = value
    return counts


def all_positions(db: sqlite3.Connection) -> dict[str, dict[str, Position]]:
    """Return each queue's positions by segment."""
    positions: dict[str, dict[str, Position]] = {}
    for queue, segment, accounted, delivered in db.execute(
        "SELECT queue, segment, accounted, delivered FROM positions"
    ):
        positions.setdefault(queue, {})[segment] = Position(accounted, delivered)
    return positions


def all_resent(db: sqlite3.Connection) -> dict[str, set[tuple[str, int]]]:
    """Return, by queue, (segment, offset after it) of the records that are not sent."""
    resent: dict[str, set[tuple[str, int]]] = {}
    for queue, segment, position in db.execute("SELECT queue, segment, position FROM resent"):
        resent.setdefault(queue, set()).add((segment, position))
    return resent


def all_damage(db: sqlite3.Connection) -> dict[str, set[tuple[str, Damage]]]:
    """Return, by queue, the damage that is counted, by segment."""
    damage: dict[str, set[tuple[str, Damage]]] = {}
    for queue, segment, start, stop in db.execute("SELECT queue, segment, start, stop FROM damage"):
        damage.setdefault(queue, set()).add((segment, Damage(start, stop)))
    return damage


def all_pruned(db: sqlite3.Connection) -> dict[str, Pruned]:
    """Return the totals of each queue's pruned lines."""
    rows = db.execute("SELECT queue, up_to, lines, events FROM ledger_pruned")
    return {queue: Pruned(up_to, lines, events) for queue, up_to, lines, events in rows}


def row_counts(db: sqlite3.Connection) -> tuple[int, int]:
    """Return the numbers of dead letters and of quarantined requests."""
    (dead,) = db.execute("SELECT count(*) FROM dead_letters").fetchone()
    (quarantined,) = db.execute("SELECT count(*) FROM quarantine").fetchone()
    return dead, quarantined


def damage_of_file(db: sqlite3.Connection) -> str | None:
    """Read every page of the books; returns what is wrong with the file, if anything is."""
    try:
        (health,) = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        return str(error)
    return None if health == "ok" else str(health)


def pages(
    spool: Path, table: Literal["dead_letters", "quarantine"], size: int = 500
) -> Iterator[tuple[int, bytes]]:
    """Yield (id, event or record), oldest first; raises SpoolError.

    Page by page, so that a slow reader does not keep the books from being checkpointed.
    """
    column = "event" if table == "dead_letters" else "record"
    query = f"SELECT id, {column} FROM {table} WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608 - our own names
    after = 0
    while True:
        with reading(spool) as db:
            rows = db.execute(query, (after, size)).fetchall()
        yield from ((number, bytes(content)) for number, content in rows)
        if len(rows) < size:
            return
        after = rows[-1][0]


def dead_letter_events(db: sqlite3.Connection) -> Iterator[tuple[str, bytes]]:
    """Yield (queue, event) of all dead letters."""
    yield from db.execute("SELECT queue, event FROM dead_letters")


class LedgerEntry(NamedTuple):
    """The numbers of one ledger line, or the sum of several."""

    accepted: int = 0
    delivered: int = 0
    dead_lettered: int = 0
    lost: int = 0


@dataclass(slots=True)
class LedgerSum:
    """A queue's ledger: number of lines, their sum, and the lines with events that are not delivered."""

    lines: int = 0
    total: LedgerEntry = field(default_factory=LedgerEntry)
    open: dict[LedgerKey, LedgerEntry] = field(default_factory=dict)


def ledger_sums(db: sqlite3.Connection) -> dict[str, LedgerSum]:
    """Sum each queue's ledger, in SQL: it may have millions of lines, nearly all of them delivered."""
    ledger: dict[str, LedgerSum] = {}
    for queue, lines, *numbers in db.execute(
        "SELECT queue, count(*), sum(accepted), sum(delivered), sum(dead_lettered), sum(lost) FROM ledger"
        " GROUP BY queue"
    ):
        ledger[queue] = LedgerSum(lines, LedgerEntry(*numbers))
    for queue, hour, kind, subject, *numbers in db.execute(
        "SELECT queue, hour, type, subject, accepted, delivered, dead_lettered, lost FROM ledger"
        " WHERE accepted <> delivered OR dead_lettered <> 0"
    ):
        ledger[queue].open[LedgerKey(hour, kind, subject)] = LedgerEntry(*numbers)
    return ledger


def queue_names(spool: Path, counts: dict[str, Counts]) -> list[str]:
    """Return the names of the queues in the books or on disk."""
    present: list[str] = []
    with suppress(FileNotFoundError):
        present = [path.name for path in queues_directory(spool).iterdir() if path.is_dir()]
    return sorted({*present, *counts})


def delivery_runs(spool: Path) -> bool:
    """Return whether a delivery process holds the spool's lock."""
    try:
        descriptor = os.open(spool / DELIVERY_LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def timestamp(seconds: float) -> str:
    """Return a moment as RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
