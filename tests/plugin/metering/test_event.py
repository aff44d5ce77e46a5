"""The content of an event: id, time, data and configured attributes."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.metering.kong_log import NOT_QUERIED, QueryResults
from openmeter_plugin.metering.lenient_json import MAX_TEXT, rfc3339
from openmeter_plugin.metering.rules import Attribute, Rules, SkipReason
from tests.harness.recordings import llm_request
from tests.plugin.outcomes import NOW_TEXT, RULES, SHAPES, authenticated, decided, events, only, result


def test_a_request_without_an_id_gets_a_random_one_for_all_its_events() -> None:
    log = llm_request().parsed
    del log["request"]["id"]
    assert [e["id"] for e in events(log)] == ["random-1", "random-1:proxy:input", "random-1:proxy:output"]


def test_no_random_id_is_generated_for_a_request_with_an_id() -> None:
    def refuse() -> str:
        raise AssertionError("a random id was generated")

    found = decided(authenticated(), QueryResults(), RULES, refuse)
    assert isinstance(found, list)


@pytest.mark.parametrize("started_at", [None, 0, -5, "soon", True, 253_402_300_800_000, 1e300, []])
def test_a_request_without_a_valid_time_gets_the_current_time(started_at: object) -> None:
    assert only(authenticated(started_at=started_at))["time"] == NOW_TEXT


@pytest.mark.parametrize(
    ("started_at", "text"),
    [
        (1, "1970-01-01T00:00:00.001Z"),
        (1795326543779.0, "2026-11-22T05:49:03.779Z"),
        (1795326543778.9998, "2026-11-22T05:49:03.779Z"),
        ("1795326543779", "2026-11-22T05:49:03.779Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_the_time_is_the_requests_start(started_at: object, text: str) -> None:
    assert only(authenticated(started_at=started_at))["time"] == text


@given(st.integers(0, 253_402_300_799_999))
def test_times_are_formatted_as_datetime_formats_them(milliseconds: int) -> None:
    moment = datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)
    expected = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert rfc3339(milliseconds) == expected
    assert rfc3339(milliseconds) == expected


def test_fields_missing_in_the_log_are_missing_in_the_event() -> None:
    event = only({"consumer": {"id": "c"}, "request": {"id": "r"}, "started_at": 1})
    assert event["data"] == {"consumer_id": "c"}


def test_a_request_that_kong_answered_itself_has_no_upstream_latency() -> None:
    log = authenticated(latencies={"request": 2, "proxy": -1, "kong": 1, "receive": 0})
    assert "upstream_latency_ms" not in only(log)["data"]
    assert only(log)["data"]["latency_ms"] == 2


def test_sizes_that_kong_wrote_as_text_are_numbers_in_the_event() -> None:
    log = authenticated()
    log["request"]["size"] = "122"
    assert only(log)["data"]["request_bytes"] == 122


def test_configured_attributes_are_in_the_data_of_every_event_of_the_request() -> None:
    rules = Rules(
        source="kong-test",
        attributes=(
            Attribute("header", "user-agent", "agent"),
            Attribute("query", "b", "why"),
            Attribute("header", "x-none", "never"),
        ),
    )
    for event in events(authenticated(ai=SHAPES["3.9 proxy"][0]), None, rules):
        assert (event["data"]["agent"], event["data"]["why"]) == ("curl/7.88.1", "x y")
        assert "never" not in event["data"]


def test_a_long_attribute_is_cut() -> None:
    log = authenticated()
    log["request"]["headers"]["user-agent"] = "a" * 10_000
    rules = Rules(source="kong-test", attributes=(Attribute("header", "user-agent", "agent"),))
    assert only(log, None, rules)["data"]["agent"] == "a" * MAX_TEXT


@pytest.mark.parametrize("log", [None, [], "", 0, True, 1.5, "null", [{}]])
def test_a_log_that_is_not_an_object_is_a_bad_record(log: object) -> None:
    assert result(log, NOT_QUERIED) is SkipReason.BAD_RECORD


def test_a_request_id_that_is_too_long_is_replaced_and_not_cut() -> None:
    log = authenticated()
    log["request"]["id"] = "r" * (MAX_TEXT + 1)
    assert only(log)["id"] == "random-1"
    log["request"]["id"] = "r" * MAX_TEXT
    assert only(log)["id"] == "r" * MAX_TEXT


@pytest.mark.parametrize(
    "size", ["9" * 17, "9" * 5000, str(2**53 + 1), "\N{SUPERSCRIPT TWO}", "-1", "1e3", ""]
)
def test_an_invalid_size_is_left_out(size: str) -> None:
    log = authenticated()
    log["request"]["size"] = size
    assert "request_bytes" not in only(log)["data"]
