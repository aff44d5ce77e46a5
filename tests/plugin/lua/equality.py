"""Whether a record of the Lua plugin and the log of the same request make the same events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Final

import orjson

from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.metering.event import decide, encode_event
from openmeter_plugin.metering.kong_log import QueryResults, decode_log
from openmeter_plugin.metering.lenient_json import parse_log
from openmeter_plugin.metering.quarantine import quarantine_record
from openmeter_plugin.metering.rules import Rules

CONFIG: Final[dict[str, Any]] = {
    "ingest_endpoint": "http://openmeter/api/v1/events",
    "api_token": "the-token-of-the-metering-api",
    "subject": {"look_up_value_in": "consumer", "missing": "fallback", "fallback_subject": "nobody"},
    "application_context": "always",
    "meter_ai_calls": True,
    "attributes": [
        {"source": "header", "look_up_value_in": "X-Tenant", "event_property_name": "tenant"},
        {"source": "query", "look_up_value_in": "t", "event_property_name": "t"},
        {"source": "response_header", "look_up_value_in": "X-Tier", "event_property_name": "tier"},
        {"source": "path_capture", "look_up_value_in": "id", "event_property_name": "captured"},
        {"source": "consumer_tag", "look_up_value_in": "tier", "event_property_name": "consumer_tier"},
    ],
}
"""A configuration that reads something of each kind."""

RULES: Final = parse_config(CONFIG)[1]
_NOW: Final = 1_800_000_000_123
_READ: Final = ("request", "response", "latencies", "route", "service", "consumer", "authenticated_entity")
_ALSO_READ: Final = ("started_at", "source", "upstream_status", "workspace_name", "ai")
_UNREAD: Final = re.compile(r"apikey|[ah]\d+")
"""Headers and arguments of the requests with many of them."""


def decision(raw: bytes, results: QueryResults, rules: Rules) -> Any:
    """Return the decision for a serialized log, and what the quarantine would keep of the request."""
    found = decide(decode_log(raw), results, rules, lambda: _NOW, lambda: "new-id")
    # Sorted: the members of `ai` come in the order of Lua's hash tables, in Kong's own log as well.
    events = sorted(map(encode_event, found)) if isinstance(found, list) else found
    return events, quarantine_record("r", parse_log(raw), results, now_ms=_NOW, new_id=lambda: "new-id")


def of_record(payload: bytes, rules: Rules) -> Any:
    """Return the same for the payload of a record."""
    record = _lenient(payload)
    beyond = record.get("x", {})
    results = QueryResults(
        beyond.get("shared", {}).get("kaa_application_context"),
        {"named": beyond["captures"]} if "captures" in beyond else None,
    )
    return decision(orjson.dumps(record["log"]), results, rules)


def of_log(line: bytes, rules: Rules) -> Any:
    """Return the same for a line of the witness: the log, the application and the captures."""
    said = _lenient(line)
    results = QueryResults(said.get("application"), {"named": said.get("captures") or {}})
    return decision(orjson.dumps(said["log"]), results, rules)


def differences(logs: Iterable[bytes], payloads: Iterable[bytes]) -> list[str]:
    """Return a line for each request whose record and log differ, or of which only one is there."""
    records = {_lenient(payload)["log"]["request"]["id"]: payload for payload in payloads}
    told: list[str] = []
    for line in logs:
        said = _lenient(line)
        if said.get("log") is None:
            told.append(f"kong.log.serialize failed: {said.get('fault')}")
            continue
        # An edit may have replaced the whole request; the record then has the same value.
        request = said["log"].get("request")
        name = request.get("id") if isinstance(request, dict) else None
        record = records.pop(name, None)
        if record is None:
            told.append(f"{name}: no record of {line[:300]!r}")
        elif (expected := of_log(line, RULES)) != (found := of_record(record, RULES)):
            told.append(f"{name}: {found} instead of {expected}")
    return told + [f"{name}: a record, but no log" for name in records]


def compact(line: bytes) -> bytes:
    """Return a line of the witness with the members that an event may be made of."""
    said = _lenient(line)
    if log := said.get("log"):
        said["log"] = {name: _short(value) for name, value in log.items() if name in (*_READ, *_ALSO_READ)}
        for name in ("uri", "url", "tls"):
            if isinstance(said["log"].get("request"), dict):
                said["log"]["request"].pop(name, None)
        for entity in ("route", "service"):
            if isinstance(member := said["log"].get(entity), dict):
                said["log"][entity] = {name: member[name] for name in ("id", "name") if name in member}
    return json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(member) for name, member in value.items() if not _UNREAD.fullmatch(name)}
    return value


def _lenient(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "replace"), strict=False)
