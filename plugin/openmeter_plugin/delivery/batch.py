"""Batches: consecutive events of a queue, at most up to where they are in the books."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from openmeter_plugin.books.ledger_lines import add_lines, add_usage, summary_of
from openmeter_plugin.books.store import Lines
from openmeter_plugin.spool.reader import Chunk, QueueReader, SegmentReader

MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
"""Per POST: far below the limits of gateways in front of a metering API."""

_MAX_SEGMENT_BYTES: Final = 4 * 1024 * 1024  # per batch, so that a long run of skips is split


@dataclass(slots=True)
class Batch:
    """Events to send, joined by commas within each record, and the segment positions after them."""

    events: list[bytes] = field(default_factory=list)
    event_count: int = 0
    size: int = 0
    segment_bytes: int = 0
    """Bytes of segments that the batch covers."""
    positions: dict[str, int] = field(default_factory=dict)
    _by_usage_key: Counter[bytes] = field(default_factory=Counter)
    _other: Lines = field(default_factory=Counter)

    def add(self, chunk: Chunk, first: int, last: int, max_events: int) -> int:
        """Add the events of a chunk's rows as far as there is room; the first row of a batch always fits.

        Returns the row after the last that was added.
        """
        last = first + self._fitting(chunk, first, last, max_events)
        events, usage_keys = chunk.events[first:last], chunk.usage_keys[first:last]
        self.events += events
        self.event_count += sum(chunk.counts[first:last])
        self.size += sum(map(len, events)) + len(events)
        self._by_usage_key.update(usage_keys)
        if b"" in usage_keys:
            self._by_usage_key.pop(b"")
            for row in range(first, last):
                if not chunk.usage_keys[row] and (summary := summary_of(chunk.record(row))) is not None:
                    add_lines(self._other, summary)
        return last

    def full(self, max_events: int) -> bool:
        """Return whether the batch has no more room."""
        return self.event_count >= max_events or self.size >= MAX_BATCH_BYTES

    def lines(self) -> Lines:
        """Return the number of its events on each line of the ledger."""
        lines = self._other.copy()
        add_usage(lines, self._by_usage_key)
        return lines

    def _fitting(self, chunk: Chunk, first: int, last: int, max_events: int) -> int:
        """Return how many of the rows fit."""
        counts = chunk.counts[first:last]
        if sum(counts) > max_events - self.event_count:
            del counts[bisect_right(list(accumulate(counts)), max_events - self.event_count) :]
        sizes = [len(events) + 1 for events in chunk.events[first : first + len(counts)]]
        if sum(sizes) > MAX_BATCH_BYTES - self.size:
            del sizes[bisect_right(list(accumulate(sizes)), MAX_BATCH_BYTES - self.size) :]
        return len(sizes) if sizes or self.events else min(1, last - first)


class BatchReader:
    """Takes the batches of one queue from its reader."""

    def __init__(self, reader: QueueReader) -> None:
        self._reader = reader
        self.paused = False
        """Whether nothing may be taken for now."""
        self.taken = 0
        """Bytes of segments taken so far."""

    def extend(self, batch: Batch, max_events: int) -> bool:
        """Add available events to the batch while there is room; returns whether that is all there is."""
        if self.paused:
            return True
        for segment in self._reader.segments:
            before = segment.delivered
            room = self._add(batch, segment, max_events)
            if segment.delivered > before:
                self.taken += segment.delivered - before
                batch.positions[segment.name] = segment.delivered
            if not room:
                return False
        return True

    def delivered(self, unsettled: Collection[str] = ()) -> list[str]:
        """Return the segments that are entirely delivered and will not grow, and stop reading them.

        Segments in `unsettled` are left out: they have read records that are not yet delivered in the books.
        """
        names = [
            segment.name
            for segment in self._reader.segments
            if segment.finished and segment.name not in unsettled and segment.delivered >= segment.accounted
        ]
        for name in names:
            self._reader.done(name)
        return names

    def _add(self, batch: Batch, segment: SegmentReader, max_events: int) -> bool:
        """Add a segment's events up to where it is accounted for; returns whether there is room for more."""
        while segment.delivered < segment.accounted:
            chunk = self._reader.next_undelivered(segment)
            if chunk is None:
                return True
            if batch.segment_bytes >= _MAX_SEGMENT_BYTES:
                return False
            before = segment.delivered
            room = self._add_chunk(batch, segment, chunk, max_events)
            batch.segment_bytes += segment.delivered - before
            if not room:
                return False
        return True

    def _add_chunk(self, batch: Batch, segment: SegmentReader, chunk: Chunk, max_events: int) -> bool:
        """Take a chunk's events as far as the batch has room; returns whether there is room for more."""
        last, unsent = len(chunk.ends), segment.unsent
        gaps = [row for row in range(segment.row, last) if chunk.ends[row] in unsent] if unsent else []
        row = segment.row
        for stop in [*gaps, last]:
            row = batch.add(chunk, row, stop, max_events)
            if row < stop:
                if row > segment.row:
                    segment.take_rows(row)
                return False
            row = stop + 1
        segment.take()
        return True
