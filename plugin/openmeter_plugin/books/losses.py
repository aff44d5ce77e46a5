"""Events in the books that can no longer be delivered: their bytes were damaged, removed or unreadable since.

Nothing in the books says which record holds which event. So what is lost is what remains of the ledger's
waiting events without those that are in flight and those that the segments still hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from openmeter_plugin.books.ledger_lines import add_lines, add_usage, summary_of
from openmeter_plugin.books.store import Lines
from openmeter_plugin.spool.reader import Chunk, read_chunks
from openmeter_plugin.spool.segment import EVENTS, Record

LOSS_REASONS: Final = ("damaged", "missing", "unreadable")
"""Why events are lost: bytes damaged, a segment removed, a segment that cannot be read and is set aside."""


class Span(NamedTuple):
    """The part of a segment that is in the books and not delivered; `unsent` are ends of other records."""

    source: Path | int
    start: int
    end: int
    unsent: Collection[int]


def waiting_lines(spans: Iterable[Span]) -> Lines:
    """Read the events of the spans and return their lines in the ledger; raises OSError."""
    lines: Lines = Counter()
    for span in spans:
        for chunk in read_chunks(span.source, span.start, span.end):
            _add_chunk(lines, chunk, span.unsent)
    return lines


def _add_chunk(lines: Lines, chunk: Chunk, unsent: Collection[int]) -> None:
    rows = [row for row, end in enumerate(chunk.ends) if end not in unsent]
    usage = Counter([chunk.usage_keys[row] for row in rows])
    others = [item for item in chunk.others if isinstance(item, Record) and item.end not in unsent]
    if usage.pop(b"", 0):
        others += [chunk.record(row) for row in rows if not chunk.usage_keys[row]]
    add_usage(lines, usage)
    for record in others:
        if record.kind == EVENTS and (summary := summary_of(record)) is not None:
            add_lines(lines, summary)
