"""Metering decision: turn the log of one request into its CloudEvents, as a pure function.

`decide` is the only place that decides what is billed, for every input. It reads a decoded log (`kong_log`),
has no I/O, and never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import Struct

from openmeter_plugin.metering.ai_events import (
    LLM_CACHE_HIT,
    LLM_REQUEST,
    TOKEN_PROPERTIES,
    IdentifiedData,
    ai_events,
    reports_no_usage,
)
from openmeter_plugin.metering.ai_usage import GAP_PROPERTY, MODEL_HEADER, AiUsageGap, worst_gap
from openmeter_plugin.metering.kong_log import (
    NO_VALUE,
    NOT_QUERIED,
    Entity,
    KongLog,
    Latencies,
    PdkQuery,
    QueryResults,
    Request,
    Response,
    members,
)
from openmeter_plugin.metering.lenient_json import (
    MAX_COUNT,
    MAX_TEXT,
    count,
    encode_json,
    first,
    json_object,
    rfc3339,
    text,
)
from openmeter_plugin.metering.rules import Attribute, AttributePlace, Filters, Rules, SkipReason
from openmeter_plugin.metering.subject import find_subject

API_REQUEST: Final = "kong.api_request"


class RequestData(Struct, omit_defaults=True, gc=False):
    """The data of an event `kong.api_request`, in the order of the event; what the log lacks, it lacks."""

    request_method: str | None = None
    response_source: str | None = None
    status: int | None = None
    response_bytes: int | None = None
    request_bytes: int | None = None
    latency_ms: int | None = None
    upstream_latency_ms: int | None = None
    route_name: str | None = None
    route_id: str | None = None
    service_name: str | None = None
    service_id: str | None = None
    consumer_id: str | None = None
    consumer_username: str | None = None
    application_id: str | None = None
    workspace: str | None = None
    ai_usage_gap: str | None = None


class Event(Struct, gc=False):
    """A CloudEvent. `data` is a JSON object, or the struct of one, which costs less to make and to encode."""

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    data: RequestData | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A request whose payer is not known yet, with the values of its attributes but not their sources."""

    reason: SkipReason
    attributes: dict[str, Any]


Decision = list[Event] | SkipReason | Quarantined | PdkQuery

RESERVED_DATA_KEYS: Final = frozenset(RequestData.__struct_fields__) | TOKEN_PROPERTIES
"""The properties of Kong's own plugin and those that are billed by: no attribute sets them in any event."""

_NO_REQUEST: Final = Request()
_NO_RESPONSE: Final = Response()
_NO_LATENCIES: Final = Latencies()
_NO_ENTITY: Final = Entity()


def decide(
    log: KongLog | None,
    results: QueryResults,
    rules: Rules,
    now_ms: Callable[[], int],
    new_id: Callable[[], str],
) -> Decision:
    """Return the request's events, or why there are none, or the PDK query that must come first.

    `now_ms` and `new_id` are used if the log has no time or no request id.
    """
    if log is None:
        return SkipReason.BAD_RECORD
    if excluded := _excluded(log, rules):
        return excluded
    if rules.application_context == "always" and results.application is NOT_QUERIED:
        return PdkQuery.APPLICATION
    subject, reason = find_subject(log, results.application, rules), None
    if type(subject) is not str:  # rarely; `isinstance` costs 0.1 us for an enumeration
        if isinstance(subject, PdkQuery):
            return subject
        reason = SkipReason(subject)
        if rules.missing == "skip" or not _has_usage(log, rules):
            return reason
        subject = rules.fallback_subject
    if rules.queries_captures and results.captures is NOT_QUERIED and log.route is not None:
        return PdkQuery.CAPTURES
    attributes = attribute_values(log, results.captures, rules.attributes) if rules.attributes else None
    if reason is not None and rules.missing == "quarantine":
        return Quarantined(reason, attributes or {})
    events = _events(log, results.application, rules, subject, now_ms, new_id)
    # A call to a model is a POST: 0.4 us less for all other requests.
    if (
        log.request is not None
        and log.request.method == "POST"
        and rules.ai.token_usage
        and _hides_usage(log, events, rules)
    ):
        if not events:
            return SkipReason.AI_STATISTICS_OFF
        _note_gap(events[0], AiUsageGap.STATISTICS_OFF)
    if attributes:
        _add_attributes(events, attributes)
    return events or SkipReason.NOTHING_TO_METER


