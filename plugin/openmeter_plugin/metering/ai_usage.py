"""AI usage: read every call to a model that Kong's AI plugins wrote into a log, as disjoint token counts.

Kong moved the fields with nearly every version (`ai.usage` in 3.6, a block per plugin since 3.7, `ai.proxy`
since 3.9, `input_tokens` for images, audio and realtime since 3.11), so a call is recognized by its shape:
any table under `ai` that has `usage`. The fields are those of Kong's AI audit log reference; docs/ai-usage.md
has the table of providers and fields with the source of each row.

Some calls have a gap: Kong estimated their tokens, or did not count them, as far as the log shows it. Seen
on a real Kong 3.9.1 (recordings in tests/data/ai): a streamed call logs an estimated input and no output
although the provider's last chunk has both, and without `logging.log_statistics`, which is off by default, a
call is logged without an `ai` table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, Literal, NamedTuple

from openmeter_plugin.metering.lenient_json import count, first, json_object, text

TokenType = Literal["input", "cache_read", "cache_write", "output", "reasoning"]
Modality = Literal["text", "image", "audio", "video"]
Version = tuple[int, ...]

INPUT_TYPES: Final[frozenset[TokenType]] = frozenset({"input", "cache_read", "cache_write"})
UNKNOWN: Final = "unknown"

_SUMS: Final = {
    # 3.7 wrote the names in the singular; 3.11 writes input_tokens and output_tokens for non-text calls.
    "input": ("prompt_tokens", "prompt_token", "input_tokens"),
    "output": ("completion_tokens", "completion_token", "output_tokens"),
}
_DETAILS: Final = {
    "input": ("prompt_tokens_details", "input_tokens_details"),
    "output": ("completion_tokens_details", "output_tokens_details"),
}
_CACHE_READ: Final = ("cached_tokens", "cache_read_tokens", "cache_read_input_tokens")
_CACHE_WRITE: Final = (
    *("cache_write_tokens", "cache_creation_tokens", "cache_creation_input_tokens"),
    *("cache_write_input_tokens",),
)
_REASONING: Final = ("reasoning_tokens",)
_MODALITIES: Final[tuple[Modality, ...]] = ("image", "audio", "video")

_MAX_DEPTH: Final = 3  # ai, ai.proxy, ai.proxy.rag-inject
_NOT_CALLS: Final = frozenset({"payload", "usage", "meta", "mcp", "a2a", "audit", "sanitizer", "compressor"})
_UNSPECIFIED: Final = "UNSPECIFIED"  # what Kong 3.9 logs for a call that it refused

FIELD: Final = re.compile(r"[a-z0-9_]{1,64}", re.ASCII)
"""Names of fields, as opposed to content."""

_KONG: Final = re.compile(r"\bkong/(\d+)\.(\d+)\.(\d+)(?:\.(\d+))?")


class Part(NamedTuple):
    """Tokens of one type and modality. The parts of a call are disjoint."""

    type: TokenType
    modality: Modality
    tokens: int


@dataclass(frozen=True, slots=True)
class AiCall:
    """One call to a model, or the embeddings that a plugin made for one.

    `name` is the call's path under `ai` ("proxy", "proxy.rag-inject") and unique within a request: it is
    part of event ids. Latencies are in milliseconds; `cost` is in the currency of Kong's configuration.
    """

    name: str
    parts: tuple[Part, ...]
    provider: str
    model: str
    response_model: str | None = None
    request_mode: str | None = None
    operation: Literal["embeddings"] | None = None
    cache_status: str | None = None
    cost: float | None = None
    latency_ms: int | None = None
    time_to_first_token_ms: int | None = None

    def tokens(self, *types: TokenType) -> int:
        """Return the tokens of these types, over all modalities."""
        return sum(part.tokens for part in self.parts if part.type in types)

    @property
    def total(self) -> int:
        """All tokens of the call."""
        return sum(part.tokens for part in self.parts)

    @property
    def is_cache_hit(self) -> bool:
        """True if Kong's semantic cache answered: no provider was called."""
        return (self.cache_status or "").lower() == "hit"


