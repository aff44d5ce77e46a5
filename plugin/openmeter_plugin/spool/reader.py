"""Reading a queue's segments, from where they were read to last, also while they are written."""

from __future__ import annotations

import fcntl
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from openmeter_plugin.log import get_logger
from openmeter_plugin.spool.segment import (
    EVENTS,
    HEAD_SIZE,
    MAGIC,
    MARKER,
    MAX_PAYLOAD,
    SUFFIX,
    Damage,
    Record,
    scan,
)

# MERGED: A piece of a segment, its usage column by column, so that a batch and its counts are slices of it.
#
# Nearly all records are usage with a summary. An object for each of them would cost delivery more than
# posting
# them; here reading, counting and joining take a few calls for each piece.

_PREFIX: Final = struct.Struct("<4sIIcBHH")
"""Marker, length and checksum of a record; of usage also its kind, the number of events, the length of the
summary and, in that, of the first event's id."""

_EVENTS_AT: Final = 4  # in a payload of usage without a summary
_ID_AT: Final = 6  # in one with a summary

Other = Record | Damage


@dataclass(slots=True)
class Chunk:
    """What lies between two offsets of a segment; the columns have a row for each record of usage."""

    start: int
    end: int
    ends: list[int] = field(default_factory=list)
    """The offset behind each."""
    counts: list[int] = field(default_factory=list)
    """How many events each has."""
    events: list[bytes] = field(default_factory=list)
    """JSON objects separated by commas."""
    ids: list[bytes] = field(default_factory=list)
    """The id of its first event; empty where there is no summary."""
    rests: list[bytes] = field(default_factory=list)
    """What follows the id in the summary, by which usage is counted; empty where there is no summary."""
    others: list[Other] = field(default_factory=list)
    """What is no usage, or cannot be read."""

    @property
    def records(self) -> int:
        """How many records it has, each damage taken for one."""
        return len(self.ends) + len(self.others)

    def record(self, row: int) -> Record:
        """Return a record of usage without its summary."""
        return Record(EVENTS, bytes((self.counts[row], 0, 0)) + self.events[row], self.ends[row])


def read_chunk(data: bytes, base: int, *, final: bool) -> Chunk:
    """Return what `data`, which begins at offset `base` of a segment at a record's start, holds.

    The same as `scan` finds in it, which says what `final` means and does what is not usual.
    """
    chunk = Chunk(base, base)
    at = 0
    while at < len(data):
        at = _read_records(chunk, data, at, base)
        if at == len(data):
            break
        unusual = next(scan(data[at:], base + at, final=final), None)
        if unusual is None:
            break
        chunk.others.append(unusual)
        at = unusual.end - base
    chunk.end = base + at
    return chunk


def _read_records(chunk: Chunk, data: bytes, at: int, base: int) -> int:
    """Add the records from `at` on; returns where the first is that is not valid, or too short to tell."""
    ends, counts, events, ids, rests = chunk.ends, chunk.counts, chunk.events, chunk.ids, chunk.rests
    unpack, crc32, view = _PREFIX.unpack_from, zlib.crc32, memoryview(data)
    size = len(data)
    last = size - _PREFIX.size
    while at <= last:
        marker, length, checksum, kind, count, summary, id_size = unpack(data, at)
        start = at + HEAD_SIZE
        stop = start + length
        if marker != MARKER or not 0 < length <= MAX_PAYLOAD or stop > size:
            break
        if crc32(view[start:stop]) != checksum:
            break
        behind = start + _EVENTS_AT + summary
        rest = start + _ID_AT + id_size if summary else behind
        if kind == EVENTS and rest <= behind < stop:
            ends.append(base + stop)
            counts.append(count)
            events.append(data[behind:stop])
            ids.append(data[start + _ID_AT : rest] if summary else b"")
            rests.append(data[rest:behind])
        else:
            chunk.others.append(Record(kind, data[start + 1 : stop], base + stop))
        at = stop
    return at


UNREADABLE: Final = ".unreadable"
"""Follows the name of a segment that was set aside. Whoever takes it away again has it delivered after
the next start, from where delivery stood."""

_CHUNK: Final = 256 * 1024  # bytes read at once: so many that the processor still has them when they are sent
_MAX_ADOPTED: Final = 2 * 1024 * 1024
_TRIES: Final = 8  # to read a segment, before it is set aside
_TRY_AFTER: Final = 1.0  # seconds between two of them


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
        self.row = 0
        """The first row of the next chunk that is not taken."""
        self._read_to = self.position
        self._chunks: deque[Chunk] = deque()
        self._descriptor: int | None = None

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def chunk(self) -> Chunk | None:
        """Return the chunk that is not wholly taken yet, None where there is none; raises OSError."""
        if not self._chunks:
            self._read()
        return self._chunks[0] if self._chunks else None

    def take(self) -> Chunk:
        """Take that chunk, or what is left of it."""
        chunk = self._chunks.popleft()
        self.position, self.row = chunk.end, 0
        return chunk

    def take_rows(self, row: int, position: int | None = None) -> None:
        """Take its usage up to, not including, a row, and what else there is up to the position."""
        self.position, self.row = position or self._chunks[0].ends[row - 1], row

    def adopt(self, chunks: list[Chunk]) -> None:
        """Take what somebody else has read as read, where it comes next and has room."""
        if self._read_to == chunks[0].start and self._read_to - self.position < _MAX_ADOPTED:
            self._chunks.extend(chunks)
            self._read_to = chunks[-1].end

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
            chunk = read_chunk(data, self._read_to, final=writer_gone and at_end)
            if chunk.end > chunk.start:
                self._chunks.append(chunk)
                self._read_to = chunk.end
            if at_end and writer_gone:
                self.exhausted = True
                self.close()
            if self._chunks or at_end:
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
        self._segments: dict[str, SegmentReader] = {}  # oldest first
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

    @property
    def known(self) -> Collection[SegmentReader]:
        """The readers of the segments that were found and are not done with, oldest first."""
        return self._segments.values()

    def segments(self) -> list[SegmentReader]:
        """Look for new segments and return the readers of all that are not done with, oldest first."""
        self.find()
        return list(self.known)

    def find(self) -> list[SegmentReader]:
        """Look for new segments and return their readers, oldest first."""
        names = segment_names(self.directory)
        new = sorted(name for name in names if name not in self._segments and name not in self._done)
        for name in new:
            path = self.directory / name
            self._segments[name] = SegmentReader(path, self._positions.pop(name, 0))
        if new and next(reversed(self._segments)) != max(self._segments):
            self._segments = dict(sorted(self._segments.items()))
        return [self._segments[name] for name in new]

    def chunk(self, segment: SegmentReader) -> Chunk | None:
        """Return a segment's next chunk; of one that cannot be read none, so that the others go on."""
        if segment.retry_at and time.monotonic() < segment.retry_at:
            return None
        try:
            chunk = segment.chunk()
        except OSError as error:
            segment.failures += 1
            segment.retry_at = time.monotonic() + _TRY_AFTER
            get_logger().error("segment_unreadable", segment=segment.name, reason=error.strerror)
            if segment.failures >= _TRIES:
                self.unreadable.add(segment.name)
            return None
        segment.failures, segment.retry_at = 0, 0.0
        return chunk

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
