"""Spool records of requests, the same for every input."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

from openmeter_plugin.instances.instance import Instance
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.metering.event import Quarantined, decide
from openmeter_plugin.metering.lenient_json import encode_json
from openmeter_plugin.metering.pdk_queries import NO_RESULTS, NOT_QUERIED, PdkQuery, QueryResults
from openmeter_plugin.metering.quarantine import quarantine_record
from openmeter_plugin.metering.rules import SkipReason
from openmeter_plugin.spool.queue import SpoolQueue
from openmeter_plugin.spool.segment import (
    MAX_EVENTS,
    QUARANTINED,
    SKIPPED,
    encode_events,
    encode_record,
    encode_summary,
)

_SKIP_RECORDS: Final = {reason: encode_record(SKIPPED + reason.encode()) for reason in SkipReason}
_unexpected_limit = RateLimit()

RoutedRecord = tuple[SpoolQueue, bytes]
"""An encoded record and its queue: the instance's or the quarantine."""


def random_id() -> str:
    """Return an event id for a request that has none: 32 hex digits, like Kong's own."""
    return secrets.token_hex(16)


def spool_record(
    instance: Instance, log: object, results: QueryResults = NO_RESULTS
) -> RoutedRecord | PdkQuery:
    """Return the record of a request, or the PDK query that Kong must answer first.

    Never raises, whatever Kong sends: an unreadable log is counted as skipped, because closing the connection
    over it would make Kong resend it forever.
    """
    try:
        return _record(instance, log, results)
    except Exception:
        # An internal error: count the request as a bad record.
        if _unexpected_limit.passes():
            get_logger().exception("record_unreadable", instance=instance.id)
        return instance.queue, _SKIP_RECORDS[SkipReason.BAD_RECORD]


def _record(instance: Instance, log: object, results: QueryResults) -> RoutedRecord | PdkQuery:
    rules = instance.rules
    now_ms = time.time_ns() // 1_000_000
    if rules is None:
        if results.application is NOT_QUERIED:
            return PdkQuery.APPLICATION
        return _quarantine(instance, instance.fault or "", log, results, now_ms)
    outcome = decide(log, results, rules, now_ms=now_ms, new_id=random_id)
    if isinstance(outcome, PdkQuery):
        return outcome
    if isinstance(outcome, SkipReason):
        return instance.queue, _SKIP_RECORDS[outcome]
    if isinstance(outcome, Quarantined):
        return _quarantine(instance, outcome.reason, log, results, now_ms, outcome.attributes)
    return instance.queue, usage_record(outcome)


def usage_record(events: list[dict[str, Any]]) -> bytes:
    """Return the record of a request's events, or several records if one cannot hold them all."""
    if len(events) > MAX_EVENTS:
        return usage_record(events[:MAX_EVENTS]) + usage_record(events[MAX_EVENTS:])
    first = events[0]
    summary = encode_summary([e["type"] for e in events], first["time"], first["id"], first["subject"])
    return encode_events([encode_json(event) for event in events], summary)


def _quarantine(
    instance: Instance,
    reason: str,
    log: object,
    results: QueryResults,
    now_ms: int,
    attributes: Mapping[str, Any] | None = None,
) -> RoutedRecord:
    destination = instance.queue.id if instance.rules is not None else None
    record = quarantine_record(
        reason, log, results, attributes, destination=destination, now_ms=now_ms, new_id=random_id
    )
    return instance.quarantine or instance.queue, encode_record(QUARANTINED + encode_json(record))
