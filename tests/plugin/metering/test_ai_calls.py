"""AI calls: which tokens a log's `ai` part holds, each once, for every provider and version of Kong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.metering.ai_usage import AiCall, Version, ai_calls, is_fixed, kong_version
from openmeter_plugin.metering.quarantine import redacted

PARTS = {
    "input": ("prompt_tokens", "prompt_tokens_details"),
    "output": ("completion_tokens", "completion_tokens_details"),
}


def call(usage: dict[str, Any], provider: str = "openai", version: Version | None = None) -> AiCall:
    (found,) = ai_calls({"proxy": {"usage": usage, "meta": {"provider_name": provider}}}, version)
    return found


def parts(found: AiCall) -> dict[str, int]:
    return {f"{kind}/{modality}": tokens for kind, modality, tokens in found.parts}


def test_cached_tokens_are_part_of_an_openai_prompt() -> None:
    usage = {
        "prompt_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 60, "audio_tokens": 0},
        "completion_tokens": 20,
        "total_tokens": 120,
    }
    assert parts(call(usage)) == {"input/text": 40, "cache_read/text": 60, "output/text": 20}


def test_reasoning_tokens_are_part_of_an_openai_completion() -> None:
    usage = {
        "prompt_tokens": 25,
        "completion_tokens": 456,
        "completion_tokens_details": {"reasoning_tokens": 256, "accepted_prediction_tokens": 7},
        "total_tokens": 481,
    }
    assert parts(call(usage)) == {"input/text": 25, "output/text": 200, "reasoning/text": 256}


@pytest.mark.parametrize("provider", ["anthropic", "bedrock", "Anthropic"])
@pytest.mark.parametrize(
    ("version", "fresh"),
    [
        ((3, 13, 0, 7), 100),
        ((3, 14, 0, 7), 100),
        ((3, 14, 0, 8), 35),
        ((3, 15, 0, 3), 100),
        ((3, 15, 0, 4), 35),
        ((3, 16, 0, 0), 35),
    ],
)
def test_a_prompt_of_anthropic_includes_cached_tokens_since_the_fix_of_its_series(
    provider: str, version: Version, fresh: int
) -> None:
    usage = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 5}}
    found = call(usage, provider, version)
    assert parts(found) == {"input/text": fresh, "cache_read/text": 60, "cache_write/text": 5}


def test_anthropic_s_own_names_stand_beside_a_prompt_that_leaves_them_out() -> None:
    usage = {
        "input_tokens": 100,
        "cache_read_input_tokens": 60,
        "cache_creation_input_tokens": 30,
        "output_tokens": 7,
    }
    assert parts(call(usage, "anthropic")) == {
        "input/text": 100,
        "cache_read/text": 60,
        "cache_write/text": 30,
        "output/text": 7,
    }


def test_without_a_version_kong_s_own_name_is_part_of_the_prompt() -> None:
    usage = {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 60}}
    assert call(usage, "anthropic").tokens("input") == 40


@pytest.mark.parametrize("provider", ["openai", "anthropic", "gemini", "someone"])
def test_more_cached_tokens_than_the_prompt_has_were_counted_apart_from_it(provider: str) -> None:
    usage = {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 150}, "completion_tokens": 20}
    found = call(usage, provider)
    assert (found.tokens("input"), found.tokens("cache_read"), found.total) == (10, 150, 180)


@pytest.mark.parametrize("provider", ["openai", "someone"])
def test_a_total_that_adds_the_cached_tokens_shows_that_the_prompt_leaves_them_out(provider: str) -> None:
    usage = {
        "prompt_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 60},
        "completion_tokens": 20,
        "total_tokens": 180,
    }
    found = call(usage, provider)
    assert (found.tokens("input"), found.total) == (100, 180)


def test_the_tokens_written_to_the_cache_are_added_up_over_their_times_to_live() -> None:
    usage = {
        "input_tokens": 10,
        "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 12},
        "output_tokens": 1,
    }
    assert call(usage, "anthropic").tokens("cache_write") == 42


@pytest.mark.parametrize(
    "name",
    [
        "cache_write_tokens",
        "cache_creation_tokens",
        "cache_creation_input_tokens",
        "cache_write_input_tokens",
    ],
)
def test_the_tokens_written_to_the_cache_are_read_under_every_name(name: str) -> None:
    beside = call({"prompt_tokens": 50, name: 8, "completion_tokens": 1})
    inside = call({"prompt_tokens": 50, "prompt_tokens_details": {name: 8}, "completion_tokens": 1})
    assert beside.tokens("cache_write") == inside.tokens("cache_write") == 8


@pytest.mark.parametrize(
    ("version", "output"),
    [((3, 15, 0, 4), 9), ((3, 16, 0, 1), 2), (None, 2)],
    ids=["before", "after", "unknown"],
)
def test_a_completion_of_xai_includes_reasoning_tokens_since_kong_3_16_0_1(
    version: Version | None, output: int
) -> None:
    usage = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 7}}
    assert call(usage, "xai", version).tokens("output") == output


def test_the_image_tokens_of_a_call_are_split_from_its_text() -> None:
    usage = {
        "input_tokens": 50,
        "output_tokens": 4160,
        "total_tokens": 4210,
        "input_tokens_details": {"text_tokens": 10, "image_tokens": 40},
        "output_tokens_details": {"image_tokens": 4160},
    }
    assert parts(call(usage)) == {"input/image": 40, "input/text": 10, "output/image": 4160}


def test_the_audio_tokens_of_a_realtime_call_are_read_from_kong_s_names_with_a_suffix() -> None:
    usage = {
        "input_tokens": 30,
        "output_tokens": 100,
        "input_tokens_details": {"audio_tokens_count": 20},
        "output_tokens_reasoning_tokens_count": 40,
    }
    assert parts(call(usage, "gemini")) == {
        "input/audio": 20,
        "input/text": 10,
        "output/text": 60,
        "reasoning/text": 40,
    }


def test_cached_audio_is_not_counted_as_fresh_audio() -> None:
    usage = {
        "input_tokens": 30,
        "input_tokens_details": {
            "audio_tokens": 20,
            "cached_tokens": 12,
            "cached_tokens_details": {"audio_tokens": 8, "text_tokens": 4},
        },
        "output_tokens": 0,
    }
    assert parts(call(usage)) == {
        "input/audio": 12,
        "input/text": 6,
        "cache_read/audio": 8,
        "cache_read/text": 4,
    }


def test_a_count_under_two_names_is_read_once() -> None:
    usage = {"prompt_tokens": 50, "completion_tokens": 60, "input_tokens": 50, "output_tokens": 60}
    assert call(usage).total == 110


def test_a_zero_under_the_other_name_hides_no_count() -> None:
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "input_tokens": 50, "output_tokens": 4160}
    assert call(usage).total == 4210


def test_the_embeddings_of_a_plugin_are_a_call_of_their_own() -> None:
    ai = {
        "proxy": {
            "usage": {"prompt_tokens": 14, "completion_tokens": 21},
            "meta": {"provider_name": "cohere", "request_model": "command"},
            "rag-inject": {
                "embeddings_tokens": 62,
                "embeddings_provider": "openai",
                "embeddings_model": "text-embedding-ada-002",
                "embeddings_latency": 37,
            },
        }
    }
    proxy, rag = ai_calls(ai)
    assert (proxy.name, proxy.total) == ("proxy", 35)
    assert (rag.name, rag.operation, rag.total, rag.latency_ms) == ("proxy.rag-inject", "embeddings", 62, 37)
    assert (rag.provider, rag.model) == ("openai", "text-embedding-ada-002")


def test_the_embeddings_of_the_semantic_cache_are_billed_on_a_hit_whose_tokens_kong_sets_to_0() -> None:
    cache = {
        "cache_status": "hit",
        "embeddings_tokens": 9,
        "embeddings_provider": "openai",
        "embeddings_model": "text-embedding-3-small",
    }
    usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "cost": 0}
    ai = {"proxy": {"usage": usage, "cache": cache}}
    hit, embeddings = ai_calls(ai)
    assert ai_calls(redacted({"ai": ai})["ai"]) == [hit, embeddings]
    assert (hit.is_cache_hit, hit.total) == (True, 0)
    assert (embeddings.name, embeddings.operation, embeddings.total) == ("proxy.cache", "embeddings", 9)
    assert embeddings.model == "text-embedding-3-small"


def test_a_cache_that_made_no_embeddings_is_no_call() -> None:
    block = {"usage": {"prompt_tokens": 5}, "cache": {"cache_status": "miss", "embeddings_tokens": 0}}
    assert [call.name for call in ai_calls({"proxy": block})] == ["proxy"]


def test_a_judge_s_score_is_no_usage() -> None:
    ai = {"proxy": {"ai-llm-as-judge": {"usage": {"llm_accuracy": 95}, "meta": {"response_model": "gpt-4o"}}}}
    assert ai_calls(ai) == []


def test_neither_payloads_nor_what_a_sanitizer_found_are_searched_for_usage() -> None:
    usage = {"usage": {"prompt_tokens": 5}}
    assert ai_calls({"payload": usage, "sanitizer": usage, "mcp": usage, "a2a": usage, "audit": usage}) == []


@pytest.mark.parametrize(
    ("meta", "model"),
    [
        ({"request_model": "gpt-4o", "response_model": "gpt-4o-2024"}, "gpt-4o"),
        ({"request_model": "UNSPECIFIED", "response_model": "gpt-4o-2024"}, "gpt-4o-2024"),
        ({"request_model": None, "response_model": "gpt-4o-2024"}, "gpt-4o-2024"),
        ({"request_model": "UNSPECIFIED", "response_model": "UNSPECIFIED"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_model_is_the_request_s_else_the_response_s_else_unknown(
    meta: dict[str, Any], model: str
) -> None:
    (found,) = ai_calls({"proxy": {"usage": {"prompt_tokens": 1}, "meta": meta}})
    assert (found.model, found.provider) == (model, "unknown")


@pytest.mark.parametrize(
    ("headers", "version"),
    [
        ({"via": "1.1 kong/3.9.1"}, (3, 9, 1, 0)),
        ({"via": "1.1 varnish, 1.1 kong/3.14.0.8-enterprise-edition"}, (3, 14, 0, 8)),
        ({"server": "kong/3.15.0.4"}, (3, 15, 0, 4)),
        ({"via": ["1.1 kong/3.8.0", "1.1 kong/3.16.0.1"]}, (3, 16, 0, 1)),
        ({"server": "nginx"}, None),
        ({"via": 5}, None),
        ("headers", None),
    ],
)
def test_kong_s_version_is_read_from_the_response_headers(headers: Any, version: Version | None) -> None:
    assert kong_version({"response": {"headers": headers}}) == version


def test_a_fix_of_two_series_is_in_every_later_series_and_in_no_earlier_one() -> None:
    fixes = ((3, 14, 0, 8), (3, 15, 0, 4))
    versions = [(3, 13, 9, 9), (3, 14, 0, 7), (3, 14, 0, 8), (3, 15, 0, 0), (3, 15, 0, 4), (4, 0, 0, 0)]
    assert [is_fixed(version, fixes) for version in versions] == [False, False, True, False, True, True]


counts = st.integers(0, 10_000)
details = st.dictionaries(
    st.sampled_from(
        [
            "cached_tokens",
            "audio_tokens",
            "image_tokens",
            "text_tokens",
            "reasoning_tokens",
            "cache_write_tokens",
        ]
    ),
    counts,
)


@given(
    usage=st.fixed_dictionaries(
        {"prompt_tokens": counts, "completion_tokens": counts},
        optional={
            "prompt_tokens_details": details,
            "completion_tokens_details": details,
            "cache_creation_input_tokens": counts,
            "total_tokens": counts,
        },
    ),
    provider=st.sampled_from(["openai", "anthropic", "bedrock", "gemini", "xai"]),
    version=st.none() | st.sampled_from([(3, 9, 1, 0), (3, 14, 0, 8), (3, 16, 0, 1)]),
)
def test_no_part_is_negative_and_no_sum_is_smaller_than_what_kong_logged(
    usage: dict[str, Any], provider: str, version: Version | None
) -> None:
    found = call(usage, provider, version)
    assert all(part.tokens >= 0 for part in found.parts)
    assert found.tokens("input", "cache_read", "cache_write") >= usage["prompt_tokens"]
    assert found.tokens("output", "reasoning") >= usage["completion_tokens"]
    assert len({part[:2] for part in found.parts}) == len(found.parts)
    # No token twice: each detail is added to Kong's sums at most once.
    prompt, completion = usage.get("prompt_tokens_details", {}), usage.get("completion_tokens_details", {})
    write = max(prompt.get("cache_write_tokens", 0), usage.get("cache_creation_input_tokens", 0))
    details = prompt.get("cached_tokens", 0) + write + completion.get("reasoning_tokens", 0)
    assert found.total <= usage["prompt_tokens"] + usage["completion_tokens"] + details
    assert found.tokens("reasoning") == completion.get("reasoning_tokens", 0)
    assert found.tokens("cache_read", "cache_write") == prompt.get("cached_tokens", 0) + write
