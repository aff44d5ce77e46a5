"""From an outcome to the record that goes into the spool: the same for every way in."""

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

Spooled = tuple[SpoolQueue, bytes]
"""A record with the queue that it goes to: that of the instance, or the quarantine."""


def random_id() -> str:
    """Return an event id for a request that has none, 32 hex digits as Kong's own."""
    return secrets.token_hex(16)


def spool_record(instance: Instance, log: object, answers: QueryResults = NO_RESULTS) -> Spooled | PdkQuery:
    """Return the spool's record of a request's outcome, or what must be asked of Kong first.

    Never raises for anything that Kong can send: a record that we cannot read is counted, since
    closing the connection over it would have Kong send it again for ever.
    """
    try:
        return _record(instance, log, answers)
    except Exception:
        # A fault of ours: the request is counted as what it was for us, a record that we cannot read.
        if _unexpected_limit.passes():
            get_logger().exception("record_unreadable", instance=instance.id)
        return instance.queue, _SKIP_RECORDS[SkipReason.BAD_RECORD]


def _record(instance: Instance, log: object, answers: QueryResults) -> Spooled | PdkQuery:
    rules = instance.rules
    now_ms = time.time_ns() // 1_000_000
    if rules is None:
        if answers.application is NOT_QUERIED:
            return PdkQuery.APPLICATION
        return _set_aside(instance, instance.fault or "", log, answers, now_ms)
    result = decide(log, answers, rules, now_ms=now_ms, new_id=random_id)
    if isinstance(result, PdkQuery):
        return result
    if isinstance(result, SkipReason):
        return instance.queue, _SKIP_RECORDS[result]
    if isinstance(result, Quarantined):
        return _set_aside(instance, result.reason, log, answers, now_ms, result.attributes)
    return instance.queue, usage_record(result)


def usage_record(events: list[dict[str, Any]]) -> bytes:
    """Return the record of a request's events; several, in the case of more events than one can hold."""
    if len(events) > MAX_EVENTS:
        return usage_record(events[:MAX_EVENTS]) + usage_record(events[MAX_EVENTS:])
    first = events[0]
    summary = encode_summary([e["type"] for e in events], first["time"], first["id"], first["subject"])
    return encode_events([encode_json(event) for event in events], summary)


def _set_aside(
    instance: Instance,
    reason: str,
    log: object,
    answers: QueryResults,
    now_ms: int,
    attributes: Mapping[str, Any] | None = None,
) -> Spooled:
    destination = instance.queue.id if instance.rules is not None else None
    kept = quarantine_record(
        reason, log, answers, attributes, destination=destination, now_ms=now_ms, new_id=random_id
    )
    return instance.quarantine or instance.queue, encode_record(QUARANTINED + encode_json(kept))
