"""From one serialized request log to its CloudEvents: a pure function.

The log is what `kong.log.serialize` returns (recordings in tests/data/kong-wire). Any field of it may
be missing or of another type, so every access here tolerates that, and nothing here raises. Only named
fields are taken: the record also holds API keys, cookies and query strings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any, Final, Literal

from openmeter_plugin.subject import default_subject

API_REQUEST: Final = "kong.api_request"
LLM_REQUEST: Final = "kong.llm_request"

MAX_TEXT: Final = 1024
"""Characters kept of any text that a client can choose, so that no event grows without bound."""

_LARGEST_COUNT: Final = 2**53  # beyond it JSON numbers are no longer exact
_LATEST_TIME: Final = 253_402_300_799_999  # ms: the end of the year 9999, the last that RFC 3339 can write


class SkipReason(StrEnum):
    """Why a request became no event. The values are what counters and metrics are labelled with."""

    NO_CONSUMER = "no_consumer"
    ANONYMOUS_CONSUMER = "anonymous_consumer"
    CONSUMER_WITHOUT_FIELD = "consumer_without_field"
    NO_APPLICATION = "no_application"
    NO_HEADER = "no_header"
    NO_QUERY_ARGUMENT = "no_query_argument"
    NOTHING_TO_METER = "nothing_to_meter"
    BAD_RECORD = "bad_record"


@dataclass(frozen=True, slots=True)
class Lookup:
    """One place to look for the subject; `field` is already checked and, for headers, in lower case."""

    place: Literal["application", "consumer", "header", "query"]
    field: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """A header or query argument `name` that goes into the event's data as `property_name`."""

    place: Literal["header", "query"]
    name: str
    property_name: str


@dataclass(frozen=True, slots=True)
class Rules:
    """What of an instance's configuration decides its events."""

    source: str
    meter_api_requests: bool = True
    meter_ai_token_usage: bool = True
    meter_anonymous_consumer: bool = False
    lookups: tuple[Lookup, ...] = (Lookup("consumer", "id"), Lookup("application", "id"))
    attributes: tuple[Attribute, ...] = ()
    application_context: Literal["when_needed", "always", "never"] = "when_needed"


Event = dict[str, Any]


class Unasked(Enum):
    """The type of UNASKED: the application context was not asked for; it costs Kong a round trip."""

    UNASKED = "unasked"


UNASKED: Final = Unasked.UNASKED


class Needs(Enum):
    """What must be asked of Kong before the outcome is known."""

    APPLICATION = "application"


Outcome = list[Event] | SkipReason | Needs


def table(value: object) -> Mapping[str, Any]:
    """Return the value where it is a JSON object, else an empty one."""
    return value if type(value) is dict else _EMPTY


_EMPTY: Final[Mapping[str, Any]] = {}


def _text(value: object) -> str | None:
    if type(value) is str and value:
        return value if len(value) <= MAX_TEXT else value[:MAX_TEXT]
    return None


def _identifier(value: object) -> str | None:
    """Return a text that names somebody or something: never cut short, since that would name another."""
    return value if type(value) is str and 0 < len(value) <= MAX_TEXT else None


def _count(value: object) -> int | None:
    """Return a non-negative number as a whole one; Kong has written sizes as text in some versions."""
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) <= 16:
        value = int(value)
    if type(value) is int:
        return value if 0 <= value <= _LARGEST_COUNT else None
    if type(value) is float and 0 <= value <= _LARGEST_COUNT:
        return round(value)
    return None


def _first(value: object) -> object:
    """Return a header or query argument, the first where it was given several times."""
    return value[0] if type(value) is list and value else value


