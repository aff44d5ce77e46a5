"""Reader of a queue's segments: resumes at stored positions and follows segments that still grow.

Segments are read in chunks, which hold usage column by column, so that a batch and its counts are slices.
Nearly all records are usage with a summary. An object for each record would cost delivery more than the
POSTs do; with columns, reading, counting and joining take a few calls for each chunk.
"""

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

_PREFIX: Final = struct.Struct("<4sIIcBHH")
"""Marker, length and checksum of a record; for usage also the kind, the number of events, the length of the
summary and, within that, the length of the first event's id."""

_EVENTS_AT: Final = 4  # in a payload of usage without a summary
_ID_AT: Final = 6  # in one with a summary

Other = Record | Damage


@dataclass(slots=True)
class Chunk:
    """The records between two offsets of a segment; the columns have one row for each usage record."""

    start: int
    end: int
    ends: list[int] = field(default_factory=list)
    """The offset after each record."""
    counts: list[int] = field(default_factory=list)
    """How many events each record has."""
    events: list[bytes] = field(default_factory=list)
    """The events of each record: JSON objects separated by commas."""
    ids: list[bytes] = field(default_factory=list)
    """The id of each record's first event; empty without a summary."""
    usage_keys: list[bytes] = field(default_factory=list)
    """The part of each summary after the id, equal for records counted alike; empty without a summary."""
    others: list[Other] = field(default_factory=list)
    """Records that are not usage, and damage."""

    @property
    def records(self) -> int:
        """The number of records; each damaged span counts as one."""
        return len(self.ends) + len(self.others)

    def record(self, row: int) -> Record:
        """Return a row as a record without its summary."""
        return Record(EVENTS, bytes((self.counts[row], 0, 0)) + self.events[row], self.ends[row])


def read_chunk(data: bytes, base: int, *, final: bool) -> Chunk:
    """Return the records in `data`, which starts at a record at offset `base` of a segment.

    Finds the same as `scan`, which explains `final` and handles everything but valid records.
    """
    chunk = Chunk(base, base)
    at = 0
    while at < len(data):
        at = _read_records(chunk, data, at, base)
        if at == len(data):
            break
        other = next(scan(data[at:], base + at, final=final), None)
        if other is None:
            break
        chunk.others.append(other)
        at = other.end - base
    chunk.end = base + at
    return chunk


def _read_records(chunk: Chunk, data: bytes, at: int, base: int) -> int:
    """Add the valid records from `at` on; returns the offset of the first that is invalid or incomplete."""
    ends, counts, events = chunk.ends, chunk.counts, chunk.events
    ids, usage_keys = chunk.ids, chunk.usage_keys
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
        events_at = start + _EVENTS_AT + summary
        key_at = start + _ID_AT + id_size if summary else events_at
        if kind == EVENTS and key_at <= events_at < stop:
            ends.append(base + stop)
            counts.append(count)
            events.append(data[events_at:stop])
            ids.append(data[start + _ID_AT : key_at] if summary else b"")
            usage_keys.append(data[key_at:events_at])
        else:
            chunk.others.append(Record(kind, data[start + 1 : stop], base + stop))
        at = stop
    return at


UNREADABLE: Final = ".unreadable"
"""Suffix of a segment that could not be read. If you remove it, the next start resumes its delivery."""

_READ_SIZE: Final = 256 * 1024  # bytes per read: still in the processor's cache when they are sent
_MAX_REUSED: Final = 2 * 1024 * 1024  # bytes of chunks that one reader holds for another
_MAX_TRIES: Final = 8  # reads of a segment before it counts as unreadable
_RETRY_SECONDS: Final = 1.0  # between two tries


