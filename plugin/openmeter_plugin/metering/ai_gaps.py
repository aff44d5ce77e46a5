"""AI usage gaps: calls whose tokens Kong estimated, or did not count, as far as the log shows it.

Seen on a real Kong 3.9.1 (recordings in tests/data/ai): a streamed call logs an estimated input and no output
although the provider's last chunk has both, and without `logging.log_statistics`, which is off by default, a
call is logged without an `ai` table. docs/ai-usage.md says what to do about each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Final

from openmeter_plugin.metering.ai_usage import AiCall, Version, ai_calls, blocks, is_fixed
from openmeter_plugin.metering.lenient_json import count, first, json_object, text


class AiUsageGap(StrEnum):
    """Why Kong cannot tell the usage of a call, the worst first. The values are labels of metrics."""

    STATISTICS_OFF = "ai_statistics_off"
    """No token is logged: `logging.log_statistics` is off."""
    OUTPUT_UNKNOWN = "ai_output_unknown"
    """A stream with 0 output tokens."""
    USAGE_ESTIMATED = "ai_usage_estimated"
    """A stream whose tokens this version of Kong estimates from the number of characters."""


PROPERTY: Final = "ai_usage_gap"
"""The event property with the gap of a call."""

MODEL_HEADER: Final = "x-kong-llm-model"
"""The response header that ai-proxy sets since Kong 3.8, unless its `model_name_header` is off."""

EVENT_STREAM: Final = "text/event-stream"

# Kong 3.9.1, kong/llm/drivers/shared.lua: the providers that are not in `streaming_has_token_counts`.
ESTIMATED_PROVIDERS: Final = frozenset({"openai", "azure", "huggingface", "mistral"})
ESTIMATED_UNTIL: Final[tuple[Version, ...]] = ((3, 10, 0, 7), (3, 11, 0, 7), (3, 12, 0, 1), (3, 13, 0, 0))
"""The first versions that read the tokens of these streams (changelog: "0 `completion_tokens` count")."""


def worst(gaps: Iterable[AiUsageGap | None]) -> AiUsageGap | None:
    """Return the worst of the gaps, None if there is none."""
    found = set(gaps)
    return next((gap for gap in AiUsageGap if gap in found), None)


def gap_of_call(call: AiCall, headers: Mapping[str, Any], version: Version | None) -> AiUsageGap | None:
    """Return the gap of a call that was answered; `headers` are those of its response."""
    if call.operation is not None or call.is_cache_hit:
        return None
    if call.request_mode != "stream" and not is_event_stream(headers):
        return None
    if not call.tokens("output", "reasoning"):
        return AiUsageGap.OUTPUT_UNKNOWN
    estimated = call.provider.lower() in ESTIMATED_PROVIDERS
    if estimated and version is not None and not is_fixed(version, ESTIMATED_UNTIL):
        return AiUsageGap.USAGE_ESTIMATED
    return None


def is_event_stream(headers: Mapping[str, Any]) -> bool:
    """Return whether a response with these headers is a stream of server-sent events."""
    kind = first(headers.get("content-type"))
    return type(kind) is str and kind.lower().startswith(EVENT_STREAM)


def statistics_off(response: Mapping[str, Any], ai: Mapping[str, Any], calls: Iterable[AiCall]) -> bool:
    """Return whether an AI plugin answered a call, as header or payload show, but logged no usage of it."""
    if (count(response.get("status")) or 0) >= 400 or any(call.operation is None for call in calls):
        return False
    if MODEL_HEADER in json_object(response.get("headers")):
        return True
    # With `log_payloads` on and `log_statistics` off.
    return any("payload" in block.table for block in blocks(ai) if block.keys)


_METRICS: Final = {
    "prompt_tokens": "llm_prompt_tokens_count",
    "completion_tokens": "llm_completion_tokens_count",
    "cost": "llm_usage_cost",
}


def with_metrics(log: Mapping[str, Any], metrics: object) -> Mapping[str, Any]:
    """Return the log of a call without statistics with the usage that Kong counted nevertheless.

    `metrics` is `ngx.ctx.ai_llm_metrics`, which Lua in Kong can read: on a real Kong 3.9.1 it has the
    provider's counts of a call that is not streamed, logged or not. What is logged wins.
    """
    counted = json_object(metrics)
    usage = {name: counted[metric] for name, metric in _METRICS.items() if metric in counted}
    calls = ai_calls({"usage": usage})
    response, ai = json_object(log.get("response")), json_object(log.get("ai"))
    if not calls or not statistics_off(response, ai, ai_calls(ai)):
        return log
    model = text(first(json_object(response.get("headers")).get(MODEL_HEADER))) or ""
    provider, _, name = model.partition("/")
    meta = {"provider_name": provider, "request_model": name, "llm_latency": counted.get("llm_e2e_latency")}
    proxy = json_object(ai.get("proxy"))
    return {**log, "ai": {**ai, "proxy": {**proxy, "usage": usage, "meta": meta}}}
