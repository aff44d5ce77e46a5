"""Reader of a queue's segments, with two cursors: what is in the books, and what is taken for delivery.

It resumes at stored positions and follows segments that still grow. Whatever reads a segment reads it here.

Segments are read in chunks, which hold usage column by column, so that a batch and its counts are slices.
Nearly all records are usage with a summary. An object for each record would cost delivery more than the
POSTs do; with columns, reading, counting and joining take a few calls for each chunk.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.queue import is_unlocked
from openmeter_plugin.spool.segment import (
    EVENTS,
    HEAD_SIZE,
    MAGIC,
    MARKER,
    MAX_PAYLOAD,
    SUFFIX,
    Damage,
    Record,
    item_at,
)

_PREFIX: Final = struct.Struct("<4sIIcBHH")
"""Marker, length and checksum of a record; for usage also the kind, the number of events, the length of the
summary and, within that, the length of the first event's id."""

_EVENTS_HEAD: Final = struct.Struct("<BH")
_ID_SIZE: Final = struct.Struct("<H")
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
        """Return a row as a record."""
        summary = self.usage_keys[row]
        if summary:
            summary = _ID_SIZE.pack(len(self.ids[row])) + self.ids[row] + summary
        head = _EVENTS_HEAD.pack(self.counts[row], len(summary))
        return Record(EVENTS, head + summary + self.events[row], self.ends[row])

    def items(self) -> Iterator[Other]:
        """Yield the records and damage in their order."""
        others = iter(self.others)
        other = next(others, None)
        for row, end in enumerate(self.ends):
            while other is not None and other.end < end:
                yield other
                other = next(others, None)
            yield self.record(row)
        if other is not None:
            yield other
            yield from others


def read_chunk(data: bytes, base: int, *, final: bool) -> Chunk:
    """Return the records in `data`, which starts at a record at offset `base` of a segment.

    Valid usage is read here, everything else by `item_at`, which explains `final`.
    """
    chunk = Chunk(base, base)
    at = 0
    while at < len(data):
        at = _read_records(chunk, data, at, base)
        if at == len(data):
            break
        other = item_at(data, at, base, final=final)
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
_MAX_WINDOW: Final = 4 * 1024 * 1024  # bytes of a queue that are held between its two cursors
_MAX_TRIES: Final = 8  # reads of a segment before it counts as unreadable
_RETRY_SECONDS: Final = 1.0  # between two tries


class Position(NamedTuple):
    """The two cursors of a segment: up to where it is in the books, and up to where it is delivered."""

    accounted: int
    delivered: int


@dataclass(slots=True)
class Tries:
    """Failed reads of a segment in a row, and when to try again."""

    failures: int = 0
    again_at: float = 0.0

    def fail(self) -> bool:
        """Note a failure; returns whether it was the last try."""
        self.failures += 1
        self.again_at = time.monotonic() + _RETRY_SECONDS
        return self.failures >= _MAX_TRIES


