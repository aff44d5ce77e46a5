"""Spool records of requests, the same for every input: from a serialized log to the bytes that are stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from openmeter_plugin.instances.instance import Instance
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.metering.event import Event, Quarantined, RequestData, decide, encode_event, usage_gap
from openmeter_plugin.metering.kong_log import NO_RESULTS, NOT_QUERIED, PdkQuery, QueryResults, decode_log
from openmeter_plugin.metering.lenient_json import encode_json, parse_log
from openmeter_plugin.metering.quarantine import quarantine_record
from openmeter_plugin.metering.rules import SkipReason
from openmeter_plugin.spool.queue import SpoolQueue
from openmeter_plugin.spool.segment import (
    MAX_EVENTS,
    QUARANTINED,
    SKIPPED,
    encode_record,
    encode_usage,
)

_SKIP_RECORDS: Final = {reason: encode_record(SKIPPED + reason.encode()) for reason in SkipReason}
BAD_RECORD: Final = _SKIP_RECORDS[SkipReason.BAD_RECORD]
_unexpected_limit = RateLimit()

RoutedRecord = tuple[SpoolQueue, bytes]
"""An encoded record and its queue: the instance's or the quarantine."""


def random_id() -> str:
    """Return an event id for a request that has none: 32 hex digits, like Kong's own."""
    return secrets.token_hex(16)


def current_ms() -> int:
    """Return the current time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def spool_record(
    instance: Instance,
    raw: bytes,
    results: QueryResults = NO_RESULTS,
    new_id: Callable[[], str] = random_id,
) -> RoutedRecord | PdkQuery:
    """Return the record of a request, or the PDK query that Kong must answer first.

    Never raises, whatever Kong sends: an unreadable log is counted as skipped, because closing the connection
    over it would make Kong resend it forever.
    """
    rules = instance.rules
    try:
        if rules is None:
            if results.application is NOT_QUERIED:
                return PdkQuery.APPLICATION
            return _quarantine(instance, instance.fault or "", raw, results, new_id)
        outcome = decide(decode_log(raw), results, rules, current_ms, new_id)
        if isinstance(outcome, list):
            return instance.queue, usage_record(outcome)
        if isinstance(outcome, PdkQuery):
            return outcome
        if isinstance(outcome, Quarantined):
            return _quarantine(instance, outcome.reason, raw, results, new_id, outcome.attributes)
        return instance.queue, _SKIP_RECORDS[outcome]
    except Exception:
        # An internal error: count the request as a bad record.
        if _unexpected_limit.passes():
            get_logger().exception("record_unreadable", instance=instance.id)
        return instance.queue, BAD_RECORD


def usage_record(events: list[Event]) -> bytes:
    """Return the record of a request's events, or several records if one cannot hold them all."""
    first = events[0]
    if len(events) == 1 and type(first.data) is RequestData:  # nearly always; the general form costs more
        gap = first.data.ai_usage_gap
        return encode_usage([encode_event(first)], [first.type], first.time, first.id, first.subject, gap)
    record = _record(events[:MAX_EVENTS], usage_gap(events))
    for start in range(MAX_EVENTS, len(events), MAX_EVENTS):
        record += _record(events[start : start + MAX_EVENTS], None)  # the gap is counted once per request
    return record


def _record(events: list[Event], gap: str | None) -> bytes:
    first, encoded = events[0], [encode_event(event) for event in events]
    types = [event.type for event in events]
    return encode_usage(encoded, types, first.time, first.id, first.subject, gap)


def _quarantine(
    instance: Instance,
    reason: str,
    raw: bytes,
    results: QueryResults,
    new_id: Callable[[], str],
    attributes: Mapping[str, Any] | None = None,
) -> RoutedRecord:
    destination = instance.queue.id if instance.rules is not None else None
    record = quarantine_record(
        reason,
        parse_log(raw),
        results,
        attributes,
        destination=destination,
        now_ms=current_ms(),
        new_id=new_id,
    )
    return instance.quarantine or instance.queue, encode_record(QUARANTINED + encode_json(record))
