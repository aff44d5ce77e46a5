"""Lines of the ledger, made of records and events; also of those that wait in segments for delivery.

An event is lost if its bytes were damaged, removed or unreadable since it was accepted. Nothing in the books
says which record holds which event. So what is lost is what remains of the ledger's waiting events without
those that are in flight and those that the segments still hold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson

from openmeter_plugin.books.store import LedgerKey, Lines
from openmeter_plugin.metering.ai_usage import GAP_PROPERTY, AiUsageGap, worst_gap
from openmeter_plugin.metering.lenient_json import json_object
from openmeter_plugin.spool.reader import Chunk, read_chunks
from openmeter_plugin.spool.segment import EVENTS, Record, Summary, decode_usage_key


def summary_of(record: Record) -> Summary | None:
    """Return the summary of a record's events, or None if the record does not hold valid events."""
    try:
        summary = record.summary
        if summary is not None:
            return summary
        events = orjson.loads(b"[" + record.events + b"]")
        first = ledger_key(events[0])
        types = tuple(str(event.get("type", "")) for event in events)
        return Summary(types, first.hour, str(events[0].get("id")), first.subject, gap_of(events))
    except (ValueError, IndexError, AttributeError):
        return None


def gap_of(events: Iterable[dict[str, Any]]) -> str | None:
    """Return the worst gap of the AI usage in a request's events."""
    named = [json_object(event.get("data")).get(GAP_PROPERTY) for event in events]
    return worst_gap(gap for gap in AiUsageGap if gap in named)


def add_lines(lines: Lines, summary: Summary, requests: int = 1) -> None:
    """Add the events of a record, or of several records counted alike, to the ledger's lines."""
    for kind in summary.types:
        lines[LedgerKey(summary.hour, kind, summary.subject)] += requests


def add_usage(lines: Lines, requests: Mapping[bytes, int]) -> int:
    """Add the events of requests, given as numbers by usage key; returns how many events."""
    events = 0
    for usage_key, number in requests.items():
        summary = decode_usage_key(usage_key)
        add_lines(lines, summary, number)
        events += number * len(summary.types)
    return events


def ledger_key(event: dict[str, Any]) -> LedgerKey:
    """Return the line of the ledger that an event belongs to."""
    time, kind, subject = (str(event.get(name, "")) for name in ("time", "type", "subject"))
    return LedgerKey(time[:13], kind, subject)


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
