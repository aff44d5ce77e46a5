"""Export of a spool as JSON lines: its CloudEvents, exactly as they are sent, and its quarantine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.read_models import (
    SpoolError,
    all_counts,
    all_positions,
    all_resent,
    pages,
    queue_names,
    reading,
)
from openmeter_plugin.books.status import QueueFiles, events_of
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.reader import read_segment
from openmeter_plugin.spool.segment import QUARANTINED, Damage, Record

_PAGE_SIZE: Final = 500


class _SegmentExport:
    """Reads segments and reports unreadable ones at the end, so that the others are still exported."""

    def __init__(self) -> None:
        self._unreadable: list[str] = []

    def items(self, path: Path, start: int) -> Iterator[Record | Damage]:
        """Yield the readable items of a segment."""
        try:
            yield from read_segment(path, start)
        except OSError as error:
            self._unreadable.append(f"{path.name} ({error.strerror})")

    def check(self) -> None:
        """Raise SpoolError if a segment could not be read."""
        if self._unreadable:
            names = ", ".join(self._unreadable)
            raise SpoolError(f"exported without the segments that cannot be read: {names}")


def dead_letters(spool: Path, *, page_size: int = _PAGE_SIZE) -> Iterator[bytes]:
    """Yield the events of the dead letters, oldest first; raises SpoolError."""
    for _, event in pages(spool, "dead_letters", page_size):
        yield event


def quarantine(spool: Path) -> Iterator[bytes]:
    """Yield the records in quarantine: the redacted request with its reason.

    `id` selects a record for a replay. Records that are not accounted for yet have none.
    """
    with reading(spool) as db:
        positions = all_positions(db)
        queues = queue_names(spool, all_counts(db))
    for number, record in pages(spool, "quarantine"):
        yield orjson.dumps({"id": number} | orjson.loads(record))
    segments = _SegmentExport()
    for queue in queues:
        files = QueueFiles.of(spool, queue, positions.get(queue, {}))
        for name in files.sizes:
            for item in segments.items(files.directory / name, files.position(name).accounted):
                if isinstance(item, Record) and item.kind == QUARANTINED:
                    yield item.body
    segments.check()


def waiting(spool: Path) -> Iterator[bytes]:
    """Yield the events that are not delivered yet."""
    for event in _events(spool, retained=False):
        yield orjson.dumps(event)


def all_events(spool: Path) -> Iterator[bytes]:
    """Yield every event in the spool, each once: waiting, retained after delivery, dead letters."""
    dead: set[tuple[Any, Any]] = set()
    for event in dead_letters(spool):
        parsed = orjson.loads(event)
        dead.add((parsed.get("source"), parsed.get("id")))
        yield event
    for found in _events(spool, retained=True):
        if (found.get("source"), found.get("id")) not in dead:
            yield orjson.dumps(found)


def _events(spool: Path, *, retained: bool) -> Iterator[dict[str, Any]]:
    with reading(spool) as db:
        positions, resent = all_positions(db), all_resent(db)
        queues = queue_names(spool, all_counts(db))
    segments = _SegmentExport()
    for queue in queues:
        if queue == QUARANTINE:
            continue
        files = QueueFiles.of(spool, queue, positions.get(queue, {}), resent.get(queue, ()))
        for name in files.sizes:
            start = 0 if retained else files.position(name).delivered
            for item in segments.items(files.directory / name, start):
                if files.is_sent(name, item):
                    yield from events_of(item)
    segments.check()