def _add_attributes(events: Iterable[Event], attributes: dict[str, Any]) -> None:
    for event in events:
        data = event.data
        # What the plugin knows of an AI call or an agent's request wins over an attribute of that name.
        event.data = attributes | data if isinstance(data, dict) else msgspec.to_builtins(data) | attributes


def _excluded(log: KongLog, rules: Rules) -> SkipReason | None:
    if type(log.openmeter_gate) is str and log.openmeter_gate:
        return SkipReason.GATE_STOPPED  # before the filters: what the gate stopped is never billed
    return None if rules.filters is None else exclusion_reason(log, rules.filters)


def exclusion_reason(log: KongLog, filters: Filters) -> SkipReason | None:
    """Return why the filters exclude the request (the first reason), or None if they do not.

    A request without the filtered member is excluded: filters list what is metered. Filters are checked
    first, so that an excluded request costs no PDK query.
    """
    request, response = log.request or _NO_REQUEST, log.response or _NO_RESPONSE
    if filters.statuses is not None and response.status not in filters.statuses:
        return SkipReason.STATUS_EXCLUDED
    if filters.methods is not None and request.method not in filters.methods:
        return SkipReason.METHOD_EXCLUDED
    if filters.routes is not None and not _is_in(log.route, filters.routes):
        return SkipReason.ROUTE_EXCLUDED
    if filters.services is not None and not _is_in(log.service, filters.services):
        return SkipReason.SERVICE_EXCLUDED
    if filters.response_sources is not None and log.source not in filters.response_sources:
        return SkipReason.RESPONSE_SOURCE_EXCLUDED
    if filters.upstream_answered and not _upstream_answered(log):
        return SkipReason.UNANSWERED_EXCLUDED
    return None


def _upstream_answered(log: KongLog) -> bool:
    """Return whether the response is the upstream's: Kong did not make it, and the last attempt has a status.

    nginx logs a status for each attempt, separated by `,` or `:`. It is `-` without an answer, for example if
    the client is gone (status 499), and empty without an attempt, for example if the client is gone while it
    sends its body (status 400). Kong logs both with the source `upstream`. For an upstream that refuses or
    closes the connection, nginx logs 502 or 504, and the source is `kong`.
    """
    status = log.upstream_status
    if type(status) is str:
        status = status.replace(":", ",").rpartition(",")[2].strip()
    return log.source != "kong" and bool(count(status))


def _is_in(entity: Entity | None, wanted: frozenset[str]) -> bool:
    return entity is not None and (entity.name in wanted or entity.id in wanted)


def _has_usage(log: KongLog, rules: Rules) -> bool:
    return rules.meter_api_requests or any(_ai_events(log, rules, ""))


def _ai_events(log: KongLog, rules: Rules, request_id: str) -> Iterable[IdentifiedData]:
    if log.ai is NO_VALUE or not rules.reads_ai:
        return ()
    return ai_events(_members_read(log), rules.ai, request_id)


_TOKEN_EVENTS: Final = frozenset({LLM_REQUEST, LLM_CACHE_HIT})
_MODEL_HEADER: Final = MODEL_HEADER.encode()


def _hides_usage(log: KongLog, events: Iterable[Event], rules: Rules) -> bool:
    """Return whether an AI plugin answered the request but logged no tokens."""
    if log.ai is NO_VALUE:
        # Nearly every request: the headers are searched undecoded.
        if log.response is None or _MODEL_HEADER not in bytes(log.response.headers):
            return False
    elif any(event.type in _TOKEN_EVENTS for event in events):
        return False  # `reports_no_usage` would decode and read them again
    return reports_no_usage(_members_read(log), rules.ai)


def _note_gap(event: Event, gap: AiUsageGap) -> None:
    if isinstance(event.data, dict):
        event.data[GAP_PROPERTY] = gap
    else:
        event.data.ai_usage_gap = gap


def usage_gap(events: Iterable[Event]) -> str | None:
    """Return the worst gap of the AI usage in a request's events, None if there is none."""
    gaps = (
        event.data.get(GAP_PROPERTY) if isinstance(event.data, dict) else event.data.ai_usage_gap
        for event in events
    )
    return worst_gap(map(AiUsageGap, filter(None, gaps)))


