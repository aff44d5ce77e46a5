"""Helpers for metering tests: the decision for a log under some rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from typing import Any

import orjson

from openmeter_plugin.kong import codec
from openmeter_plugin.metering.event import Decision, decide, encode_event
from openmeter_plugin.metering.kong_log import QueryResults, decode_log
from openmeter_plugin.metering.rules import Lookup, Rules
from tests.harness.recordings import application_context, serialized

NOW = 1_800_000_000_123
NOW_TEXT = "2027-01-15T08:00:00.123Z"
RULES = Rules(source="kong-test")

ALICE = "b32379d9-3d28-5683-a79c-72139be6e34f"
BOB = "def4f7d3-9863-5ad2-8fa9-c949bf26f55e"
APPLICATION = "b15e2460-ba40-431d-9df0-4957fcffacda"
CONTEXT = codec.decode_value(application_context())

Log = dict[str, Any]


def ids() -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"random-{next(numbers)}"


def decided(
    log: object, results: QueryResults, rules: Rules = RULES, new_id: Callable[[], str] | None = None
) -> Decision:
    """Return the decision for a log that Kong sends as JSON."""
    raw = json.dumps(log).encode()
    return decide(decode_log(raw), results, rules, lambda: NOW, new_id or ids())


def result(log: object, application: object = None, rules: Rules = RULES, captures: object = None) -> Any:
    """Return the decision, with events as JSON."""
    found = decided(log, QueryResults(application, captures), rules)
    return [orjson.loads(encode_event(event)) for event in found] if isinstance(found, list) else found


def events(
    log: object, application: object = None, rules: Rules = RULES, captures: object = None
) -> list[dict[str, Any]]:
    found = result(log, application, rules, captures)
    assert isinstance(found, list), found
    return found


def only(
    log: object, application: object = None, rules: Rules = RULES, captures: object = None
) -> dict[str, Any]:
    (event,) = events(log, application, rules, captures)
    return event


def authenticated(**changes: object) -> Log:
    return serialized("authenticated").parsed | changes


def looking(*lookups: Lookup, **settings: Any) -> Rules:
    return Rules(source="kong-test", lookups=lookups, **settings)


ECHO_ROUTE = "bf3c18fd-347d-5497-8230-0441f2ad7a65"

USAGE = {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18}
META = {"provider_name": "openai", "request_model": "gpt-4o", "response_model": "gpt-4o-2024"}

SHAPES = {
    "3.6 flat": ({"usage": USAGE, "meta": META}, ["ai"]),
    "3.7 singular": (
        {
            "ai-proxy": {
                "usage": {"prompt_token": 7, "completion_token": 11, "total_tokens": 18},
                "meta": META,
            }
        },
        ["ai-proxy"],
    ),
    "3.8 per plugin": (
        {
            "ai-proxy": {"usage": USAGE | {"time_per_token": 3.5, "cost": 0.01}, "meta": META, "cache": {}},
            "ai-request-transformer": {"usage": USAGE, "meta": META},
        },
        ["ai-proxy", "ai-request-transformer"],
    ),
    "3.9 proxy": ({"proxy": {"usage": USAGE | {"cost": 0}, "meta": META | {"plugin_id": "p"}}}, ["proxy"]),
}