def ai_calls(ai: object, version: Version | None = None) -> list[AiCall]:
    """Return every call in the `ai` part of a log, in the order of the log. Nothing in it makes it raise.

    `version` is the version of the Kong that wrote the log, if known: it decides what the prompt tokens of
    some providers include.
    """
    calls: list[AiCall] = []
    names: set[str] = set()
    for block in blocks(ai):
        for call in _calls(block.name, block.table, version):
            name = call.name
            while name in names:  # two events with the same id would count as one
                name += "~"
            names.add(name)
            calls.append(call if name == call.name else replace(call, name=name))
    return calls


def kong_version(log: Mapping[str, Any]) -> Version | None:
    """Return the version that Kong put into the response's `via` or `server` header, or None."""
    headers = json_object(json_object(log.get("response")).get("headers"))
    for name in ("via", "server"):
        value = headers.get(name)
        values = value if type(value) is list else [value]
        versions = [parsed for v in values if type(v) is str and (parsed := parse_version(v))]
        if versions:
            return versions[-1]
    return None


def parse_version(header: str) -> Version | None:
    """Return the last version of Kong in a header such as `1.1 kong/3.14.0.8-enterprise-edition`, or None."""
    found = list(_KONG.finditer(header[:1024]))
    return tuple(int(number[:6]) for number in found[-1].groups(default="0")) if found else None


def is_fixed(version: Version, fixes: tuple[Version, ...]) -> bool:
    """Return whether a version has a fix that several series got, such as 3.14.0.8 and 3.15.0.4."""
    for fix in fixes:
        if fix[:2] == version[:2]:
            return version >= fix
    return version > max(fixes)


class Block(NamedTuple):
    """A table under `ai` that may describe a call, and the keys that lead to it."""

    keys: tuple[str, ...]
    table: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The block's name in event ids."""
        return ".".join(text(key) or "ai" for key in self.keys) or "ai"


def blocks(ai: object, keys: tuple[str, ...] = ()) -> Iterator[Block]:
    """Yield the tables under `ai`, the table itself first, without those that are never a call."""
    table = json_object(ai)
    if table:
        yield Block(keys, table)
    if len(keys) < _MAX_DEPTH:
        for key, inner in table.items():
            if key not in _NOT_CALLS:
                yield from blocks(inner, (*keys, key))


def _calls(path: str, block: Mapping[str, Any], version: Version | None) -> Iterator[AiCall]:
    # 0 is "no embedding was made": ai-semantic-cache logs it whenever it did not need one.
    if embeddings := count(block.get("embeddings_tokens")):
        yield AiCall(
            name=path,
            parts=(Part("input", "text", embeddings),),
            provider=_specified(block.get("embeddings_provider")) or UNKNOWN,
            model=_specified(block.get("embeddings_model")) or UNKNOWN,
            operation="embeddings",
            latency_ms=count(block.get("embeddings_latency")),
        )
    usage = json_object(block.get("usage"))
    if not _has_sum(usage):
        return  # such as ai-llm-as-judge, whose usage is a score
    meta = json_object(block.get("meta"))
    provider = _specified(meta.get("provider_name")) or UNKNOWN
    request_model = _specified(meta.get("request_model"))
    response_model = _specified(meta.get("response_model"))
    yield AiCall(
        name=path,
        parts=_parts(usage, provider.lower(), version),
        provider=provider,
        model=request_model or response_model or UNKNOWN,
        response_model=response_model,
        request_mode=text(meta.get("request_mode")),
        cache_status=text(json_object(block.get("cache")).get("cache_status")),
        cost=_cost(usage.get("cost")),
        latency_ms=count(meta.get("llm_latency")),
        time_to_first_token_ms=count(usage.get("time_to_first_token")),
    )


