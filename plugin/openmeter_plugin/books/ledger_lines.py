"""Conversion of records and events to lines of the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from openmeter_plugin.books.store import LedgerKey, Lines
from openmeter_plugin.metering.ai_usage import GAP_PROPERTY, AiUsageGap, worst_gap
from openmeter_plugin.metering.lenient_json import json_object
from openmeter_plugin.spool.segment import Record, Summary, decode_usage_key


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
