"""Token counts of every Kong version, each billed once."""

from __future__ import annotations

import pytest

from openmeter_plugin.metering.ai_events import AiRules
from openmeter_plugin.metering.rules import Rules, SkipReason
from tests.harness.recordings import llm_request
from tests.plugin.outcomes import SHAPES, USAGE, authenticated, events, result


def tokens_of(ai: object) -> list[tuple[str, object, object]]:
    found = events(authenticated(ai=ai))[1:]
    return [
        (e["id"].removeprefix(f"{found[0]['id'][:32]}:"), e["data"]["type"], e["data"]["tokens"])
        for e in found
    ]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_usage_of_each_kong_version_becomes_an_input_and_an_output_event_per_block(shape: str) -> None:
    ai, keys = SHAPES[shape]
    expected = []
    for key in keys:
        expected += [(f"{key}:input", "input", 7), (f"{key}:output", "output", 11)]
    assert tokens_of(ai) == expected


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_usage_of_each_kong_version_names_model_and_provider(shape: str) -> None:
    for event in events(authenticated(ai=SHAPES[shape][0]))[1:]:
        assert (event["type"], event["data"]["model"], event["data"]["provider"]) == (
            "kong.llm_request",
            "gpt-4o",
            "openai",
        )


def test_the_response_model_is_used_if_the_request_names_none() -> None:
    ai = {"proxy": {"usage": USAGE, "meta": {"response_model": "gpt-4o-2024"}}}
    assert {e["data"]["model"] for e in events(authenticated(ai=ai))[1:]} == {"gpt-4o-2024"}


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"prompt_tokens": None},
        {"prompt_tokens": -1, "completion_tokens": True},
        {"prompt_tokens": "many"},
        [],
        "usage",
    ],
)
def test_token_counts_that_are_no_numbers_make_no_events(usage: object) -> None:
    assert len(events(authenticated(ai={"proxy": {"usage": usage}}))) == 1


def test_a_direction_without_tokens_has_no_event() -> None:
    ai = {"proxy": {"usage": {"prompt_tokens": 5, "completion_tokens": 0}}}
    assert tokens_of(ai) == [("proxy:input", "input", 5)]


def test_fractional_tokens_are_rounded() -> None:
    assert tokens_of({"proxy": {"usage": {"prompt_tokens": 12.6}}}) == [("proxy:input", "input", 13)]


def test_tokens_are_not_metered_if_that_is_off() -> None:
    rules = Rules(source="kong-test", ai=AiRules(token_usage=False))
    assert [e["type"] for e in events(llm_request().parsed, None, rules)] == ["kong.api_request"]


def test_requests_are_not_metered_if_that_is_off_but_their_tokens_are() -> None:
    rules = Rules(source="kong-test", meter_api_requests=False)
    assert [e["data"]["tokens"] for e in events(llm_request().parsed, None, rules)] == [12, 30]


def test_a_request_with_nothing_to_meter_is_skipped_with_that_reason() -> None:
    rules = Rules(source="kong-test", meter_api_requests=False)
    assert result(authenticated(), None, rules) is SkipReason.NOTHING_TO_METER


def test_usage_blocks_with_the_same_name_have_different_event_ids() -> None:
    ai = {"usage": USAGE, "ai": {"usage": USAGE}, "": {"usage": USAGE}}
    found = events(authenticated(ai=ai))
    assert len({event["id"] for event in found}) == len(found) == 7
