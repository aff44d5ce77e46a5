"""Whole logs of AI calls: the events of each, from recordings of a real Kong and from reported cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openmeter_plugin.metering.ai_events import AiRules
from openmeter_plugin.metering.rules import Rules
from tests.plugin.outcomes import events

LOGS = Path(__file__).parents[2] / "data" / "ai"


def logs(name: str) -> list[dict[str, Any]]:
    found = json.loads((LOGS / f"{name}.json").read_text())
    return found if isinstance(found, list) else [found]


def tokens(log: dict[str, Any], **rules: Any) -> list[tuple[str, str, str, int]]:
    """Return type, model, token type and tokens of each event but the request's."""
    found = events(log, None, Rules(source="kong-test", ai=AiRules(**rules)))
    assert found[0]["type"] == "kong.api_request"
    return [
        (e["type"].removeprefix("kong."), e["data"]["model"], e["data"]["type"], e["data"]["tokens"])
        for e in found[1:]
    ]


def test_a_plain_call_of_a_real_ai_proxy_is_billed_for_what_the_provider_used() -> None:
    (log,) = logs("kong-3.9.1-ai-proxy")
    assert tokens(log) == [("llm_request", "gpt-4o", "input", 12), ("llm_request", "gpt-4o", "output", 30)]


def test_a_streamed_call_of_a_real_ai_proxy_is_billed_for_what_kong_counted() -> None:
    (log,) = logs("kong-3.9.1-ai-proxy-stream")
    assert tokens(log) == [("llm_request", "gpt-4o", "input", 4)]
    (log,) = logs("kong-3.9.1-ai-proxy-stream-payloads-logged")
    assert tokens(log) == [("llm_request", "gpt-4o", "input", 4), ("llm_request", "gpt-4o", "output", 5)]


def test_a_call_that_a_real_ai_proxy_refused_is_no_model_call() -> None:
    (log,) = logs("kong-3.9.1-ai-proxy-400")
    assert tokens(log, calls=True) == []


def test_the_payloads_that_kong_logs_are_not_part_of_any_event() -> None:
    (log,) = logs("kong-3.9.1-ai-proxy-stream-payloads-logged")
    found = json.dumps(events(log, None, Rules(source="kong-test", ai=AiRules(tokens="split", calls=True))))
    assert "Hello" not in found
    assert "hi there" not in found


def test_calls_that_log_only_input_and_output_tokens_are_billed() -> None:
    counts = [[(kind, number) for _, _, kind, number in tokens(log)] for log in logs("input-output-tokens")]
    assert counts[:2] == [[("input", 50), ("output", 4160)]] * 2


def test_a_call_that_logs_both_names_is_billed_once() -> None:
    (log,) = logs("both-names")
    assert tokens(log) == [("llm_request", "m", "input", 50), ("llm_request", "m", "output", 60)]


def test_a_call_that_used_no_token_stays_countable() -> None:
    (log,) = logs("all-zero")
    assert tokens(log) == [("llm_request", "m", "input", 0)]


def test_a_semantic_cache_hit_is_not_billed_as_provider_tokens() -> None:
    (log,) = logs("cache-hit")
    assert {kind for kind, *_ in tokens(log)} == {"llm_cache_hit"}
    assert {kind for kind, *_ in tokens(log, cache_hits="bill")} == {"llm_request"}
    assert tokens(log, cache_hits="skip") == []
