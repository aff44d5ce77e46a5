"""What the segments say beside the books: what is not accounted for yet, and what waits."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.ledger_lines import add_lines, summary_of
from openmeter_plugin.books.models import NotAccounted, OldestWaiting
from openmeter_plugin.books.store import Lines, Position
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory
from openmeter_plugin.spool.segment import EVENTS, LOST, MAGIC, SUFFIX, Damage, Record, scan

_FIRST_LOOK: Final = 64 * 1024  # bytes in which a segment's next event is looked for before all is read
_CHUNK: Final = 1024 * 1024  # bytes read at once
NOWHERE: Final = Position(0, 0)


@dataclass(slots=True)
class QueueFiles:
    """The segment files of a queue, with how far the books are in each."""

    directory: Path
    positions: Mapping[str, Position]
    resent: Collection[tuple[str, int]] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        spool: Path,
        queue: str,
        positions: Mapping[str, Position],
        resent: Collection[tuple[str, int]] = (),
    ) -> QueueFiles:
        """Look at a queue's directory. After the books: what has come since is seen as not accounted."""
        files = cls(queues_directory(spool) / queue, positions, resent)
        for path in sorted(files.directory.glob(f"*{SUFFIX}")):
            with suppress(FileNotFoundError):
                files.sizes[path.name] = path.stat().st_size
        return files

    def position(self, segment: str) -> Position:
        """Return how far the books are in a segment."""
        return self.positions.get(segment, NOWHERE)

    def is_sent(self, segment: str, item: Record | Damage) -> bool:
        """Tell whether the item is events that go to the metering API."""
        return isinstance(item, Record) and item.kind == EVENTS and (segment, item.end) not in self.resent


def read(path: Path, start: int = 0) -> Iterator[Record | Damage]:
    """Yield what a segment holds from an offset on, as far as it is complete; nothing where it is gone."""
    at, size = max(start, len(MAGIC)), _CHUNK
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        while True:
            # Asked before reading: whatever the writer wrote, it wrote before it was gone.
            final = _writer_gone(file.fileno())
            data = os.pread(file.fileno(), size, at)
            at_end = len(data) < size
            before = at
            for item in scan(data, at, final=final and at_end):
                yield item
                at = item.end
            if at_end:
                return
            size = _CHUNK if at > before else size * 4  # a record larger than what was read


def _writer_gone(descriptor: int) -> bool:
    """Tell whether no process appends to the segment: its writer's exclusive lock is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


@dataclass(slots=True)
class Unaccounted:
    """What lies behind the accounted positions; `unreadable` are the segments of which that is not known."""

    requests: int = 0
    events: int = 0
    lost: int = 0
    lines: Lines = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def model(self) -> NotAccounted:
        """Return it as it is told."""
        return NotAccounted(requests=self.requests, events=self.events, lost=self.lost)

    def add(self, record: Record) -> None:
        """Count a record."""
        if record.kind == LOST:
            with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                self.lost += int(orjson.loads(record.body)["count"])
            return
        self.requests += 1
        if record.kind == EVENTS and (summary := summary_of(record)) is not None:
            self.events += len(summary.types)
            add_lines(self.lines, summary)


def unaccounted(files: QueueFiles) -> Unaccounted:
    """Count what was written and is not in the books yet."""
    found = Unaccounted()
    for name, size in files.sizes.items():
        accounted = files.position(name).accounted
        if size > max(accounted, len(MAGIC)):
            try:
                for item in read(files.directory / name, accounted):
                    if isinstance(item, Record):
                        found.add(item)
            except OSError:
                found.unreadable.append(name)
    return found


def oldest_waiting(files: QueueFiles, now: datetime | None = None) -> OldestWaiting | None:
    """Return the oldest of the events that are next in their segments; each segment is in order."""
    if files.directory.name == QUARANTINE:
        return None
    times = [
        time
        for name, size in files.sizes.items()
        if size > max(files.position(name).delivered, len(MAGIC))
        if (time := _next_event_time(files, name)) is not None
    ]
    if not times:
        return None
    oldest = min(times)
    age = 0.0
    with suppress(ValueError):
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(oldest)).total_seconds()
    return OldestWaiting(time=oldest, age_seconds=round(max(age, 0.0), 3))


def _next_event_time(files: QueueFiles, name: str) -> str | None:
    path, start = files.directory / name, max(files.position(name).delivered, len(MAGIC))
    try:
        return _time_behind(files, path, start)
    except OSError:
        return None


def _time_behind(files: QueueFiles, path: Path, start: int) -> str | None:
    name = path.name
    with path.open("rb") as file:
        file.seek(start)
        head = file.read(_FIRST_LOOK)
    for item in scan(head, start, final=False):
        if files.is_sent(name, item):
            return _event_time(item)
    if len(head) < _FIRST_LOOK:
        return None
    return next((_event_time(item) for item in read(path, start) if files.is_sent(name, item)), None)


def _event_time(item: Record | Damage) -> str | None:
    events = events_of(item)
    return str(events[0].get("time", "")) if events else None


def events_of(item: Record | Damage) -> list[dict[str, Any]]:
    """Return the events of a record; none of what is no usage, or unreadable."""
    if not isinstance(item, Record) or item.kind != EVENTS:
        return []
    try:
        events = orjson.loads(b"[" + item.events + b"]")
    except orjson.JSONDecodeError:
        return []
    return [event for event in events if isinstance(event, dict)]
