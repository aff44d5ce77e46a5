"""Kong segments that are being read: which ones are open, wait, or are read to their end.

Segments of one worker are read in their order, and workers take turns, so that the backlog of one does not
delay the others. However many files the folder holds, a bounded number is open or remembered.
"""

from __future__ import annotations

import heapq
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Final, NamedTuple

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.segments.folder import Directory
from openmeter_plugin.segments.line_format import MAX_LINE, SEGMENT_NAME, VERSION, Flaw, head_version, scan
from openmeter_plugin.spool.queue import is_unlocked

CHUNK: Final = 128 * 1024  # bytes of a segment that are read at a time
_MAX_OPEN: Final = 64
_MAX_PENDING: Final = 50_000
_MAX_WAITING: Final = 4096
_NAMES_TO_A_BEAT: Final = 10_000
_MAX_MEASURED: Final = 500
_HEAD_BYTES: Final = 1024
_DAMAGED_HEAD_BYTES: Final = 256 * 1024
"""Bytes within which a line has to be valid."""


class Lag(NamedTuple):
    """The bytes that are not read yet, and for how long the oldest of them has waited."""

    size: float
    seconds: float


class Source:
    """A segment that is open to be read. `position` is the offset up to which it is read."""

    def __init__(self, name: str, worker: str, descriptor: int, position: int) -> None:
        self.name, self.worker = name, worker
        self.descriptor = descriptor
        """Closed while the segment waits."""
        self.position = position
        self.unknown: str | None = None
        """The id of the instance that its next line names, while that is unknown."""
        self.since = os.fstat(descriptor).st_mtime
        """When it had no unread lines last."""
        self._searched = position

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def read(self) -> tuple[bytes, bool, bool]:
        """Return what follows the position, a line at least and a limited number of bytes.

        Also returns whether that is all there is now, and whether nothing will follow. Raises OSError.
        """
        final = is_unlocked(self.descriptor)  # first: what the worker wrote, it wrote before it was gone
        size = CHUNK
        while True:
            data = os.pread(self.descriptor, size, self.position)
            at_end = len(data) < size
            if at_end or size > MAX_LINE or b"\n" in data:
                return data, at_end, final and at_end
            size *= 4

    def end_of_long_line(self, *, final: bool, beat: Callable[[], None]) -> int | None:
        """Return the offset after a line that is longer than any; None if it has no end yet."""
        while True:
            beat()
            data = os.pread(self.descriptor, MAX_LINE, self._searched)
            newline = data.find(b"\n")
            if newline >= 0:
                return self._searched + newline + 1
            if not data:
                return self._searched if final else None
            self._searched += len(data)

    def moved(self, position: int) -> None:
        """Note that it is read up to this offset."""
        self.position = self._searched = position

    def unread(self) -> int:
        """Return how many bytes follow the position."""
        return max(0, os.fstat(self.descriptor).st_size - self.position)


def recognised(descriptor: int) -> bool:
    """Return whether an open file is a segment of this version, by the first valid line near its begin."""
    for size in (_HEAD_BYTES, _DAMAGED_HEAD_BYTES):
        data = os.pread(descriptor, size, 0)
        for line in scan(data, 0, final=len(data) < size):
            if not isinstance(line.content, Flaw):
                version = head_version(line.content)
                return version is None or version == VERSION
    return False


