"""From records to the lines of the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from openmeter_plugin.books.store import LedgerKey, Lines
from openmeter_plugin.spool.segment import Record, Summary, decode_rest


def summary_of(record: Record) -> Summary | None:
    """Return the summary of a record's events, or None where they are no events."""
    try:
        summary = record.summary
        if summary is not None:
            return summary
        events = orjson.loads(b"[" + record.events + b"]")
        first = ledger_key(events[0])
        types = tuple(str(event.get("type", "")) for event in events)
        return Summary(types, first.hour, str(events[0].get("id")), first.subject)
    except (ValueError, IndexError, AttributeError):
        return None


def add_lines(lines: Lines, summary: Summary, requests: int = 1) -> None:
    """Count the events of a record in the ledger's lines, or those of several that are alike."""
    for kind in summary.types:
        lines[LedgerKey(summary.hour, kind, summary.subject)] += requests


def add_alike(lines: Lines, requests: Mapping[bytes, int]) -> int:
    """Count the events of requests by the rest of their summaries; returns how many events that were."""
    events = 0
    for rest, number in requests.items():
        summary = decode_rest(rest)
        add_lines(lines, summary, number)
        events += number * len(summary.types)
    return events


def ledger_key(event: dict[str, Any]) -> LedgerKey:
    """Return the line of the ledger that an event belongs to."""
    time, kind, subject = (str(event.get(name, "")) for name in ("time", "type", "subject"))
    return LedgerKey(time[:13], kind, subject)