class SegmentReader:
    """Reads one segment from an offset onwards."""

    def __init__(self, path: Path, position: int) -> None:
        self.path = path
        self.name = path.name
        self.position = max(position, len(MAGIC))
        """The offset after what was consumed."""
        self.exhausted = False
        """Whether everything is read, though perhaps not consumed, and nothing will ever follow."""
        self.failures = 0
        self.retry_at = 0.0
        self.row = 0
        """The first row of the next chunk that is not consumed."""
        self._read_end = self.position
        self._chunks: deque[Chunk] = deque()
        self._descriptor: int | None = None

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def chunk(self) -> Chunk | None:
        """Return the chunk that is not entirely consumed yet, or None; raises OSError."""
        if not self._chunks:
            self._read()
        return self._chunks[0] if self._chunks else None

    def consume(self) -> Chunk:
        """Consume that chunk, or the rest of it."""
        chunk = self._chunks.popleft()
        self.position, self.row = chunk.end, 0
        return chunk

    def consume_rows(self, row: int, position: int | None = None) -> None:
        """Consume its usage up to, not including, a row, and other records up to the position."""
        self.position, self.row = position or self._chunks[0].ends[row - 1], row

    def reuse(self, chunks: list[Chunk]) -> None:
        """Add chunks that another reader has read, if they come next and there is room."""
        if self._read_end == chunks[0].start and self._read_end - self.position < _MAX_REUSED:
            self._chunks.extend(chunks)
            self._read_end = chunks[-1].end

    def _read(self) -> None:
        """Read more; the file is open only while it may have more, because a backlog has many files."""
        if self.exhausted:
            return
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        size = _READ_SIZE
        while True:
            # Check before reading: whatever the writer wrote, it wrote before it was gone.
            final = writer_gone(self._descriptor)
            data = os.pread(self._descriptor, size, self._read_end)
            at_end = len(data) < size
            chunk = read_chunk(data, self._read_end, final=final and at_end)
            if chunk.end > chunk.start:
                self._chunks.append(chunk)
                self._read_end = chunk.end
            if at_end and final:
                self.exhausted = True
                self.close()
            if self._chunks or at_end:
                return
            size = min(size * 4, MAX_PAYLOAD * 2)


def writer_gone(descriptor: int) -> bool:
    """Return whether no process appends to the segment any more: the writer's exclusive lock is free."""
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
        """The segments that still could not be read after all tries."""

    @property
    def has_failures(self) -> bool:
        """Whether a segment could not be read at the last try."""
        return any(segment.failures for segment in self._segments.values())

    def close(self) -> None:
        """Close the files."""
        for segment in self._segments.values():
            segment.close()
        self._segments = {}

    @property
    def known(self) -> Collection[SegmentReader]:
        """The readers of the segments found so far and not done, oldest first."""
        return self._segments.values()

    def segments(self) -> list[SegmentReader]:
        """Look for new segments and return the readers of all that are not done, oldest first."""
        self.find()
        return list(self.known)

    def find(self) -> list[SegmentReader]:
        """Look for new segments and return the new readers, oldest first."""
        names = segment_names(self.directory)
        new = sorted(name for name in names if name not in self._segments and name not in self._done)
        for name in new:
            path = self.directory / name
            self._segments[name] = SegmentReader(path, self._positions.pop(name, 0))
        if new and next(reversed(self._segments)) != max(self._segments):
            self._segments = dict(sorted(self._segments.items()))
        return [self._segments[name] for name in new]

    def chunk(self, segment: SegmentReader) -> Chunk | None:
        """Return a segment's next chunk, or None if it cannot be read, so that the others can continue."""
        if segment.retry_at and time.monotonic() < segment.retry_at:
            return None
        try:
            chunk = segment.chunk()
        except OSError as error:
            segment.failures += 1
            segment.retry_at = time.monotonic() + _RETRY_SECONDS
            get_logger().error("segment_unreadable", segment=segment.name, reason=error.strerror)
            if segment.failures >= _MAX_TRIES:
                self.unreadable.add(segment.name)
            return None
        segment.failures, segment.retry_at = 0, 0.0
        return chunk

    def rewind(self, name: str, position: int) -> None:
        """Read a segment again from an offset."""
        self._segments.pop(name).close()
        self._positions[name] = position

    def done(self, name: str) -> None:
        """Stop reading a segment, although its file may stay."""
        self._done.add(name)
        self.unreadable.discard(name)
        if name in self._segments:
            self._segments.pop(name).close()

    def forget(self, name: str) -> None:
        """Forget a segment whose file was removed."""
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
