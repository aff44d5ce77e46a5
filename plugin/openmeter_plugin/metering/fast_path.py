"""The usual request, from the bytes of its log to the spool's record without a detour.

Nearly all requests are of a consumer that authenticated itself and have every field as Kong writes it.
For those the log is decoded into just the fields that an event has, which costs less than half of what
`event.outcome` does. That one decides what an event is: here the same event comes out, byte for byte, or
nothing, and then it is asked. (A property test holds the two together.)
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from openmeter_plugin.metering.event import API_REQUEST
from openmeter_plugin.metering.lenient_json import LARGEST_COUNT, LATEST, MAX_TEXT, rfc3339
from openmeter_plugin.metering.rules import Lookup, Rules, SkipReason
from openmeter_plugin.metering.subject import default_subject, tagged_customer
from openmeter_plugin.spool.segment import encode_events, encode_summary

_Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
_Count = Annotated[int, Meta(ge=0, le=LARGEST_COUNT)]


class _Request(Struct):
    id: _Text
    method: _Text | UnsetType = UNSET
    size: _Count | UnsetType = UNSET


class _Response(Struct):
    status: _Count | UnsetType = UNSET
    size: _Count | UnsetType = UNSET


class _Latencies(Struct):
    request: _Count | UnsetType = UNSET
    proxy: _Count | UnsetType = UNSET


class _Named(Struct):
    id: _Text | UnsetType = UNSET
    name: _Text | UnsetType | None = UNSET


class _Consumer(Struct):
    id: _Text
    username: _Text | UnsetType | None = UNSET
    custom_id: _Text | None = None
    tags: Any = None


class _Log(Struct):
    """What is taken of a log. A field of another type than this is for `event.outcome` to judge."""

    started_at: Annotated[int, Meta(ge=1, le=LATEST)]
    consumer: _Consumer
    request: _Request
    response: _Response
    latencies: _Latencies
    authenticated_entity: Any = None
    route: _Named | None = None
    service: _Named | None = None
    source: _Text | UnsetType = UNSET
    workspace_name: _Text | UnsetType = UNSET
    ai: msgspec.Raw | UnsetType = UNSET


class _Data(Struct):
    """The event's data, its members in the order that `event` puts them in."""

    request_method: str | UnsetType
    response_source: str | UnsetType
    status: int | UnsetType
    response_bytes: int | UnsetType
    request_bytes: int | UnsetType
    latency_ms: int | UnsetType
    upstream_latency_ms: int | UnsetType
    route_name: str | UnsetType
    route_id: str | UnsetType
    service_name: str | UnsetType
    service_id: str | UnsetType
    consumer_id: str
    consumer_username: str | UnsetType
    workspace: str | UnsetType


class _Event(Struct):
    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    data: _Data


_decode: Final = msgspec.json.Decoder(_Log).decode
_encode: Final = msgspec.json.Encoder().encode
_NOBODY: Final = _Named()


class FastPath:
    """Makes the records of usual requests, by rules that have such requests."""

    __slots__ = ("_field", "_rules")

    def __init__(self, rules: Rules, lookup: Lookup) -> None:
        self._rules = rules
        self._field = lookup.field

    def record(self, raw: bytes) -> bytes | None:
        """Return the spool's record for a serialized log, None where it is not a usual one."""
        rules = self._rules
        try:
            log = _decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        if log.ai is not UNSET and rules.meter_ai_token_usage:
            return None
        if not (log.authenticated_entity or rules.meter_anonymous_consumer):
            return None
        consumer = log.consumer
        subject = self._subject(consumer)
        if subject is None:
            return None
        request, response, latencies = log.request, log.response, log.latencies
        route, service = log.route or _NOBODY, log.service or _NOBODY
        time = rfc3339(log.started_at)
        event = _Event(
            "1.0",
            request.id,
            rules.source,
            API_REQUEST,
            subject,
            time,
            _Data(
                request.method,
                log.source,
                response.status,
                response.size,
                request.size,
                latencies.request,
                latencies.proxy,
                route.name or UNSET,
                route.id,
                service.name or UNSET,
                service.id,
                consumer.id,
                consumer.username or UNSET,
                log.workspace_name,
            ),
        )
        summary = encode_summary([API_REQUEST], time, request.id, subject)
        return encode_events([_encode(event)], summary)

    def _subject(self, consumer: _Consumer) -> str | None:
        if self._field == "id":
            return default_subject("consumer", consumer.id)
        if self._field == "tag":
            tagged = tagged_customer(consumer.tags)
            return None if isinstance(tagged, SkipReason) else tagged
        return consumer.custom_id if self._field == "custom_id" else consumer.username or None


def fast_path_for(rules: Rules) -> FastPath | None:
    """Return what makes the records of usual requests; None where more decides."""
    lookup = rules.lookups[0] if rules.lookups else None
    if (
        lookup is None
        or lookup.place != "consumer"
        or rules.filters is not None
        or rules.attributes
        or rules.application_context == "always"
        or not rules.meter_api_requests
    ):
        return None
    return FastPath(rules, lookup)
