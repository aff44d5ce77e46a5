"""Events of AI traffic: what the settings make of a log's AI calls and of its agents' requests."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given

from openmeter_plugin.metering.ai_events import AiRules, ai_events, compile_unit
from openmeter_plugin.metering.rules import Attribute, Rules
from tests.plugin.any_logs import ai_parts, json_values
from tests.plugin.outcomes import authenticated
from tests.plugin.outcomes import events as decided

USAGE = {
    "prompt_tokens": 100,
    "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": 10},
    "completion_tokens": 20,
    "completion_tokens_details": {"reasoning_tokens": 15},
    "total_tokens": 120,
    "cost": 0.00033,
    "time_to_first_token": 631,
}
META = {
    "provider_name": "openai",
    "request_model": "gpt-4o",
    "response_model": "gpt-4o-2024",
    "request_mode": "stream",
    "llm_latency": 2670,
}
CACHE_HIT = {"cache": {"cache_status": "Hit", "fetch_latency": 12}}

MCP = {
    "mcp_session_id": "abc123session",
    "rpc": [
        {
            "method": "tools/call",
            "latency": 6,
            "id": "2",
            "response_body_size": 5030,
            "tool_name": "list_orders",
            "payload": {"request": "a secret", "response": "another secret"},
        },
        {"method": "initialize", "error": "the secret 4711 is wrong"},
    ],
}
A2A = {
    "rpc": [
        {
            "method": "message/send",
            "binding": "jsonrpc",
            "task_state": "completed",
            "context_id": "ctx-1",
            "streaming": True,
            "latency": 12,
        }
    ]
}


def found(
    ai: object, rules: AiRules | None = None, *, status: int = 200
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return type and data of each event by the end of its id."""
    log = {"ai": ai, "response": {"status": status}}
    events = list(ai_events(log, rules or AiRules(), "r"))
    assert len({event_id for event_id, _, _ in events}) == len(events)
    return {event_id.removeprefix("r:"): (kind, data) for event_id, kind, data in events}


def proxy(**more: Any) -> dict[str, Any]:
    return {"proxy": {"usage": USAGE, "meta": META, **more}}


def test_kong_s_way_is_one_event_for_the_input_and_one_for_the_output() -> None:
    model = {"model": "gpt-4o", "provider": "openai"}
    assert found(proxy()) == {
        "proxy:input": ("kong.llm_request", {"tokens": 100, "type": "input"} | model),
        "proxy:output": ("kong.llm_request", {"tokens": 20, "type": "output"} | model),
    }


def test_split_tokens_are_one_event_per_type_and_modality() -> None:
    events = found(proxy(), AiRules(tokens="split"))
    assert {name: (data["type"], data["modality"], data["tokens"]) for name, (_, data) in events.items()} == {
        "proxy:input": ("input", "text", 30),
        "proxy:input:audio": ("input", "audio", 10),
        "proxy:cache_read": ("cache_read", "text", 60),
        "proxy:output": ("output", "text", 5),
        "proxy:reasoning": ("reasoning", "text", 15),
    }


@pytest.mark.slow
@given(ai_parts)
def test_split_tokens_add_up_to_kong_s_sums_whatever_kong_logs(ai: dict[str, Any]) -> None:
    sums = {
        mode: sum(data.get("tokens", 0) for _, data in found(ai, AiRules(tokens=mode)).values())
        for mode in ("kong", "split")
    }
    assert sums["kong"] == sums["split"]


def test_the_ids_of_input_and_output_do_not_depend_on_the_setting() -> None:
    assert set(found(proxy())) <= set(found(proxy(), AiRules(tokens="split")))


def test_a_call_that_used_no_token_is_one_event_with_0_so_that_calls_can_be_counted() -> None:
    events = found({"proxy": {"usage": {"prompt_tokens": 0, "completion_tokens": 0}, "meta": META}})
    assert {name: data["tokens"] for name, (_, data) in events.items()} == {"proxy:input": 0}


def test_a_refused_call_that_used_no_token_is_no_event() -> None:
    assert found({"proxy": {"usage": {"prompt_tokens": 0}, "meta": META}}, status=400) == {}


def test_a_failed_call_is_billed_for_what_it_used() -> None:
    assert len(found(proxy(), status=502)) == 2


def test_a_hit_in_the_semantic_cache_has_an_event_type_of_its_own() -> None:
    events = found(proxy(**CACHE_HIT))
    assert {kind for kind, _ in events.values()} == {"kong.llm_cache_hit"}
    assert [data["tokens"] for _, data in events.values()] == [100, 20]


def test_a_hit_in_the_semantic_cache_is_billed_as_any_call_if_wanted() -> None:
    events = found(proxy(**CACHE_HIT), AiRules(cache_hits="bill"))
    assert {kind for kind, _ in events.values()} == {"kong.llm_request"}


def test_a_hit_in_the_semantic_cache_is_skipped_if_wanted_but_not_its_embeddings() -> None:
    ai = proxy(**CACHE_HIT, semantic={"embeddings_tokens": 8, "embeddings_model": "e"})
    events = found(ai, AiRules(cache_hits="skip"))
    assert {name: data["operation"] for name, (_, data) in events.items()} == {
        "proxy.semantic:input": "embeddings"
    }


def test_a_miss_in_the_semantic_cache_is_a_call_like_any_other() -> None:
    events = found(proxy(cache={"cache_status": "Miss"}))
    assert {kind for kind, _ in events.values()} == {"kong.llm_request"}


