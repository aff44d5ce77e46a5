"""Reading a queue's segments, from where they were read to last, also while they are written."""

from __future__ import annotations

import fcntl
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from openmeter_plugin.log import get_logger
from openmeter_plugin.spool.segment import MAGIC, MAX_PAYLOAD, SUFFIX, Damage, Record, scan

UNREADABLE: Final = ".unreadable"
"""Follows the name of a segment that was set aside. Whoever takes it away again has it delivered after
the next start, from where delivery stood."""

_CHUNK: Final = 1024 * 1024  # bytes read at once
_MOST_ADOPTED: Final = 8 * _CHUNK
_TRIES: Final = 8  # to read a segment, before it is set aside
_TRY_AFTER: Final = 1.0  # seconds between two of them

Item = Record | Damage


class SegmentReader:
    """Reads one segment from an offset on."""

    def __init__(self, path: Path, position: int) -> None:
        self.path = path
        self.name = path.name
        self.position = max(position, len(MAGIC))
        """The offset behind what was taken."""
        self.exhausted = False
        """Whether everything is read, if not taken, and nothing will ever follow."""
        self.failures = 0
        self.retry_at = 0.0
        self._read_to = self.position
        self._items: deque[Item] = deque()
        self._descriptor: int | None = None

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def items(self) -> deque[Item]:
        """Return what is read and not taken; empty where there is nothing yet. Raises OSError."""
        if not self._items:
            self._read()
        return self._items

    def peek(self) -> Item | None:
        """Return the next item without taking it, or None where there is none yet; raises OSError."""
        items = self.items()
        return items[0] if items else None

    def take(self) -> None:
        """Take the item that `peek` returned."""
        self.position = self._items.popleft().end

    def take_all(self) -> list[Item]:
        """Take what is read."""
        items = list(self._items)
        self._items.clear()
        if items:
            self.position = items[-1].end
        return items

    def adopt(self, start: int, items: list[Item]) -> None:
        """Take what somebody else has read from `start` on as read, where it comes next and has room."""
        if self._read_to == start and self._read_to - self.position < _MOST_ADOPTED:
            self._items.extend(items)
            self._read_to = items[-1].end

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
            data = os.pread(self._descriptor, size, self._read_to)
            at_end = len(data) < size
            self._items.extend(scan(data, self._read_to, final=writer_gone and at_end))
            if self._items:
                self._read_to = self._items[-1].end
            if at_end and writer_gone:
                self.exhausted = True
                self.close()
            if self._items or at_end:
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
    """Reads all segments of a queue, oldest first."""

    def __init__(self, directory: Path, positions: dict[str, int]) -> None:
        self.directory = directory
        self._positions = positions
        self._segments: dict[str, SegmentReader] = {}
        self._done: set[str] = set()
        self.unreadable: set[str] = set()
        """The segments that could not be read however often it was tried: to be set aside."""

    @property
    def trouble(self) -> bool:
        """Whether some segment cannot be read at the moment."""
        return any(segment.failures for segment in self._segments.values())

    def close(self) -> None:
        """Close the files."""
        for segment in self._segments.values():
            segment.close()
        self._segments = {}

    def segments(self) -> list[SegmentReader]:
        """Return the readers of the segments that are there and not done with, oldest first."""
        for name in segment_names(self.directory):
            if name not in self._segments and name not in self._done:
                path = self.directory / name
                self._segments[name] = SegmentReader(path, self._positions.pop(name, 0))
        return [self._segments[name] for name in sorted(self._segments)]

    def items(self, segment: SegmentReader) -> deque[Item]:
        """Return what is there of a segment; of one that cannot be read nothing, so the others go on."""
        if segment.retry_at and time.monotonic() < segment.retry_at:
            return deque()
        try:
            items = segment.items()
        except OSError as error:
            segment.failures += 1
            segment.retry_at = time.monotonic() + _TRY_AFTER
            get_logger().error("segment_unreadable", segment=segment.name, reason=error.strerror)
            if segment.failures >= _TRIES:
                self.unreadable.add(segment.name)
            return deque()
        segment.failures, segment.retry_at = 0, 0.0
        return items

    def start_over(self, name: str, position: int) -> None:
        """Read a segment again from an offset on."""
        self._segments.pop(name).close()
        self._positions[name] = position

    def done(self, name: str) -> None:
        """Read no more of a segment, although its file may stay."""
        self._done.add(name)
        self.unreadable.discard(name)
        if name in self._segments:
            self._segments.pop(name).close()

    def forget(self, name: str) -> None:
        """Forget a segment whose file is removed."""
        self._done.discard(name)


def segment_names(directory: Path) -> list[str]:
    """Return the names of the segment files in a queue's directory, in no order."""
    try:
        return [name for name in os.listdir(directory) if name.endswith(SUFFIX)]  # noqa: PTH208 - no paths
    except (FileNotFoundError, NotADirectoryError):
        return []


def segment_paths(directory: Path) -> Iterator[Path]:
    """Yield the segment files of a queue's directory, in no order."""
    yield from (directory / name for name in segment_names(directory))
