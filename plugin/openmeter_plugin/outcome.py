"""From an outcome to the record that goes into the spool: the same for every way in."""

from __future__ import annotations

import secrets
import time
from typing import Final

from openmeter_plugin.event import UNASKED, Needs, SkipReason, outcome
from openmeter_plugin.instances import Instance
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.redact import redacted, redacted_application
from openmeter_plugin.serialized_log import encode_json
from openmeter_plugin.spool.segment import (
    MAX_EVENTS,
    QUARANTINED,
    SKIPPED,
    encode_events,
    encode_record,
)

_SKIP_RECORDS: Final = {reason: encode_record(SKIPPED + reason.encode()) for reason in SkipReason}
_unexpected_limit = RateLimit()


def random_id() -> str:
    """Return an event id for a request that has none, 32 hex digits as Kong's own."""
    return secrets.token_hex(16)


def spool_record(instance: Instance, log: object, application: object) -> bytes | Needs:
    """Return the spool's record of a request's outcome, or what must be asked of Kong first.

    Never raises for anything that Kong can send: a record that we cannot read is counted, since
    closing the connection over it would have Kong send it again for ever.
    """
    try:
        return _record(instance, log, application)
    except Exception:
        # A fault of ours: the request is counted as what it was for us, a record that we cannot read.
        if _unexpected_limit.passes():
            get_logger().exception("record_unreadable", instance=instance.id)
        return _SKIP_RECORDS[SkipReason.BAD_RECORD]


def _record(instance: Instance, log: object, application: object) -> bytes | Needs:
    rules = instance.rules
    if rules is None:
        if application is UNASKED:
            return Needs.APPLICATION
        return _quarantined(instance, log, application)
    result = outcome(log, application, rules, now_ms=time.time_ns() // 1_000_000, new_id=random_id)
    if isinstance(result, Needs):
        return result
    if isinstance(result, SkipReason):
        return _SKIP_RECORDS[result]
    encoded = [encode_json(event) for event in result]
    if len(encoded) <= MAX_EVENTS:
        return encode_events(encoded)
    return b"".join(encode_events(encoded[at : at + MAX_EVENTS]) for at in range(0, len(encoded), MAX_EVENTS))


def _quarantined(instance: Instance, log: object, application: object) -> bytes:
    kept = {
        "reason": instance.fault,
        "log": redacted(log),
        "application": redacted_application(application),
    }
    return encode_record(QUARANTINED + encode_json(kept))
