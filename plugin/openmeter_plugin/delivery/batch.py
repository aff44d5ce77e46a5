"""What is sent at once: consecutive events of a queue, no further than they are accounted for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from openmeter_plugin.delivery.accountant import Accountant
from openmeter_plugin.delivery.books import Lines
from openmeter_plugin.delivery.segments import QueueReader, SegmentReader
from openmeter_plugin.delivery.usage import add_alike, add_lines, summary_of
from openmeter_plugin.spool.segment import EVENTS, MAGIC, Record

MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
"""Of one POST, far below what gateways before a metering API let through."""

_MOST_RECORDS: Final = 20_000  # of a batch, so that a long stretch of skips is passed in pieces


@dataclass(slots=True)
class Batch:
    """Events to send, each record's joined by commas, and how far the segments are delivered then."""

    events: list[bytes] = field(default_factory=list)
    event_count: int = 0
    size: int = 0
    records: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    _alike: list[bytes] = field(default_factory=list)
    _other: Lines = field(default_factory=Counter)

    def add(self, record: Record, max_events: int) -> bool:
        """Add a record's events and return True, unless they have no room; the first ones always do."""
        event_count, rest, events = record.usage
        count, size = self.event_count + event_count, self.size + len(events) + 1
        if (count > max_events or size > MAX_BATCH_BYTES) and self.events:
            return False
        self.event_count, self.size = count, size
        self.events.append(events)
        if rest:
            self._alike.append(rest)
        elif (summary := summary_of(record)) is not None:  # else it was not accounted for, and is not here
            add_lines(self._other, summary)
        return True

    def lines(self) -> Lines:
        """Return how many events of each line of the ledger are in it."""
        lines = self._other.copy()
        add_alike(lines, Counter(self._alike))
        return lines


class BatchReader:
    """Reads the batches of one queue."""

    def __init__(self, accountant: Accountant, reader: QueueReader) -> None:
        self._accountant = accountant
        self.reader = reader

    def close(self) -> None:
        """Close the files."""
        self.reader.close()

    def extend(self, batch: Batch, max_events: int) -> None:
        """Add to the batch what is there and has room."""
        accounted = self._accountant.accounted
        for segment in self.reader.segments():
            limit = accounted.get(segment.name, 0)
            before = segment.position
            room = before >= limit or self._add(batch, segment, limit, max_events)
            if segment.position > before:
                batch.positions[segment.name] = segment.position
            if not room:
                return

    def delivered(self) -> list[str]:
        """Return the segments that are read to their end and will not grow; none is read again.

        To be called when the last batch is committed.
        """
        finished = self._accountant.finished
        names = [
            segment.name
            for segment in self.reader.segments()
            if segment.name in finished
            and segment.position >= self._accountant.accounted.get(segment.name, len(MAGIC))
        ]
        for name in names:
            self.reader.done(name)
        return names

    def forget(self, name: str) -> None:
        """Forget a segment whose file is removed."""
        self.reader.forget(name)

    def _add(self, batch: Batch, segment: SegmentReader, limit: int, max_events: int) -> bool:
        """Add a segment's events up to its limit; returns whether there is room for more."""
        unsent = self._accountant.resent.get(segment.name, ())
        read = self._accountant.read.pop(segment.name, None)
        if read is not None:
            segment.adopt(*read)
        while segment.position < limit:
            items = self.reader.items(segment)
            if not items:
                return True
            while items and segment.position < limit:
                item = items[0]
                if type(item) is Record and item.kind == EVENTS and item.end not in unsent:
                    if not batch.add(item, max_events):
                        return False
                elif batch.records >= _MOST_RECORDS:
                    return False
                segment.position = items.popleft().end
                batch.records += 1
        return True
