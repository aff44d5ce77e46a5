"""A piece of a segment, its usage column by column, so that a batch and its counts are slices of it.

Nearly all records are usage with a summary. An object for each of them would cost delivery more than posting
them; here reading, counting and joining take a few calls for each piece.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import Final

from openmeter_plugin.spool.segment import EVENTS, HEAD_SIZE, MARKER, MAX_PAYLOAD, Damage, Record, scan

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