def _consumer_subject(log: Mapping[str, Any], field: str, rules: Rules) -> str | SkipReason:
    consumer = table(log.get("consumer"))
    consumer_id = _identifier(consumer.get("id"))
    if consumer_id is None:
        return SkipReason.NO_CONSUMER
    if not rules.meter_anonymous_consumer and is_anonymous(log):
        return SkipReason.ANONYMOUS_CONSUMER
    if field == "id":
        return default_subject("consumer", consumer_id)
    return _identifier(consumer.get(field)) or SkipReason.CONSUMER_WITHOUT_FIELD


def _application_subject(application: object, field: str) -> str | SkipReason:
    context = table(application)
    if field != "id":
        return _identifier(context.get(field)) or SkipReason.NO_APPLICATION
    application_id = _identifier(context.get("application_id"))
    return default_subject("application", application_id) if application_id else SkipReason.NO_APPLICATION


def is_anonymous(log: Mapping[str, Any]) -> bool:
    """Tell whether the consumer is an authentication plugin's `anonymous` fallback.

    All three signs are demanded: a client can send the header itself, but then Kong has an
    authenticated entity, and an authenticated request must never go unbilled.
    """
    if not log.get("consumer") or log.get("authenticated_entity"):
        return False
    headers = table(table(log.get("request")).get("headers"))
    return headers.get("x-anonymous-consumer") == "true"


def _subject(log: Mapping[str, Any], application: object, rules: Rules) -> str | SkipReason | Needs:
    first_reason: SkipReason | None = None
    for lookup in rules.lookups:
        place = lookup.place
        found: str | SkipReason
        if place == "consumer":
            found = _consumer_subject(log, lookup.field, rules)
        elif place == "application":
            if application is UNASKED:
                if rules.application_context != "never":
                    return Needs.APPLICATION
                application = None
            found = _application_subject(application, lookup.field)
        else:
            found = _identifier(_requested(log, place, lookup.field)) or (
                SkipReason.NO_HEADER if place == "header" else SkipReason.NO_QUERY_ARGUMENT
            )
        if not isinstance(found, SkipReason):
            return found
        first_reason = first_reason or found
    return first_reason or SkipReason.NO_CONSUMER


def _requested(log: Mapping[str, Any], place: Literal["header", "query"], name: str) -> object:
    request = table(log.get("request"))
    return _first(table(request.get("headers" if place == "header" else "querystring")).get(name))


def put(data: Event, key: str, value: object) -> None:
    """Set a property unless there is no value for it: what is absent in the log is absent in the event."""
    if value is not None:
        data[key] = value


def _common_data(log: Mapping[str, Any], application: object) -> Event:
    """Return what requests and token counts share: who, over which route and service."""
    data: Event = {}
    route, service, consumer = (table(log.get(key)) for key in ("route", "service", "consumer"))
    put(data, "route_name", _text(route.get("name")))
    put(data, "route_id", _text(route.get("id")))
    put(data, "service_name", _text(service.get("name")))
    put(data, "service_id", _text(service.get("id")))
    put(data, "consumer_id", _text(consumer.get("id")))
    put(data, "consumer_username", _text(consumer.get("username")))
    if type(application) is dict:
        put(data, "application_id", _text(application.get("application_id")))
    put(data, "workspace", _text(log.get("workspace_name")))
    return data


def _request_data(log: Mapping[str, Any]) -> Event:
    data: Event = {}
    request, response, latencies = (table(log.get(key)) for key in ("request", "response", "latencies"))
    put(data, "request_method", _text(request.get("method")))
    put(data, "status", _count(response.get("status")))
    put(data, "response_source", _text(log.get("source")))
    put(data, "request_bytes", _count(request.get("size")))
    put(data, "response_bytes", _count(response.get("size")))
    put(data, "latency_ms", _count(latencies.get("request")))
    # -1 where Kong itself answered: no upstream, no latency.
    put(data, "upstream_latency_ms", _count(latencies.get("proxy")))
    return data


