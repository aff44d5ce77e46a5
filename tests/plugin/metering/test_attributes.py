"""Configured attributes in the data of events."""

from __future__ import annotations

from typing import Any

import pytest

from openmeter_plugin.metering.kong_log import NOT_QUERIED, PdkQuery
from openmeter_plugin.metering.lenient_json import MAX_TEXT
from openmeter_plugin.metering.rules import Attribute, AttributePlace, Lookup, Rules, SkipReason
from tests.harness.recordings import llm_request, serialized
from tests.plugin.outcomes import authenticated, events, only, result


def data(log: dict[str, Any], place: AttributePlace, name: str, captures: object = None) -> dict[str, Any]:
    rules = Rules(source="kong-test", attributes=(Attribute(place, name, "x"),))
    values: dict[str, Any] = only(log, None, rules, captures)["data"]
    return values


def request(**changes: Any) -> dict[str, Any]:
    log = authenticated()
    log["request"]["headers"] |= changes.get("headers", {})
    log["response"]["headers"] |= changes.get("response_headers", {})
    log["consumer"]["tags"] = changes.get("tags")
    return log


CAPTURES = {"named": {"tenant": "t-1", "empty": ""}, "unnamed": ["t-1"]}

FOUND: list[tuple[AttributePlace, str, str]] = [
    ("header", "x-department", "sales"),
    ("query", "b", "x y"),
    ("response_header", "x-credits", "7"),
    ("path_capture", "tenant", "t-1"),
    ("consumer_tag", "tier", "gold"),
    ("constant", "eu-west", "eu-west"),
]


def everything() -> dict[str, Any]:
    return request(
        headers={"x-department": "sales"},
        response_headers={"x-credits": "7"},
        tags=["beta", "tier:gold", "customer:acme"],
    )


@pytest.mark.parametrize(("place", "name", "value"), FOUND)
def test_each_source_puts_its_value_into_the_data(place: AttributePlace, name: str, value: str) -> None:
    assert data(everything(), place, name, CAPTURES)["x"] == value


@pytest.mark.parametrize("place", ["header", "query", "response_header", "path_capture", "consumer_tag"])
def test_an_attribute_without_a_value_is_absent(place: AttributePlace) -> None:
    assert "x" not in data(everything(), place, "none", CAPTURES)


def test_attributes_are_in_token_events_too() -> None:
    rules = Rules(source="kong-test", attributes=(Attribute("constant", "eu", "region"),))
    assert [event["data"]["region"] for event in events(llm_request().parsed, None, rules)] == ["eu"] * 3


@pytest.mark.parametrize(
    "tags", [None, [], ["tier"], ["tier:"], ["tier: "], [3, None], "tier:gold", {"tier": 1}]
)
def test_a_consumer_without_the_tag_has_no_such_attribute(tags: object) -> None:
    assert "x" not in data(request(tags=tags), "consumer_tag", "tier")


def test_the_first_of_two_tags_counts_and_its_value_may_contain_a_colon() -> None:
    assert data(request(tags=["tier:a:b", "tier:c"]), "consumer_tag", "tier")["x"] == "a:b"


def test_the_status_of_a_grpc_call_is_known_only_if_it_failed_before_its_first_message() -> None:
    failed, streamed = serialized("grpc-status-8").parsed, serialized("grpc-server-stream").parsed
    assert data(failed, "response_header", "grpc-status")["x"] == "8"
    assert "x" not in data(streamed, "response_header", "grpc-status")


def test_the_first_of_a_repeated_response_header_counts() -> None:
    assert data(request(response_headers={"x-a": ["1", "2"]}), "response_header", "x-a")["x"] == "1"


@pytest.mark.parametrize(
    "captures",
    [None, [], {}, "x", {"named": None}, {"named": []}, {"named": {"tenant": 3}}, {"named": {"tenant": ""}}],
)
def test_invalid_captures_are_absent(captures: object) -> None:
    assert "x" not in data(authenticated(), "path_capture", "tenant", captures)


def test_a_long_attribute_of_any_source_is_cut() -> None:
    long = "x" * 5000
    log = request(headers={"h": long}, response_headers={"h": long}, tags=[f"h:{long}"])
    for place in ("header", "response_header", "path_capture", "consumer_tag"):
        assert data(log, place, "h", {"named": {"h": long}})["x"] == "x" * MAX_TEXT


def test_the_first_attribute_with_a_value_sets_a_property() -> None:
    rules = Rules(
        source="kong-test",
        attributes=(
            Attribute("consumer_tag", "tier", "tier"),
            Attribute("header", "x-tier", "tier"),
            Attribute("constant", "standard", "tier"),
        ),
    )
    both = request(tags=["tier:gold"], headers={"x-tier": "silver"})
    assert only(both, None, rules)["data"]["tier"] == "gold"
    assert only(request(headers={"x-tier": "silver"}), None, rules)["data"]["tier"] == "silver"
    assert only(request(), None, rules)["data"]["tier"] == "standard"


# PDK queries

CAPTURING = Rules(source="kong-test", attributes=(Attribute("path_capture", "tenant", "tenant"),))


def test_captures_are_queried_only_if_an_attribute_needs_them() -> None:
    assert result(authenticated(), None, CAPTURING, NOT_QUERIED) is PdkQuery.CAPTURES
    others = tuple(Attribute(place, name, "x") for place, name, _ in FOUND if place != "path_capture")
    assert isinstance(result(authenticated(), None, Rules("k", attributes=others), NOT_QUERIED), list)


def test_captures_are_not_queried_without_a_route_or_an_event() -> None:
    log = authenticated()
    del log["route"]
    assert isinstance(result(log, None, CAPTURING, NOT_QUERIED), list)
    assert result(serialized("401-no-key").parsed, None, CAPTURING, NOT_QUERIED) is SkipReason.NO_CONSUMER


def test_the_application_is_queried_before_the_captures() -> None:
    rules = Rules(
        source="kong-test",
        lookups=(Lookup("application", "id"), Lookup("consumer", "id")),
        attributes=CAPTURING.attributes,
    )
    assert result(authenticated(), NOT_QUERIED, rules, NOT_QUERIED) is PdkQuery.APPLICATION
    assert result(authenticated(), None, rules, NOT_QUERIED) is PdkQuery.CAPTURES
    assert isinstance(result(authenticated(), None, rules, None), list)