def _members_read(log: KongLog) -> dict[str, Any]:
    """Return the members that the AI rules read, decoded."""
    response = log.response or _NO_RESPONSE
    return {
        "ai": members(log.ai),
        "response": {"status": response.status, "headers": members(response.headers)},
    }


def _events(
    log: KongLog,
    application: object,
    rules: Rules,
    subject: str,
    now_ms: Callable[[], int],
    new_id: Callable[[], str],
) -> list[Event]:
    """Return the events of a request whose payer is known."""
    request = log.request or _NO_REQUEST
    request_id = request.id or new_id()
    time = rfc3339(log.started_at or now_ms())
    shared = _shared_data(log, application)
    events: list[Event] = []
    if rules.meter_api_requests:
        response, latencies = log.response or _NO_RESPONSE, log.latencies or _NO_LATENCIES
        proxy = latencies.proxy
        data = RequestData(
            request.method,
            log.source,
            response.status,
            response.size,
            request.size,
            latencies.request,
            proxy if proxy is not None and 0 <= proxy <= MAX_COUNT else None,
            *shared,
        )
        events.append(Event("1.0", request_id, rules.source, API_REQUEST, subject, time, data))
    if rules.reads_ai and log.ai is not NO_VALUE:
        common = {name: value for name, value in zip(_SHARED_NAMES, shared, strict=True) if value is not None}
        for event_id, kind, ai_data in _ai_events(log, rules, request_id):
            events.append(Event("1.0", event_id, rules.source, kind, subject, time, ai_data | common))
    return events


_Shared = tuple[
    str | None, str | None, str | None, str | None, str | None, str | None, str | None, str | None
]
_SHARED_NAMES: Final = RequestData.__struct_fields__[-9:-1]


def _shared_data(log: KongLog, application: object) -> _Shared:
    """Return what the data of all events of a request end with: its route, service, payer and workspace."""
    route, service, consumer = log.route or _NO_ENTITY, log.service or _NO_ENTITY, log.consumer
    consumer_id, username = (None, None) if consumer is None else (consumer.id, consumer.username)
    return (
        route.name,
        route.id,
        service.name,
        service.id,
        consumer_id and consumer_id[:MAX_TEXT],
        username and username[:MAX_TEXT],
        text(application.get("application_id")) if type(application) is dict else None,
        log.workspace_name,
    )


_encode: Final = msgspec.json.Encoder().encode


def encode_event(event: Event) -> bytes:
    """Return the event as JSON; a lone surrogate of the configuration, which UTF-8 lacks, becomes `?`."""
    try:
        return _encode(event)
    except UnicodeEncodeError:
        return encode_json(msgspec.to_builtins(event))


def attribute_values(log: KongLog, captures: object, attributes: tuple[Attribute, ...]) -> dict[str, Any]:
    """Return the event properties that have a value; per property, the first attribute with a value wins."""
    values: dict[str, Any] = {}
    decoded: dict[AttributePlace, Mapping[str, Any]] = {}
    for attribute in attributes:
        place, name = attribute.place, attribute.name
        if attribute.property_name in values:
            continue
        if place == "constant":
            value: object = name
        elif place == "consumer_tag":
            value = _consumer_tag(log, name)
        else:
            if place not in decoded:
                decoded[place] = _MEMBERS[place](log, captures)
            value = first(decoded[place].get(name))
        usable = text(value)
        if usable is not None:
            values[attribute.property_name] = usable
    return values


def _consumer_tag(log: KongLog, name: str) -> str | None:
    """Return the text after `<name>:` in the first of the consumer's tags that starts with it."""
    tags = log.consumer.tags if log.consumer is not None else None
    prefix = f"{name}:"
    for tag in tags if type(tags) is list else ():
        if type(tag) is str and tag.startswith(prefix):
            return tag[len(prefix) :].strip()
    return None


_MEMBERS: Final[Mapping[AttributePlace, Callable[[KongLog, object], Mapping[str, Any]]]] = {
    "header": lambda log, _: members(log.request.headers if log.request else NO_VALUE),
    "query": lambda log, _: members(log.request.querystring if log.request else NO_VALUE),
    "response_header": lambda log, _: members(log.response.headers if log.response else NO_VALUE),
    "path_capture": lambda _, captures: json_object(json_object(captures).get("named")),
}
