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

from openmeter_plugin.metering.ai_usage import (
    EVENT_STREAM,
    FIELD,
    MODEL_HEADER,
    blocks,
    is_event_stream,
    kong_version,
    statistics_off,
)
from openmeter_plugin.metering.event import Quarantined, decide
from openmeter_plugin.metering.kong_log import QueryResults, log_of
from openmeter_plugin.metering.lenient_json import count, identifier, json_object, put, usable_time
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
_META_FIELDS: Final = ("request_model", "response_model", "provider_name", "request_mode", "llm_latency")
_EMBEDDINGS_FIELDS: Final = (
    *("embeddings_tokens", "embeddings_provider", "embeddings_model", "embeddings_latency"),
)
_MCP_FIELDS: Final = ("method", "tool_name", "latency", "response_body_size")
_A2A_FIELDS: Final = ("method", "binding", "task_state", "context_id", "latency", "response_body_size")
_MAX_DETAILS: Final = 2  # usage.input_tokens_details.cached_tokens_details
_MEMBERS: Final = ("started_at", "source", "upstream_status", "workspace_name", "openmeter_gate")
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
    kept |= _scalars(source, _MEMBERS) or {}
    tags = json_object(source.get("consumer")).get("tags")
    if "consumer" in kept and type(tags) is list:
        kept["consumer"]["tags"] = [tag for tag in tags if type(tag) is str]
    decoded = log_of(log)
    if decoded is not None and is_anonymous(decoded):
        kept.setdefault("request", {})["headers"] = {"x-anonymous-consumer": "true"}
    if ai := _redacted_ai(json_object(source.get("ai"))):
        kept["ai"] = ai
    if headers := _ai_headers(source):
        kept.setdefault("response", {})["headers"] = headers
    return kept


def _ai_headers(log: Mapping[str, Any]) -> dict[str, str]:
    """Return what the AI rules read of the response's headers, without any value that an upstream chose."""
    response, ai = json_object(log.get("response")), json_object(log.get("ai"))
    headers, kept = json_object(response.get("headers")), {}
    if statistics_off({"headers": headers}, ai, ()):
        kept[MODEL_HEADER] = "seen"
    if not ai:
        return kept
    if version := kong_version(log):
        kept["via"] = f"1.1 kong/{'.'.join(map(str, version))}"
    if is_event_stream(headers):
        kept["content-type"] = EVENT_STREAM
    return kept


def redacted_application(application: object) -> dict[str, Any] | None:
    """Return the known ids of an application context; newer gateways may put more into it."""
    return _scalars(application, _APPLICATION_FIELDS)


def _redacted_ai(ai: Mapping[str, Any]) -> dict[str, Any] | None:
    kept: dict[str, Any] = {}
    for block in blocks(ai):
        _put_at(kept, block.keys, _ai_block(block.table))
    for name, fields in (("mcp", _MCP_FIELDS), ("a2a", _A2A_FIELDS)):
        agent = json_object(ai.get(name))
        if type(entries := agent.get("rpc")) is list:
            kept[name] = {"rpc": [_rpc(entry, fields) for entry in entries]}
            put(kept[name], "mcp_session_id", identifier(agent.get("mcp_session_id")))
    return kept or None


def _put_at(kept: dict[str, Any], keys: tuple[str, ...], values: dict[str, Any]) -> None:
    """Put a block's values where the block was, unless it has none."""
    if values:
        for key in keys:
            kept = kept.setdefault(key, {})
        kept.update(values)


def _ai_block(block: Mapping[str, Any]) -> dict[str, Any]:
    kept = _scalars(block, _EMBEDDINGS_FIELDS) or {}
    put(kept, "usage", _numbers(block.get("usage"), 0))
    put(kept, "meta", _scalars(block.get("meta"), _META_FIELDS))
    put(kept, "cache", _scalars(block.get("cache"), ("cache_status",)))
    return kept


def _numbers(value: object, depth: int) -> dict[str, Any] | None:
    """Return the numbers of a table of usage and of the tables of details in it; a number may be text."""
    kept: dict[str, Any] = {}
    for name, inner in json_object(value).items():
        if not FIELD.fullmatch(name):
            continue
        if type(inner) is dict and depth < _MAX_DETAILS:
            put(kept, name, _numbers(inner, depth + 1))
        elif type(inner) in (int, float) or count(inner) is not None:
            kept[name] = inner
    return kept or None


def _rpc(entry: object, fields: tuple[str, ...]) -> dict[str, Any]:
    kept = _scalars(entry, fields) or {}
    if json_object(entry).get("error"):
        kept["error"] = True
    if type(streaming := json_object(entry).get("streaming")) is bool:
        kept["streaming"] = streaming
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