class SegmentReader:
    """Reads one segment. `accounted` and `delivered` are its cursors; `delivered` never passes `accounted`.

    Each record is read once for both: what is accounted for stays in memory until it is taken for delivery,
    as far as it fits into the window. The rest is read again.
    """

    def __init__(self, path: Path, position: Position, known_damage: Iterable[Damage] = ()) -> None:
        self.path = path
        self.name = path.name
        self.accounted = max(position.accounted, len(MAGIC))
        self.delivered = max(position.delivered, len(MAGIC))
        """The offset after what was taken for delivery; the books follow once it is delivered."""
        self.row = 0
        """The first row of the next chunk that is not taken."""
        self.unsent: set[int] = set()
        """The offsets after records that are never sent: resent or unsendable."""
        self.suspect: list[Damage] = []
        """Damage that was not there when it was accounted for. Nothing is delivered until it is counted."""
        self.accounting, self.delivery = Tries(), Tries()
        self._known_damage = set(known_damage)
        self._ended = False  # nothing will ever follow what is read
        self._read_end = self.accounted
        self._unaccounted: list[Chunk] = []  # read, but not in the books yet
        self._window: deque[Chunk] = deque()
        self._descriptor: int | None = None

    @property
    def finished(self) -> bool:
        """Whether the segment is entirely in the books and will never grow."""
        return self._ended and self._read_end == self.accounted

    @property
    def held(self) -> int:
        """The bytes between the cursors that are in memory."""
        return self._window[-1].end - self.delivered if self._window else 0

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def next_unaccounted(self) -> Chunk | None:
        """Read the next chunk for the books, or return None if there is none yet; raises OSError."""
        if self._ended:
            return None
        size = _READ_SIZE
        while True:
            chunk, at_end, self._ended = _read(self._open(), self._read_end, size)
            if chunk.end > chunk.start:
                self._read_end = chunk.end
                self._unaccounted.append(chunk)
                return chunk
            if at_end:
                if self._ended and not self._unaccounted:
                    self.close()
                return None
            size = min(size * 4, MAX_PAYLOAD * 2)  # a record may be larger than what was read

    def commit(self, room: int) -> None:
        """Move `accounted` behind the chunks that were read; holds at most `room` bytes in memory."""
        end = self._window[-1].end if self._window else self.delivered
        for chunk in self._unaccounted:
            self._known_damage.update(item for item in chunk.others if isinstance(item, Damage))
            if chunk.start == end and chunk.end - self.accounted <= room:
                self._window.append(chunk)
                end = chunk.end
        self._unaccounted = []
        self.accounted = self._read_end
        if self._ended:
            self.close()  # a backlog has many files

    def rollback(self) -> None:
        """Read again what is not in the books."""
        self._unaccounted, self._read_end, self._ended = [], self.accounted, False

    def next_undelivered(self) -> Chunk | None:
        """Return the chunk at `delivered`, or None if nothing more may be delivered now; raises OSError."""
        if not self._window and self.delivered < self.accounted and not self.suspect:
            chunk = self._read_accounted()
            damage = [item for item in chunk.others if isinstance(item, Damage)]
            self.suspect = [item for item in damage if item not in self._known_damage]
            if not self.suspect:
                self._window.append(chunk)
        return self._window[0] if self._window else None

    def take(self) -> None:
        """Move `delivered` behind that chunk."""
        self.delivered, self.row = self._window.popleft().end, 0
        if self._ended and self.delivered == self.accounted:
            self.close()

    def take_rows(self, row: int) -> None:
        """Move `delivered` up to, not including, a row of that chunk."""
        self.delivered, self.row = self._window[0].ends[row - 1], row

    def drop_window(self) -> None:
        """Forget what is in memory, so that it is read from the disk again."""
        self._window.clear()
        self.row = 0

    @property
    def source(self) -> Path | int:
        """What a second reader has to read: the open descriptor, if there is one, else the path.

        A file that was removed or replaced is delivered to its end while it is open.
        """
        return self.path if self._descriptor is None else self._descriptor

    def accept_damage(self) -> None:
        """Deliver what follows the suspect damage, which is counted as lost by now."""
        self._known_damage.update(self.suspect)
        self.suspect = []

    def _read_accounted(self) -> Chunk:
        """Read from `delivered` on, not beyond `accounted`, which the file may no longer reach."""
        size = _READ_SIZE
        while True:
            chunk = read_span(self._open(), self.delivered, self.accounted, size)
            if chunk.end > chunk.start:
                return chunk
            size *= 4  # a record may be larger than what was read

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptor


def _read(descriptor: int, at: int, size: int) -> tuple[Chunk, bool, bool]:
    """Return a chunk, whether it was read up to the file's end, and whether nothing will follow it."""
    # Check before reading: whatever the writer wrote, it wrote before it was gone.
    final = is_unlocked(descriptor)
    data = os.pread(descriptor, size, at)
    at_end = len(data) < size
    return read_chunk(data, at, final=final and at_end), at_end, final and at_end


def read_span(descriptor: int, at: int, end: int, size: int) -> Chunk:
    """Return a chunk from `at` on, of at most `size` bytes; what is missing before `end` is damage."""
    wanted = min(size, end - at)
    data = os.pread(descriptor, wanted, at)
    missing = len(data) < wanted
    chunk = read_chunk(data, at, final=missing or at + wanted == end)
    if missing:
        chunk.others.append(Damage(chunk.end, end))
        chunk.end = end
    return chunk


def read_chunks(
    source: Path | int, start: int = 0, end: int | None = None, *, size: int = _READ_SIZE
) -> Iterator[Chunk]:
    """Yield the chunks of a segment from one offset to another; nothing if the file is gone.

    `source` is its path or an open descriptor, which stays open. Without an end, up to the last complete
    record. `size` is the bytes of the first read; raises OSError.
    """
    at = max(start, len(MAGIC))
    try:
        file = source.open("rb") if isinstance(source, Path) else os.fdopen(source, "rb", closefd=False)
    except FileNotFoundError:
        return
    with file:
        while end is None or at < end:
            if end is None:
                chunk, at_end, _ = _read(file.fileno(), at, size)
            else:
                chunk, at_end = read_span(file.fileno(), at, end, size), False
            yield chunk
            if at_end:
                return
            # A record may be larger than what was read.
            at, size = chunk.end, _READ_SIZE if chunk.end > at else size * 4


def read_segment(
    path: Path, start: int = 0, end: int | None = None, *, size: int = _READ_SIZE
) -> Iterator[Record | Damage]:
    """Yield a segment's records and damage, as `read_chunks` finds them."""
    for chunk in read_chunks(path, start, end, size=size):
        yield from chunk.items()


