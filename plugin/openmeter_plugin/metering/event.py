"""Metering decision: turn one serialized request log into its CloudEvents, as a pure function.

The log is what `kong.log.serialize` returns (recordings in tests/data/kong-wire). Any field may be missing
or have another type: every access tolerates that, and nothing here raises. Only named fields are copied,
because the log also holds API keys, cookies and query strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from openmeter_plugin.metering.ai_events import AI_PROPERTIES, ai_events
from openmeter_plugin.metering.attributes import attribute_values
from openmeter_plugin.metering.lenient_json import (
    MAX_COUNT,
    MAX_TEXT,
    count,
    identifier,
    json_object,
    put,
    rfc3339,
    text,
    usable_time,
)
from openmeter_plugin.metering.pdk_queries import NOT_QUERIED, PdkQuery, QueryResults
from openmeter_plugin.metering.rules import Filters, Rules, SkipReason
from openmeter_plugin.metering.subject import find_subject

API_REQUEST: Final = "kong.api_request"

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A request whose payer is not known yet, with the values of its attributes but not their sources."""

    reason: SkipReason
    attributes: Event


Decision = list[Event] | SkipReason | Quarantined | PdkQuery

_Members = tuple[tuple[str, str], ...]
"""Members of an object in the log, each with the event property that it becomes."""

_COMMON_TEXTS: Final[tuple[tuple[str, _Members], ...]] = (
    ("route", (("name", "route_name"), ("id", "route_id"))),
    ("service", (("name", "service_name"), ("id", "service_id"))),
    ("consumer", (("id", "consumer_id"), ("username", "consumer_username"))),
)
_REQUEST_COUNTS: Final[tuple[tuple[str, _Members], ...]] = (
    ("response", (("status", "status"), ("size", "response_bytes"))),
    ("request", (("size", "request_bytes"),)),
    # proxy is -1 if Kong itself answered: no upstream, no latency.
    ("latencies", (("request", "latency_ms"), ("proxy", "upstream_latency_ms"))),
)


def decide(
    log: object, results: QueryResults, rules: Rules, *, now_ms: int, new_id: Callable[[], str]
) -> Decision:
    """Return the request's events, or why there are none, or the PDK query that must come first.

    `now_ms` and `new_id` are used if the log has no time or no request id. No JSON value makes it raise.
    """
    if type(log) is not dict:
        return SkipReason.BAD_RECORD
    if rules.filters is not None and (excluded := exclusion_reason(log, rules.filters)):
        return excluded
    if rules.application_context == "always" and results.application is NOT_QUERIED:
        return PdkQuery.APPLICATION
    subject = find_subject(log, results.application, rules)
    if isinstance(subject, PdkQuery):
        return subject
    if isinstance(subject, SkipReason) and (rules.missing == "skip" or not _has_usage(log, rules)):
        return subject
    if rules.queries_captures and results.captures is NOT_QUERIED and log.get("route"):
        return PdkQuery.CAPTURES
    attributes = attribute_values(log, results.captures, rules.attributes) if rules.attributes else {}
    if isinstance(subject, SkipReason):
        if rules.missing == "quarantine":
            return Quarantined(subject, attributes)
        subject = rules.fallback_subject
    common = _common_data(log, results.application)
    common.update(attributes)
    request_id = identifier(json_object(log.get("request")).get("id")) or new_id()
    stamp = rfc3339(usable_time(log.get("started_at")) or now_ms)
    return [
        {
            "specversion": "1.0",
            "id": event_id,
            "source": rules.source,
            "type": kind,
            "subject": subject,
            "time": stamp,
            "data": data,
        }
        for event_id, kind, data in _usage(log, rules, request_id, common)
    ] or SkipReason.NOTHING_TO_METER


def exclusion_reason(log: Mapping[str, Any], filters: Filters) -> SkipReason | None:
    """Return why the filters exclude the request (the first reason), or None if they do not.

    A request without the filtered field is excluded: filters list what is metered. Filters are checked
    first, so that an excluded request costs no PDK query.
    """
    if filters.statuses is not None and _status(log) not in filters.statuses:
        return SkipReason.STATUS_EXCLUDED
    if filters.methods is not None and not _is_in(
        json_object(log.get("request")), ("method",), filters.methods
    ):
        return SkipReason.METHOD_EXCLUDED
    if filters.routes is not None and not _is_in(
        json_object(log.get("route")), ("name", "id"), filters.routes
    ):
        return SkipReason.ROUTE_EXCLUDED
    if filters.services is not None and not _is_in(
        json_object(log.get("service")), ("name", "id"), filters.services
    ):
        return SkipReason.SERVICE_EXCLUDED
    if filters.response_sources is not None and not _is_in(log, ("source",), filters.response_sources):
        return SkipReason.RESPONSE_SOURCE_EXCLUDED
    return None


def _status(log: Mapping[str, Any]) -> int | None:
    return count(json_object(log.get("response")).get("status"))


def _is_in(members: Mapping[str, Any], names: tuple[str, ...], wanted: frozenset[str]) -> bool:
    return any(type(value := members.get(name)) is str and value in wanted for name in names)


def _has_usage(log: Mapping[str, Any], rules: Rules) -> bool:
    return bool(_usage(log, rules, "", {}))


def _usage(
    log: Mapping[str, Any], rules: Rules, request_id: str, common: Event
) -> list[tuple[str, str, Event]]:
    """Return the id, type and data of each of the request's events."""
    usage: list[tuple[str, str, Event]] = []
    if rules.meter_api_requests:
        usage.append((request_id, API_REQUEST, _request_data(log) | common))
    if rules.reads_ai and "ai" in log:
        usage += [(i, kind, data | common) for i, kind, data in ai_events(log, rules.ai, request_id)]
    return usage


def _common_data(log: Mapping[str, Any], application: object) -> Event:
    """Return the properties that request and token events share: the payer, route and service."""
    data: Event = {}
    for record, members in _COMMON_TEXTS:
        source = log.get(record)
        if type(source) is dict:
            for member, name in members:
                value = source.get(member)
                if type(value) is str and value:
                    data[name] = value if len(value) <= MAX_TEXT else value[:MAX_TEXT]
    if type(application) is dict:
        put(data, "application_id", text(application.get("application_id")))
    put(data, "workspace", text(log.get("workspace_name")))
    return data


def _request_data(log: Mapping[str, Any]) -> Event:
    data: Event = {}
    put(data, "request_method", text(json_object(log.get("request")).get("method")))
    put(data, "response_source", text(log.get("source")))
    for record, members in _REQUEST_COUNTS:
        source = log.get(record)
        if type(source) is dict:
            for member, name in members:
                value = source.get(member)
                if type(value) is int and 0 <= value <= MAX_COUNT:  # nearly always
                    data[name] = value
                else:
                    put(data, name, count(value))
    return data


def _properties(records: Iterable[tuple[str, _Members]]) -> set[str]:
    return {name for _, members in records for _, name in members}


RESERVED_DATA_KEYS: Final = frozenset(
    _properties(_COMMON_TEXTS)
    | _properties(_REQUEST_COUNTS)
    | {"request_method", "response_source", "application_id", "workspace"}
    | AI_PROPERTIES
)
"""The event properties that the plugin fills itself; a configured attribute cannot replace them."""
