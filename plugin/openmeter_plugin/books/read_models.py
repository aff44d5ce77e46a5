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
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from openmeter_plugin.books.database import FILE, SCHEMA, is_damage
from openmeter_plugin.books.pruning import Pruned
from openmeter_plugin.books.store import Counts, Position
from openmeter_plugin.spool.destination import DELIVERY_LOCK, queues_directory

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
        return _connected(path)
    except sqlite3.OperationalError:
        if os.access(path.parent, os.W_OK):
            raise
    # SQLite reads a write-ahead log only if it can create an index in the same directory.
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="openmeter-plugin-")))
    for name in (f"{FILE}-wal", FILE):
        with suppress(FileNotFoundError):
            shutil.copyfile(path.with_name(name), directory / name)
    return _connected(directory / FILE)


def _connected(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema WHERE type = 'table'").fetchone()
    except BaseException:
        db.close()
        raise
    if not tables:  # it is just being created
        db.close()
        return _empty()
    return db


def _empty() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    db.executescript(SCHEMA)
    return db


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


def all_pruned(db: sqlite3.Connection) -> dict[str, Pruned]:
    """Return the totals of each queue's pruned lines."""
    rows = db.execute("SELECT queue, up_to, lines, events FROM ledger_pruned")
    return {queue: Pruned(up_to, lines, events) for queue, up_to, lines, events in rows}


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
