"""Hypothesis strategies for logs, rules and PDK results, and a check of what they decide to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hypothesis import strategies as st

from openmeter_plugin.metering.ai_events import (
    A2A_REQUEST,
    LLM_CACHE_HIT,
    LLM_CALL,
    LLM_REQUEST,
    MCP_REQUEST,
    AiRules,
    compile_unit,
)
from openmeter_plugin.metering.event import API_REQUEST, Quarantined
from openmeter_plugin.metering.kong_log import NOT_QUERIED, PdkQuery
from openmeter_plugin.metering.lenient_json import MAX_TEXT
from openmeter_plugin.metering.rules import Attribute, Filters, Lookup, Rules, SkipReason
from tests.harness.recordings import Recorded, all_serialized, protobuf_requests
from tests.plugin.outcomes import CONTEXT, Log

PLACES = (
    *(Lookup("consumer", "id"), Lookup("consumer", "username"), Lookup("consumer", "custom_id")),
    Lookup("consumer", "tag"),
    *(Lookup("application", "id"), Lookup("application", "portal_id")),
    *(Lookup("header", "host"), Lookup("query", "a")),
)

ATTRIBUTES = (
    *(Attribute("header", "host", "host"), Attribute("query", "b", "b")),
    *(Attribute("response_header", "content-type", "media"), Attribute("path_capture", "id", "captured")),
    *(Attribute("consumer_tag", "tier", "tier"), Attribute("constant", "eu", "region")),
)


def optional_subset(values: Iterable[Any]) -> st.SearchStrategy[frozenset[Any] | None]:
    """Return no filter, or one over some of the values."""
    return st.none() | st.frozensets(st.sampled_from(list(values)), min_size=1)


any_filters = st.none() | st.builds(
    Filters,
    statuses=optional_subset((200, 404, 502)),
    methods=optional_subset(("GET", "POST")),
    routes=optional_subset(("echo", "llm", "bf3c18fd-347d-5497-8230-0441f2ad7a65")),
    services=optional_subset(("echo", "broken")),
    response_sources=optional_subset(("kong", "upstream")),
    upstream_answered=st.booleans(),
)

any_ai_rules = st.builds(
    AiRules,
    token_usage=st.booleans(),
    tokens=st.sampled_from(("kong", "split")),
    cache_hits=st.sampled_from(("bill", "mark", "skip")),
    calls=st.booleans(),
    agent_requests=st.booleans(),
    units=st.sampled_from(((), (compile_unit("credits", "input + 4 * output / reasoning"),))),
)

any_rules = st.builds(
    Rules,
    source=st.just("kong-test"),
    meter_api_requests=st.booleans(),
    ai=any_ai_rules,
    meter_anonymous_consumer=st.booleans(),
    lookups=st.lists(st.sampled_from(PLACES), max_size=4, unique=True).map(tuple),
    require_consumer=st.booleans(),
    missing=st.sampled_from(("skip", "fallback", "quarantine")),
    fallback_subject=st.just("unassigned"),
    attributes=st.lists(st.sampled_from(ATTRIBUTES), max_size=4).map(tuple),
    filters=any_filters,
    application_context=st.sampled_from(("when_needed", "always", "never")),
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(categories=["Cs"]), max_size=2)
    | st.sampled_from(["true", "1" * 5000, "x" * 3000, 12, 1795326543779, -1, 2**53 + 1]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "usage", "meta", "prompt_tokens", "completion_tokens", "ai", "proxy", ""])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)

_counts = st.integers(0, 9999) | st.sampled_from([None, "7", -1, 2.5, True, "x"])
_texts = st.sampled_from(["openai", "anthropic", "bedrock", "xai", "UNSPECIFIED", "", None, 5])
_names = ("cached_tokens", "cache_write_tokens", "audio_tokens", "image_tokens_count", "reasoning_tokens")
_details = st.dictionaries(st.sampled_from(_names), _counts) | json_values
_usage = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("prompt_tokens", "completion_tokens", "input_tokens", "total_tokens", "cost"), _counts
        ),
        **dict.fromkeys(("prompt_tokens_details", "output_tokens_details", "cache_creation"), _details),
        **dict.fromkeys(("cache_read_input_tokens", "output_tokens_reasoning_tokens_count"), _counts),
    },
)
_meta = st.dictionaries(
    st.sampled_from(["provider_name", "request_model", "response_model", "request_mode", "llm_latency"]),
    _texts,
)
_rpc = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("method", "tool_name", "latency", "error", "payload", "context_id", "task_state", "streaming"),
        json_values,
    ),
)
_blocks = st.fixed_dictionaries(
    {},
    optional={
        "usage": _usage,
        "meta": _meta,
        "cache": st.fixed_dictionaries({"cache_status": st.sampled_from(["Hit", "Miss", None])}),
        "rag-inject": st.fixed_dictionaries({"embeddings_tokens": _counts, "embeddings_model": _texts}),
        "embeddings_tokens": _counts,
        "payload": json_values,
    },
)
ai_parts = st.builds(
    lambda flat, blocks, agents: flat | blocks | agents,
    _blocks,
    st.dictionaries(st.sampled_from(["proxy", "ai-proxy", "ai", "a.b", "x" * 3000]), _blocks, max_size=3),
    st.dictionaries(
        st.sampled_from(["mcp", "a2a"]),
        st.fixed_dictionaries({"rpc": st.lists(_rpc | json_values, max_size=3), "mcp_session_id": _texts}),
    ),
)
"""The `ai` part of a log: mostly as Kong writes it, with values of other types in it."""

RECORDINGS = [*all_serialized(), *protobuf_requests()]


def paths(value: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = enumerate(value)
    for key, inner in members:
        yield from paths(inner, (*at, key))


PATHS = {recording.name: list(paths(recording.parsed)) for recording in RECORDINGS}


@st.composite
def damaged_logs(draw: st.DrawFn) -> Log:
    """A recording with up to three of its fields removed or replaced."""
    recording: Recorded = draw(st.sampled_from(RECORDINGS))
    log = recording.parsed
    if draw(st.booleans()):
        log["ai"] = draw(json_values | ai_parts)
    for path in draw(st.lists(st.sampled_from(PATHS[recording.name]), min_size=1, max_size=3)):
        parent: Any = log
        for key in path[:-1]:
            if not isinstance(parent, (dict, list)) or (isinstance(parent, dict) and key not in parent):
                break
            if isinstance(parent, list) and not (isinstance(key, int) and key < len(parent)):
                break
            parent = parent[key]
        else:
            if isinstance(parent, dict):
                if draw(st.booleans()):
                    parent.pop(path[-1], None)
                else:
                    parent[path[-1]] = draw(json_values)
    return log


applications = st.one_of(st.just(NOT_QUERIED), st.just(CONTEXT), json_values)
captures = st.one_of(st.just(NOT_QUERIED), st.just({"named": {"id": "7"}}), json_values)

EVENT_TYPES = (API_REQUEST, LLM_REQUEST, LLM_CACHE_HIT, LLM_CALL, MCP_REQUEST, A2A_REQUEST)
REQUIRED = ("specversion", "id", "source", "type", "subject", "time", "data")


def assert_valid(decision: Any) -> None:
    if isinstance(decision, (SkipReason, PdkQuery)):
        return
    if isinstance(decision, Quarantined):
        assert type(decision.reason) is SkipReason
        assert all(
            type(value) is str and 0 < len(value) <= MAX_TEXT for value in decision.attributes.values()
        )
        return
    assert type(decision) is list
    assert decision
    assert len({event["id"] for event in decision}) == len(decision)
    for event in decision:
        assert tuple(event) == REQUIRED
        assert all(type(event[name]) is str and event[name] for name in REQUIRED[:-1])
        assert event["type"] in EVENT_TYPES
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
        for value in event["data"].values():
            assert type(value) in (str, int, float, bool)
            assert value != ""
            assert len(value) <= MAX_TEXT if isinstance(value, str) else abs(value) <= 2**58
        if event["type"] in (LLM_REQUEST, LLM_CACHE_HIT):
            assert event["data"]["tokens"] >= 0
            assert event["data"]["type"] in ("input", "cache_read", "cache_write", "output", "reasoning")
        json.loads(json.dumps(event, allow_nan=False))