def test_several_plugins_in_one_request_are_billed_each() -> None:
    ai = proxy() | {"ai-request-transformer": {"usage": {"prompt_tokens": 3}, "meta": META}}
    assert set(found(ai)) == {"proxy:input", "proxy:output", "ai-request-transformer:input"}


def test_a_call_as_a_whole_carries_what_exists_once() -> None:
    kind, data = found(proxy(cache={"cache_status": "Miss"}), AiRules(calls=True))["proxy:call"]
    assert (kind, data) == (
        "kong.llm_call",
        {
            "tokens": 120,
            "model": "gpt-4o",
            "provider": "openai",
            "response_model": "gpt-4o-2024",
            "request_mode": "stream",
            "cache_status": "Miss",
            "cost": 0.00033,
            "llm_latency_ms": 2670,
            "time_to_first_token_ms": 631,
        },
    )


@pytest.mark.parametrize(("cache_hits", "cost", "quantity"), [("mark", 0, 1), ("bill", 0.00033, 127)])
def test_a_hit_in_the_semantic_cache_costs_nothing_unless_it_is_billed(
    cache_hits: Literal["mark", "bill"], cost: float, quantity: int
) -> None:
    unit = compile_unit("credits", "1 + input + 0.1 * cache_read + 4 * (output + reasoning)")
    _, data = found(proxy(**CACHE_HIT), AiRules(cache_hits=cache_hits, units=(unit,)))["proxy:call"]
    assert (data["cost"], data["credits"], data["tokens"]) == (cost, quantity, 120)


def test_a_call_that_kong_had_no_price_for_costs_0() -> None:
    ai = {"proxy": {"usage": {"prompt_tokens": 1}}}
    assert found(ai, AiRules(calls=True))["proxy:call"][1]["cost"] == 0


@pytest.mark.parametrize("cost", [True, "0.5", -1, 1e300, None, [1]])
def test_a_cost_that_is_no_amount_is_0(cost: object) -> None:
    ai = {"proxy": {"usage": {"prompt_tokens": 1, "cost": cost}}}
    assert found(ai, AiRules(calls=True))["proxy:call"][1]["cost"] == 0


def test_a_unit_is_a_property_of_the_call() -> None:
    unit = compile_unit("credits", "input + 0.1 * cache_read + 4 * (output + reasoning)")
    _, data = found(proxy(), AiRules(units=(unit,)))["proxy:call"]
    assert data["credits"] == 40 + 6 + 80


def test_a_unit_that_divides_by_0_is_left_out_and_the_call_is_still_counted() -> None:
    _, data = found(proxy(), AiRules(units=(compile_unit("ratio", "input / cache_write"),)))["proxy:call"]
    assert "ratio" not in data
    assert data["tokens"] == 120


def test_each_mcp_request_is_an_event_without_its_payload() -> None:
    events = found({"mcp": MCP})
    assert events == {
        "mcp:0": (
            "kong.mcp_request",
            {
                "method": "tools/call",
                "tool": "list_orders",
                "session": "abc123session",
                "error": False,
                "rpc_latency_ms": 6,
                "rpc_response_bytes": 5030,
            },
        ),
        "mcp:1": ("kong.mcp_request", {"method": "initialize", "session": "abc123session", "error": True}),
    }
    assert "secret" not in json.dumps(list(events.values()))


def test_each_a2a_request_is_an_event() -> None:
    assert found({"a2a": A2A}) == {
        "a2a:0": (
            "kong.a2a_request",
            {
                "method": "message/send",
                "binding": "jsonrpc",
                "task_state": "completed",
                "session": "ctx-1",
                "streaming": True,
                "error": False,
                "rpc_latency_ms": 12,
            },
        )
    }


def test_agents_are_not_metered_if_that_is_off() -> None:
    assert found({"mcp": MCP, "a2a": A2A}, AiRules(agent_requests=False)) == {}


def test_agents_are_metered_if_only_tokens_are_off() -> None:
    assert set(found(proxy() | {"mcp": MCP}, AiRules(token_usage=False))) == {"mcp:0", "mcp:1"}


@pytest.mark.parametrize("rpc", [{}, [], None, "rpc", [None, 5, "x"]])
def test_an_rpc_log_of_any_shape_is_survived(rpc: Any) -> None:
    entries = len(rpc) if isinstance(rpc, list) else 0
    assert len(found({"mcp": {"rpc": rpc}, "a2a": {"rpc": rpc}})) == 2 * entries


@given(json_values, json_values)
def test_no_ai_part_raises(ai: Any, block: Any) -> None:
    for value in (
        ai,
        {"proxy": ai},
        {"proxy": {"usage": ai, "meta": block, "cache": ai}},
        {"mcp": ai, "a2a": block},
    ):
        found(value, AiRules(tokens="split", calls=True, units=(compile_unit("u", "input / output"),)))
        found(value)


def test_what_the_plugin_knows_of_a_call_wins_over_an_attribute_of_that_name() -> None:
    attributes = (Attribute("constant", "mine", "method"), Attribute("constant", "mine", "region"))
    log = authenticated(ai={"mcp": MCP})
    events = decided(log, None, Rules(source="kong-test", attributes=attributes))
    assert [(e["data"].get("method"), e["data"]["region"]) for e in events] == [
        ("mine", "mine"),
        ("tools/call", "mine"),
        ("initialize", "mine"),
    ]
