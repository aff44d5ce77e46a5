"""AI usage gaps: what Kong could not tell of a call is recognized, and named in the event."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openmeter_plugin.metering.ai_events import AiRules
from openmeter_plugin.metering.ai_usage import AiUsageGap, Version, ai_calls, gap_of_call
from openmeter_plugin.metering.quarantine import redacted
from openmeter_plugin.metering.rules import Rules, SkipReason
from tests.plugin.metering.test_ai_logs import LOGS, logs
from tests.plugin.outcomes import authenticated, events, result

PROVIDER = json.loads((LOGS / "provider-usage.json").read_text())
STREAM = {"content-type": "text/event-stream; charset=utf-8", "via": "1.1 kong/3.9.1"}


def gap(
    usage: dict[str, int], *, version: Version | None = (3, 9, 1, 0), headers: Any = STREAM, **meta: object
) -> AiUsageGap | None:
    block = {"usage": usage, "meta": {"provider_name": "openai"} | meta}
    (call,) = ai_calls({"proxy": block}, version)
    return gap_of_call(call, headers, version)


def gaps(log: dict[str, Any], **rules: Any) -> dict[str, str]:
    """Return the gap by type of event, without events that have none."""
    found = events(log, None, Rules(source="kong-test", ai=AiRules(**rules)))
    return {event["type"]: named for event in found if (named := event["data"].get("ai_usage_gap"))}


@pytest.mark.parametrize(
    ("name", "billed", "gap"),
    [
        ("ai-proxy", {"input": 12, "output": 30}, None),
        ("ai-proxy-stream", {"input": 4}, "ai_output_unknown"),
        ("ai-proxy-stream-payloads-logged", {"input": 4, "output": 5}, "ai_usage_estimated"),
        ("ai-proxy-400", {}, None),
        # This version of Kong does not log the tokens of Anthropic's cache at all.
        ("anthropic", {"input": 25, "output": 41}, None),
        # It adds the one of message_start to message_delta's.
        ("anthropic-stream", {"input": 25, "output": 42}, None),
        ("anthropic-no-statistics", {}, "ai_statistics_off"),
        ("anthropic-no-statistics-stream", {}, "ai_statistics_off"),
        ("anthropic-400", {}, None),
    ],
)
def test_what_a_real_kong_could_not_tell_of_the_provider_s_usage_is_named(
    name: str, billed: dict[str, int], gap: str | None
) -> None:
    (log,) = logs(f"kong-3.9.1-{name}")
    found = events(log, None, Rules(source="kong-test", ai=AiRules(tokens="split")))
    tokens = {e["data"]["type"]: e["data"]["tokens"] for e in found[1:]}
    assert tokens == billed
    assert {e["data"].get("ai_usage_gap") for e in (found[1:] or found)} == {gap}
    known = name in ("ai-proxy", "ai-proxy-400", "anthropic-400")
    assert (tokens == PROVIDER[name]) == known


def test_the_provider_s_usage_is_known_for_every_recording() -> None:
    assert {f"kong-3.9.1-{name}" for name in PROVIDER} == {path.stem for path in LOGS.glob("kong-3.9.1-*")}


@pytest.mark.parametrize(
    ("version", "found"),
    [
        ((3, 9, 1, 0), AiUsageGap.USAGE_ESTIMATED),
        ((3, 10, 0, 6), AiUsageGap.USAGE_ESTIMATED),
        ((3, 10, 0, 7), None),
        ((3, 12, 0, 1), None),
        ((3, 16, 0, 0), None),
        (None, None),
    ],
)
def test_the_tokens_of_a_stream_are_estimated_by_the_versions_that_do_not_read_them(
    version: Version | None, found: AiUsageGap | None
) -> None:
    assert gap({"prompt_tokens": 4, "completion_tokens": 5}, version=version) is found


def test_a_stream_without_output_is_unknown_whatever_the_version() -> None:
    none = {"prompt_tokens": 4, "completion_tokens": 0}
    assert gap(none, version=None) is AiUsageGap.OUTPUT_UNKNOWN
    assert gap(none, version=(3, 16, 0, 1)) is AiUsageGap.OUTPUT_UNKNOWN
    assert gap(none, headers={}, request_mode="stream") is AiUsageGap.OUTPUT_UNKNOWN
    assert gap(none, headers={"content-type": ["text/event-stream"]}) is AiUsageGap.OUTPUT_UNKNOWN
    assert gap(none, headers={"content-type": "application/json"}, request_mode="oneshot") is None


def test_a_provider_whose_streams_have_token_counts_is_not_estimated() -> None:
    assert gap({"prompt_tokens": 4, "completion_tokens": 5}, provider_name="anthropic") is None


def test_neither_a_cache_hit_nor_embeddings_nor_a_failed_stream_have_a_gap() -> None:
    block = {"usage": {"prompt_tokens": 0, "completion_tokens": 0}, "cache": {"cache_status": "hit"}}
    log = authenticated(ai={"proxy": block})
    log["response"] |= {"headers": STREAM}
    assert gaps(log) == {}
    log["ai"] = {"proxy": {"rag-inject": {"embeddings_tokens": 3}}}
    assert gaps(log) == {}
    log["ai"] = {"proxy": {"usage": {"prompt_tokens": 9}}}
    log["response"]["status"] = 502
    assert gaps(log) == {}


def test_the_gap_is_named_on_each_event_of_the_call_and_on_no_other() -> None:
    (log,) = logs("kong-3.9.1-ai-proxy-stream")
    assert gaps(log, calls=True) == dict.fromkeys(("kong.llm_request", "kong.llm_call"), "ai_output_unknown")


def test_a_call_without_statistics_is_skipped_with_that_reason_if_requests_are_not_metered() -> None:
    (log,) = logs("kong-3.9.1-anthropic-no-statistics")
    rules = Rules(source="kong-test", meter_api_requests=False)
    assert result(log, None, rules) is SkipReason.AI_STATISTICS_OFF


def test_payloads_without_usage_show_that_statistics_are_off() -> None:
    (log,) = logs("kong-3.9.1-ai-proxy-stream-payloads-logged")
    del log["ai"]["proxy"]["usage"]
    del log["response"]["headers"]["x-kong-llm-model"]
    assert gaps(log) == {"kong.api_request": "ai_statistics_off"}


@pytest.mark.parametrize("status", [400, 429, 502])
def test_a_failed_request_without_usage_has_no_gap(status: int) -> None:
    (log,) = logs("kong-3.9.1-anthropic-no-statistics")
    log["response"]["status"] = status
    assert gaps(log) == {}


def test_a_model_named_in_another_header_is_no_trace_of_an_ai_plugin() -> None:
    log = authenticated()
    log["response"]["headers"] |= {"vary": "x-kong-llm-model"}
    assert gaps(log) == {}


def test_tokens_that_are_not_metered_have_no_gap() -> None:
    (log,) = logs("kong-3.9.1-anthropic-no-statistics")
    assert gaps(log, token_usage=False) == {}


@pytest.mark.parametrize("name", sorted(PROVIDER))
def test_the_gap_survives_the_quarantine(name: str) -> None:
    (log,) = logs(f"kong-3.9.1-{name}")
    kept = redacted(log)
    assert gaps(kept) == gaps(log)
    assert "claude" not in json.dumps(kept["response"])