class QueueReader:
    """Reads all segments of a queue, oldest first, for the books and for delivery.

    With `window` 0 nothing is held for delivery.
    """

    def __init__(
        self,
        directory: Path,
        positions: Mapping[str, Position],
        *,
        unsent: Iterable[tuple[str, int]] = (),
        damage: Iterable[tuple[str, Damage]] = (),
        window: int = _MAX_WINDOW,
    ) -> None:
        self.directory = directory
        self._positions = dict(positions)
        self._unsent: dict[str, set[int]] = {}
        self.add_unsent(unsent)
        self._damage: dict[str, list[Damage]] = {}
        for name, item in damage:
            self._damage.setdefault(name, []).append(item)
        self._window = window
        self._segments: dict[str, SegmentReader] = {}  # oldest first
        self._done: set[str] = set()
        self.unreadable: set[str] = set()
        """The segments that still could not be read after all tries."""
        self.listing_failed = False
        """Whether the directory could not be listed at the last try."""
        self._listing_limit = RateLimit()

    @property
    def has_failures(self) -> bool:
        """Whether a segment or the directory could not be read at the last try."""
        return self.listing_failed or any(
            segment.accounting.failures or segment.delivery.failures for segment in self._segments.values()
        )

    @property
    def segments(self) -> Collection[SegmentReader]:
        """The readers of the segments found so far and not done, oldest first."""
        return self._segments.values()

    @property
    def suspects(self) -> list[SegmentReader]:
        """The segments with damage that was not there when they were accounted for."""
        return [segment for segment in self._segments.values() if segment.suspect]

    def close(self) -> None:
        """Close the files."""
        for segment in self._segments.values():
            segment.close()
        self._segments = {}

    def find(self) -> list[SegmentReader]:
        """Look for new segments and return the new readers, oldest first."""
        try:
            names = segment_names(self.directory)
        except OSError as error:  # such as too many open files
            self.listing_failed = True
            if self._listing_limit.passes():
                get_logger().error("queue_unreadable", queue=self.directory.name, reason=error.strerror)
            return []
        self.listing_failed = False
        new = sorted(name for name in names if name not in self._segments and name not in self._done)
        for name in new:
            position = self._positions.pop(name, Position(0, 0))
            segment = SegmentReader(self.directory / name, position, self._damage.pop(name, ()))
            segment.unsent = self._unsent.setdefault(name, set())
            self._segments[name] = segment
        if new and next(reversed(self._segments)) != max(self._segments):
            self._segments = dict(sorted(self._segments.items()))
        return [self._segments[name] for name in new]

    def next_unaccounted(self, segment: SegmentReader) -> Chunk | None:
        """Return a segment's next chunk for the books; None if there is none, or it cannot be read now."""
        return self._next(segment, segment.accounting, segment.next_unaccounted)

    def next_undelivered(self, segment: SegmentReader) -> Chunk | None:
        """Return a segment's next chunk to deliver; None if there is none, or it cannot be read now."""
        return self._next(segment, segment.delivery, segment.next_undelivered)

    def commit(self, segments: Iterable[SegmentReader]) -> None:
        """Move the `accounted` cursors of these segments behind what was read of them."""
        for segment in segments:
            segment.commit(self._window - sum(other.held for other in self._segments.values()))

    def add_unsent(self, records: Iterable[tuple[str, int]]) -> None:
        """Mark records, by segment and the offset after them, as never sent."""
        for name, end in records:
            self._unsent.setdefault(name, set()).add(end)

    def unsent(self, name: str) -> Collection[int]:
        """Return the offsets after a segment's records that are never sent."""
        return self._unsent.get(name, ())

    def done(self, name: str) -> None:
        """Stop reading a segment, although its file may stay."""
        self._done.add(name)
        self.unreadable.discard(name)
        if name in self._segments:
            self._segments.pop(name).close()

    def forget(self, name: str) -> None:
        """Forget a segment whose file was removed."""
        self._done.discard(name)
        self._unsent.pop(name, None)

    def _next(self, segment: SegmentReader, tries: Tries, read: Callable[[], Chunk | None]) -> Chunk | None:
        """Read, or return None if the segment cannot be read, so that the others can continue."""
        if tries.failures and time.monotonic() < tries.again_at:
            return None
        try:
            chunk = read()
        except OSError as error:
            last = tries.fail()
            get_logger().error("segment_unreadable", segment=segment.name, reason=error.strerror)
            if last:
                self.unreadable.add(segment.name)
            return None
        tries.failures = 0
        return chunk


def segment_names(directory: Path) -> list[str]:
    """Return the names of the segment files in a queue's directory, in no order; raises OSError."""
    try:
        return [name for name in os.listdir(directory) if name.endswith(SUFFIX)]  # noqa: PTH208 - no paths
    except (FileNotFoundError, NotADirectoryError):
        return []