def _ai_usage(
    log: Mapping[str, Any],
) -> Iterator[tuple[str, Literal["input", "output"], int, Mapping[str, Any]]]:
    """Yield (ai key, direction, tokens, meta) for each count that is more than 0.

    The place changed with nearly every Kong version (3.6 flat, then one block per plugin, in 3.9
    `proxy`), and 3.7 wrote the names in the singular, so blocks are known by their shape.
    """
    ai = table(log.get("ai"))
    blocks = [("ai", ai), *ai.items()]
    names: set[str] = set()
    for key, value in blocks:
        block = table(value)
        if "usage" not in block:
            continue
        usage = table(block.get("usage"))
        meta = table(block.get("meta"))
        name = _text(key) or "ai"
        while name in names:  # two events of one id would be counted as one
            name += "~"
        names.add(name)
        tokens = _count(usage.get("prompt_tokens")) or _count(usage.get("prompt_token"))
        if tokens:
            yield name, "input", tokens, meta
        tokens = _count(usage.get("completion_tokens")) or _count(usage.get("completion_token"))
        if tokens:
            yield name, "output", tokens, meta


class _Clock:
    """RFC 3339 with milliseconds; the part up to the second is made once per second, not per event."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = (-1, "")

    def text(self, milliseconds: int) -> str:
        second, rest = divmod(milliseconds, 1000)
        known, prefix = self._last  # one object: under kong-pdk other threads write it meanwhile
        if second != known:
            prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._last = (second, prefix)
        return f"{prefix}.{rest:03d}Z"


_clock = _Clock()


def rfc3339(milliseconds: int) -> str:
    """Return a time in milliseconds since 1970 as RFC 3339 in UTC with milliseconds."""
    return _clock.text(milliseconds)


def outcome(
    log: object, application: object, rules: Rules, *, now_ms: int, new_id: Callable[[], str]
) -> Outcome:
    """Return a request's events, or why there are none, or what must still be asked of Kong.

    `application` is the content of `kong.ctx.shared.kaa_application_context`, or UNASKED. `now_ms`
    and `new_id` stand in where the log has no time or no request id. Never raises on any JSON value.
    """
    if type(log) is not dict:
        return SkipReason.BAD_RECORD
    if application is UNASKED and rules.application_context == "always":
        return Needs.APPLICATION
    subject = _subject(log, application, rules)
    if isinstance(subject, (SkipReason, Needs)):
        return subject

    request_id = _identifier(table(log.get("request")).get("id")) or new_id()
    started_at = _count(log.get("started_at"))
    stamp = rfc3339(started_at if started_at and started_at <= _LATEST_TIME else now_ms)
    common = _common_data(log, application)
    for attribute in rules.attributes:
        put(common, attribute.property_name, _text(_requested(log, attribute.place, attribute.name)))

    def event(event_id: str, kind: str, data: Event) -> Event:
        return {
            "specversion": "1.0",
            "id": event_id,
            "source": rules.source,
            "type": kind,
            "subject": subject,
            "time": stamp,
            "data": data,
        }

    events: list[Event] = []
    if rules.meter_api_requests:
        events.append(event(request_id, API_REQUEST, _request_data(log) | common))
    if rules.meter_ai_token_usage and "ai" in log:
        for key, direction, tokens, meta in _ai_usage(log):
            data: Event = {"tokens": tokens, "type": direction}
            put(data, "model", _text(meta.get("request_model")) or _text(meta.get("response_model")))
            put(data, "provider", _text(meta.get("provider_name")))
            events.append(event(f"{request_id}:{key}:{direction}", LLM_REQUEST, data | common))
    return events or SkipReason.NOTHING_TO_METER


RESERVED_DATA_KEYS: Final = frozenset(
    {
        *("request_method", "route_name", "route_id", "service_name", "service_id", "status"),
        *("response_source", "request_bytes", "response_bytes", "latency_ms", "upstream_latency_ms"),
        *("consumer_id", "consumer_username", "application_id", "workspace"),
        *("tokens", "type", "model", "provider"),
    }
)
"""The properties of an event's data that we fill; a configured attribute must not take their place."""