def _cost(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < 1e15 else None


def _specified(value: object) -> str | None:
    found = text(value)
    return None if found == _UNSPECIFIED else found


# Token counts


def _has_sum(usage: Mapping[str, Any]) -> bool:
    return any(count(usage.get(name)) is not None for names in _SUMS.values() for name in names)


def _parts(usage: Mapping[str, Any], provider: str, version: Version | None) -> tuple[Part, ...]:
    """Return the disjoint parts of a call's usage; `input` is always one of them, if only with 0 tokens."""
    sums = {side: _largest(usage, names) for side, names in _SUMS.items()}
    read = _detail(usage, "input", _CACHE_READ)
    write = _detail(usage, "input", _CACHE_WRITE) or _cache_write_by_ttl(usage)
    reasoning = _detail(usage, "output", _REASONING)
    cache_apart, reasoning_apart = _counted_apart(usage, sums, read + write, reasoning, provider, version)
    fresh = sums["input"] if cache_apart else sums["input"] - read - write
    spoken = sums["output"] if reasoning_apart else sums["output"] - reasoning
    cached = json_object(_table(usage, "input").get("cached_tokens_details"))
    parts = [
        *_by_modality("input", fresh, _table(usage, "input"), cached),
        *_by_modality("cache_read", read, cached, {}),
        Part("cache_write", "text", write),
        *_by_modality("output", spoken, _table(usage, "output"), {}),
        Part("reasoning", "text", reasoning),
    ]
    return tuple(part for part in parts if part.tokens or part[:2] == ("input", "text"))


def _largest(usage: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return a count that may have several names at once: the names not in use are 0."""
    return max(count(usage.get(name)) or 0 for name in names)


def _table(usage: Mapping[str, Any], side: str) -> Mapping[str, Any]:
    for name in _DETAILS[side]:
        if table := json_object(usage.get(name)):
            return table
    return {}


def _detail(usage: Mapping[str, Any], side: str, names: tuple[str, ...]) -> int:
    """Return a detail: from the side's table, beside the sums, or in realtime's flat names."""
    tables = [json_object(usage.get(name)) for name in _DETAILS[side]]
    found = [_named(table, name) for table in (*tables, usage) for name in names]
    # Realtime since 3.14.0.13: output_tokens_reasoning_tokens_count.
    found += [_named(usage, f"{total}_{name}") for total in _SUMS[side] for name in names]
    return max(found)


def _named(table: Mapping[str, Any], name: str) -> int:
    """Return a detail; Kong writes some of them with the suffix _count."""
    return count(table.get(name)) or count(table.get(f"{name}_count")) or 0


def _cache_write_by_ttl(usage: Mapping[str, Any]) -> int:
    """Return the sum of Anthropic's `cache_creation`, which has a count per time to live."""
    for table in (usage, *(json_object(usage.get(name)) for name in _DETAILS["input"])):
        if creation := json_object(table.get("cache_creation")):
            return sum(count(value) or 0 for name, value in creation.items() if FIELD.fullmatch(name))
    return 0


_CACHE_APART: Final[Mapping[str, tuple[Version, ...]]] = {
    # Anthropic's and Bedrock's input_tokens leave out what was read from and written to the cache.
    # Kong adds both to prompt_tokens since these versions (changelog of ai-proxy-advanced).
    "anthropic": ((3, 14, 0, 8), (3, 15, 0, 4)),
    "bedrock": ((3, 14, 0, 8), (3, 15, 0, 4)),
}
_REASONING_APART: Final[Mapping[str, tuple[Version, ...]]] = {
    # xAI's completion_tokens leave out reasoning_tokens; Kong adds them since this version.
    "xai": ((3, 16, 0, 1),),
}


def _counted_apart(
    usage: Mapping[str, Any],
    sums: Mapping[str, int],
    cached: int,
    reasoning: int,
    provider: str,
    version: Version | None,
) -> tuple[bool, bool]:
    """Return whether the sums leave out the cached tokens, and whether they leave out the reasoning tokens.

    The numbers decide where they can: a detail larger than its sum is not part of it, and a total that is
    only reached with the details includes them on top. Otherwise provider and version decide.
    """
    cache_apart, reasoning_apart = _apart_by_total(
        count(usage.get("total_tokens")), sums, cached, reasoning
    ) or (
        _leaves_out(_CACHE_APART, provider, version, named=_names_anthropic(usage)),
        _leaves_out(_REASONING_APART, provider, version, named=False),
    )
    return cache_apart or cached > sums["input"], reasoning_apart or reasoning > sums["output"]


def _apart_by_total(
    total: int | None, sums: Mapping[str, int], cached: int, reasoning: int
) -> tuple[bool, bool] | None:
    """Return which details a total adds to the sums, or None if it adds none, as Kong's own total does."""
    extra = (total or 0) - sums["input"] - sums["output"]
    if extra <= 0 or (cached == reasoning and extra == cached):
        return None  # cached tokens or reasoning tokens: either could be meant
    matches = {
        cached + reasoning: (cached > 0, reasoning > 0),
        cached: (True, False),
        reasoning: (False, True),
    }
    return matches.get(extra)


def _leaves_out(
    table: Mapping[str, tuple[Version, ...]], provider: str, version: Version | None, *, named: bool
) -> bool:
    """Return whether this provider's sums leave the detail out, in this version of Kong.

    Without a version the spelling decides: Kong's own names (`cached_tokens`) came with the versions that
    include the detail, the provider's own names stand beside a sum that does not.
    """
    fixes = table.get(provider)
    if fixes is None:
        return False
    return named if version is None else not is_fixed(version, fixes)


def _names_anthropic(usage: Mapping[str, Any]) -> bool:
    return any(
        count(usage.get(name)) for name in ("cache_read_input_tokens", "cache_creation_input_tokens")
    ) or bool(json_object(usage.get("cache_creation")))


def _by_modality(
    kind: TokenType, tokens: int, table: Mapping[str, Any], without: Mapping[str, Any]
) -> Iterator[Part]:
    """Yield a count split by modality; what no detail names is text. The parts add up to `tokens`."""
    left = tokens
    for modality in _MODALITIES:
        name = f"{modality}_tokens"
        part = min(max(_named(table, name) - _named(without, name), 0), left)
        if part:
            left -= part
            yield Part(kind, modality, part)
    yield Part(kind, "text", left)


# Gaps


class AiUsageGap(StrEnum):
    """Why Kong cannot tell the usage of a call, the worst first. The values are labels of metrics."""

    STATISTICS_OFF = "ai_statistics_off"
    """No token is logged: `logging.log_statistics` is off."""
    OUTPUT_UNKNOWN = "ai_output_unknown"
    """A stream with 0 output tokens."""
    USAGE_ESTIMATED = "ai_usage_estimated"
    """A stream whose tokens this version of Kong estimates from the number of characters."""


GAP_PROPERTY: Final = "ai_usage_gap"
"""The event property with the gap of a call."""

MODEL_HEADER: Final = "x-kong-llm-model"
"""The response header that ai-proxy sets since Kong 3.8, unless its `model_name_header` is off."""

EVENT_STREAM: Final = "text/event-stream"

# Kong 3.9.1, kong/llm/drivers/shared.lua: the providers that are not in `streaming_has_token_counts`.
ESTIMATED_PROVIDERS: Final = frozenset({"openai", "azure", "huggingface", "mistral"})
ESTIMATED_UNTIL: Final[tuple[Version, ...]] = ((3, 10, 0, 7), (3, 11, 0, 7), (3, 12, 0, 1), (3, 13, 0, 0))
"""The first versions that read the tokens of these streams (changelog: "0 `completion_tokens` count")."""


def worst_gap(gaps: Iterable[AiUsageGap | None]) -> AiUsageGap | None:
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
