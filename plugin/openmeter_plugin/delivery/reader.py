"""Reading a queue: its segments, oldest first, from where each is done with, as batches."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

from openmeter_plugin.delivery.state import Counts
from openmeter_plugin.log import get_logger
from openmeter_plugin.spool.segment import (
    EVENTS,
    LOST,
    MAGIC,
    MAX_PAYLOAD,
    SKIPPED,
    SUFFIX,
    Damage,
    Record,
    scan,
)

_CHUNK: Final = 1024 * 1024  # bytes read at once
_MOST_REQUESTS: Final = 20_000  # of a batch, so that a long stretch of skips is committed in pieces


@dataclass(slots=True)
class Batch:
    """Consecutive outcomes of a queue: events to send, and how far the segments are done with then."""

    events: list[bytes] = field(default_factory=list)
    event_count: int = 0
    size: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counter)

    def add(self, segment: str, item: Record | Damage) -> None:
        """Add what was read from a segment."""
        self.positions[segment] = item.end
        if isinstance(item, Damage):
            self.counts["damaged_bytes", ""] += item.end - item.start
            return
        if item.kind == LOST:
            loss = orjson.loads(item.body)
            self.counts["lost", loss["reason"]] += loss["count"]
            return
        self.counts["requests", ""] += 1
        if item.kind == EVENTS:
            self.events.append(item.events)
            self.event_count += item.event_count
            self.size += len(item.events)
            self.counts["events", ""] += item.event_count
        elif item.kind == SKIPPED:
            self.counts["skipped", item.body.decode("utf-8", "replace")] += 1
        else:
            self.counts["quarantined", ""] += 1


class SegmentReader:
    """Reads one segment from an offset on, also while it is written."""

    def __init__(self, path: Path, position: int) -> None:
        self.path = path
        self.name = path.name
        self._position = max(position, len(MAGIC))
        self._items: deque[Record | Damage] = deque()
        self._descriptor: int | None = None
        self.exhausted = False
        """Whether everything was read and nothing will ever follow."""

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def peek(self) -> Record | Damage | None:
        """Return the next item without taking it, or None where there is none yet."""
        if not self._items:
            self._read()
        return self._items[0] if self._items else None

    def take(self) -> None:
        """Take the item that `peek` returned."""
        self._items.popleft()

    def _read(self) -> None:
        """Read on; the file is open only while there may be more in it, since a backlog has many files."""
        if self.exhausted:
            return
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        size = _CHUNK
        while True:
            # Asked before reading: whatever the writer wrote, it wrote before it was gone.
            writer_gone = _writer_gone(self._descriptor)
            data = os.pread(self._descriptor, size, self._position)
            at_end = len(data) < size
            for item in scan(data, self._position, final=writer_gone and at_end):
                self._items.append(item)
                self._position = item.end
            if self._items:
                return
            if at_end:
                if writer_gone:
                    self.exhausted = True
                    self.close()
                return
            size = min(size * 4, MAX_PAYLOAD * 2)


def _writer_gone(descriptor: int) -> bool:
    """Tell whether no process appends to the segment: its writer's exclusive lock is free."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


class QueueReader:
    """Reads all segments of a queue; those that are done with are removed in whole files."""

    def __init__(self, directory: Path, cursors: dict[str, int]) -> None:
        self._directory = directory
        self._cursors = cursors
        self._segments: dict[str, SegmentReader] = {}
        self._log = get_logger()

    def close(self) -> None:
        """Close the files."""
        for segment in self._segments.values():
            segment.close()
        self._segments = {}

    def next_batch(self, max_events: int, max_bytes: int) -> Batch:
        """Return what is there to deliver, within the limits unless one record alone is beyond them."""
        batch = Batch()
        self.extend(batch, max_events, max_bytes)
        return batch

    def extend(self, batch: Batch, max_events: int, max_bytes: int) -> None:
        """Add to a batch what there is room for."""
        self._look_for_segments()
        for segment in self._ordered():
            while (item := segment.peek()) is not None:
                if isinstance(item, Record) and item.kind == EVENTS and batch.events:
                    too_many = batch.event_count + item.event_count > max_events
                    if too_many or batch.size + len(item.events) > max_bytes:
                        return
                if isinstance(item, Damage):
                    self._log.error("spool_damaged", segment=segment.name, start=item.start, end=item.end)
                batch.add(segment.name, item)
                segment.take()
                if batch.counts["requests", ""] >= _MOST_REQUESTS:
                    return

    def remove_finished(self) -> list[str]:
        """Remove the segments of which everything was read, and so committed, and return their names."""
        finished = [s for s in self._ordered() if s.exhausted]
        for segment in finished:
            segment.path.unlink(missing_ok=True)
            segment.close()
            del self._segments[segment.name]
        return [segment.name for segment in finished]

    def _ordered(self) -> list[SegmentReader]:
        return [self._segments[name] for name in sorted(self._segments)]

    def _look_for_segments(self) -> None:
        for path in self._paths():
            if path.name in self._segments:
                continue
            self._segments[path.name] = SegmentReader(path, self._cursors.pop(path.name, 0))

    def _paths(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError):
            yield from (path for path in self._directory.iterdir() if path.suffix == SUFFIX)
