"""What a spool holds, one JSON document a line: the CloudEvents as they are or were sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.backlog import QueueFiles, events_of, read_segment
from openmeter_plugin.books.read_models import (
    SpoolError,
    all_counts,
    all_positions,
    all_resent,
    queue_names,
    reading,
)
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.segment import QUARANTINED, Damage, Record

_PAGE: Final = 500


class _Trouble:
    """Reads segments, and keeps what goes wrong with one for the end: the others are wanted all the same."""

    def __init__(self) -> None:
        self._unreadable: list[str] = []

    def items(self, path: Path, start: int) -> Iterator[Record | Damage]:
        """Yield what can be read of a segment."""
        try:
            yield from read_segment(path, start)
        except OSError as error:
            self._unreadable.append(f"{path.name} ({error.strerror})")

    def tell(self) -> None:
        """Raise SpoolError where something could not be read."""
        if self._unreadable:
            names = ", ".join(self._unreadable)
            raise SpoolError(f"all but what is in segments that cannot be read: {names}")


def dead_letters(spool: Path) -> Iterator[bytes]:
    """Yield the events of the dead letters, oldest first; raises SpoolError."""
    for _, event in _rows(spool, "SELECT id, event FROM dead_letters WHERE id > ? ORDER BY id LIMIT ?"):
        yield event


def quarantine(spool: Path) -> Iterator[bytes]:
    """Yield the records that were set aside: what was kept of the request, with the reason.

    The id is what it can be replayed by; those that are not accounted for yet have none.
    """
    with reading(spool) as db:
        positions = all_positions(db)
        queues = queue_names(spool, all_counts(db))
    for number, record in _rows(spool, "SELECT id, record FROM quarantine WHERE id > ? ORDER BY id LIMIT ?"):
        yield orjson.dumps({"id": number} | orjson.loads(record))
    trouble = _Trouble()
    for queue in queues:
        files = QueueFiles.of(spool, queue, positions.get(queue, {}))
        for name in files.sizes:
            for item in trouble.items(files.directory / name, files.position(name).accounted):
                if isinstance(item, Record) and item.kind == QUARANTINED:
                    yield item.body
    trouble.tell()


def waiting(spool: Path) -> Iterator[bytes]:
    """Yield the events that are not delivered yet."""
    for event in _events(spool, retained=False):
        yield orjson.dumps(event)


def everything(spool: Path) -> Iterator[bytes]:
    """Yield every event that is still there, each once: waiting, retained after delivery, dead letters."""
    dead: set[tuple[Any, Any]] = set()
    for event in dead_letters(spool):
        parsed = orjson.loads(event)
        dead.add((parsed.get("source"), parsed.get("id")))
        yield event
    for found in _events(spool, retained=True):
        if (found.get("source"), found.get("id")) not in dead:
            yield orjson.dumps(found)


def _rows(spool: Path, query: str) -> Iterator[tuple[int, bytes]]:
    """Yield page by page: whoever reads slowly must not keep the books from being checkpointed."""
    after = 0
    while True:
        with reading(spool) as db:
            rows = db.execute(query, (after, _PAGE)).fetchall()
        yield from ((number, bytes(content)) for number, content in rows)
        if len(rows) < _PAGE:
            return
        after = rows[-1][0]


def _events(spool: Path, *, retained: bool) -> Iterator[dict[str, Any]]:
    with reading(spool) as db:
        positions, resent = all_positions(db), all_resent(db)
        queues = queue_names(spool, all_counts(db))
    trouble = _Trouble()
    for queue in queues:
        if queue == QUARANTINE:
            continue
        files = QueueFiles.of(spool, queue, positions.get(queue, {}), resent.get(queue, ()))
        for name in files.sizes:
            start = 0 if retained else files.position(name).delivered
            for item in trouble.items(files.directory / name, start):
                if files.is_sent(name, item):
                    yield from events_of(item)
    trouble.tell()
