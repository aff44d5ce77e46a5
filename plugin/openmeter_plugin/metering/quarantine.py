"""Quarantine records: a redacted request log with a reason, and the events that a replay makes of it.

A record holds what an event may be made of, and nothing else. So a replay can take the subject from the
consumer (its tags too), from the application, or bill a fixed one. Headers and query arguments are not
kept, because they often hold credentials, and a subject that comes from one of them is lost with them.
Attributes are kept as values if the configuration was usable. If it was not, only consumer tags and
constants can be read again at replay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from openmeter_plugin.metering.event import Quarantined, decide
from openmeter_plugin.metering.kong_log import log_of
from openmeter_plugin.metering.lenient_json import identifier, json_object, put, usable_time
from openmeter_plugin.metering.pdk_queries import QueryResults
from openmeter_plugin.metering.rules import Rules, SkipReason
from openmeter_plugin.metering.subject import is_anonymous

_LOG_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "request": ("id", "method", "size"),
    "response": ("status", "size"),
    "latencies": ("request", "proxy"),
    "route": ("id", "name"),
    "service": ("id", "name"),
    "consumer": ("id", "username", "custom_id"),
    "authenticated_entity": ("id",),
}
_USAGE_FIELDS: Final = ("prompt_tokens", "completion_tokens", "prompt_token", "completion_token")
_META_FIELDS: Final = ("request_model", "response_model", "provider_name")
_APPLICATION_FIELDS: Final = ("application_id", "developer_id", "portal_id", "organization_id")


def redacted(log: object) -> dict[str, Any]:
    """Return a copy of the log that holds only what an event may be made of, in the same shape.

    `event.decide` makes the same events of it. Headers and query arguments are removed, so lookups there
    find nothing.
    """
    source = json_object(log)
    kept: dict[str, Any] = {}
    for key, names in _LOG_FIELDS.items():
        put(kept, key, _scalars(source.get(key), names))
    kept |= _scalars(source, ("started_at", "source", "workspace_name")) or {}
    tags = json_object(source.get("consumer")).get("tags")
    if "consumer" in kept and type(tags) is list:
        kept["consumer"]["tags"] = [tag for tag in tags if type(tag) is str]
    decoded = log_of(log)
    if decoded is not None and is_anonymous(decoded):
        kept.setdefault("request", {})["headers"] = {"x-anonymous-consumer": "true"}
    put(kept, "ai", _redacted_ai(json_object(source.get("ai"))))
    return kept


def redacted_application(application: object) -> dict[str, Any] | None:
    """Return the known ids of an application context; newer gateways may put more into it."""
    return _scalars(application, _APPLICATION_FIELDS)


def _redacted_ai(ai: Mapping[str, Any]) -> dict[str, Any] | None:
    blocks = {
        key: _ai_block(json_object(block)) for key, block in ai.items() if "usage" in json_object(block)
    }
    return (_ai_block(ai) | blocks) or None


def _ai_block(block: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    put(kept, "usage", _scalars(block.get("usage"), _USAGE_FIELDS))
    put(kept, "meta", _scalars(block.get("meta"), _META_FIELDS))
    return kept


def _scalars(value: object, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the named members that are text or numbers, or None if there are none."""
    source = json_object(value)
    kept = {name: source[name] for name in names if type(source.get(name)) in (str, int, float)}
    return kept or None


def quarantine_record(
    reason: str,
    log: object,
    results: QueryResults,
    attributes: Mapping[str, Any] | None = None,
    *,
    destination: str | None = None,
    now_ms: int,
    new_id: Callable[[], str],
) -> dict[str, Any]:
    """Return the record that the spool keeps of a request in quarantine.

    A request without an id or a time gets them now, so that its events are the same at each replay.
    """
    kept = redacted(log)
    request = kept.setdefault("request", {})
    if identifier(request.get("id")) is None:
        request["id"] = new_id()
    if usable_time(kept.get("started_at")) is None:
        kept["started_at"] = now_ms
    record = {"reason": reason, "log": kept, "application": redacted_application(results.application)}
    if attributes:
        record["attributes"] = dict(attributes)
    if destination is not None:
        record["destination"] = destination
    return record


def replay_record(record: object, rules: Rules) -> list[dict[str, Any]] | SkipReason | Quarantined:
    """Return the events of a quarantined record under these rules, or why there are none."""
    kept = json_object(record)
    results = QueryResults(application=kept.get("application"), captures=None)
    log = log_of(json_object(kept.get("log")))
    decision = decide(log, results, rules, lambda: 0, lambda: "replayed")
    if isinstance(decision, (SkipReason, Quarantined)):
        return decision
    if not isinstance(decision, list):
        raise TypeError("a PDK query, although each has a result")
    events: list[dict[str, Any]] = [msgspec.to_builtins(event) for event in decision]
    attributes = json_object(kept.get("attributes"))
    return [event | {"data": dict(attributes) | event["data"]} for event in events]