class Sources:
    """The segments of the folder that have to be read."""

    def __init__(self) -> None:
        self.open: dict[str, Source] = {}
        self.waiting: dict[str, Source] = {}
        """Segments whose next line names an unknown instance."""
        self.finished: set[str] = set()
        """Segments that are read but could not be removed."""
        self.unrecognised: set[str] = set()
        self.withheld: set[str] = set()
        """Segments of a batch that an earlier process has not finished."""
        self.complete = True
        """Whether all segments in the folder fitted into `pending` at the last look."""
        self._pending: dict[str, deque[str]] = {}  # names by worker, in order
        self._limit = RateLimit()

    @property
    def pending(self) -> Iterator[str]:
        """The names of the segments that are not open yet."""
        for names in self._pending.values():
            yield from names

    @property
    def number_pending(self) -> int:
        """How many of them there are."""
        return sum(map(len, self._pending.values()))

    def look(self, files: Directory, beat: Callable[[], None]) -> list[str]:
        """Look for segments; returns the other names in the folder, a limited number. Raises OSError.

        `beat` is called often: a folder can hold millions of files.
        """
        others: list[str] = []

        def found() -> Iterator[tuple[int, str, str]]:
            for number, name in enumerate(files.names()):
                if not number % _NAMES_TO_A_BEAT:
                    beat()
                match = SEGMENT_NAME.fullmatch(name)
                if match is None:
                    if len(others) < _MAX_PENDING:
                        others.append(name)
                elif not self._knows(name):
                    yield int(match["number"]), match["worker"], name

        names = heapq.nsmallest(_MAX_PENDING, found())
        self.complete = len(names) < _MAX_PENDING
        self._pending = {}
        for _, worker, name in names:
            self._pending.setdefault(worker, deque()).append(name)
        return others

    def fill(self, files: Directory, positions: Mapping[str, int]) -> None:
        """Open pending segments, one of each worker at a time."""
        if len(self.waiting) >= _MAX_WAITING:
            return
        workers = {source.worker for source in self.open.values()}
        for worker in [worker for worker in self._pending if worker not in workers]:
            if len(self.open) >= _MAX_OPEN:
                return
            names = self._pending[worker]
            while names and worker not in workers:
                if self._open(files, names.popleft(), worker, positions):
                    workers.add(worker)
            # The next call begins with the workers that had no turn.
            del self._pending[worker]
            if names:
                self._pending[worker] = names

    def set_waiting(self, source: Source) -> None:
        """Let a segment wait for an instance while others of its worker are read."""
        source.close()
        del self.open[source.name]
        self.waiting[source.name] = source

    def set_open(self, files: Directory, source: Source) -> None:
        """Resume a segment that has waited; raises OSError."""
        descriptor = files.open(source.name)
        del self.waiting[source.name]
        if descriptor is not None:
            source.descriptor, source.unknown = descriptor, None
            self.open[source.name] = source

    def lag(self, files: Directory) -> Lag:
        """Return what is not read yet; an estimate where very many segments are pending."""
        now = time.time()
        size = seconds = 0.0
        for source in self.open.values():
            if unread := source.unread():
                size += unread
                seconds = max(seconds, now - source.since)
        for source in self.waiting.values():
            seconds = max(seconds, now - source.since)
        names = list(islice(self.pending, _MAX_MEASURED))
        statuses = [status for name in names if (status := files.status(name)) is not None]
        if statuses:
            size += sum(status.st_size for status in statuses) * self.number_pending / len(names)
            seconds = max(seconds, now - min(status.st_mtime for status in statuses))
        return Lag(size, seconds)

    def close(self) -> None:
        """Close all files and forget them."""
        for source in self.open.values():
            source.close()
        self.open, self.waiting, self._pending = {}, {}, {}
        self.finished.clear()
        self.unrecognised.clear()

    def _knows(self, name: str) -> bool:
        known = (self.open, self.waiting, self.finished, self.unrecognised, self.withheld)
        return any(name in names for names in known)

    def _open(self, files: Directory, name: str, worker: str, positions: Mapping[str, int]) -> bool:
        try:
            descriptor = files.open(name)
            if descriptor is None:
                if files.status(name) is not None:
                    self._refuse(name, "it is no regular file with a single name")
                return False
            if recognised(descriptor):
                self.open[name] = Source(name, worker, descriptor, positions.get(name, 0))
                return True
            os.close(descriptor)
            self._refuse(name, "no line of it is valid, or it has a later version")
        except OSError as error:
            self._refuse(name, error.strerror or str(error))
        return False

    def _refuse(self, name: str, reason: str) -> None:
        """Leave a file alone: it is looked at again after a while."""
        self.unrecognised.add(name)
        if self._limit.passes():
            get_logger().error(
                "kong_segment_unrecognised",
                segment=name,
                reason=reason,
                consequence="the file is left alone",
                remedy="find out who put it there; with a later version, install that version again",
            )
