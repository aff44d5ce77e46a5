"""Meter queries by hour and subject, in both dialects, validated against the specifications."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime

import httpx
import pytest

from syncd.audit.compare import HOUR, Line, Yardstick
from syncd.audit.run import HourlyMeters, yardstick
from syncd.config.settings import Dialect
from syncd.core.errors import MalformedError
from syncd.metering.base import Meter
from syncd.sandbox.testing import running_sandbox
from tests.specs import checked
from tests.syncd.metering.test_contract import specs_of
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.targets import open_target, target_at

pytestmark = pytest.mark.slow

REQUEST, TOKENS = "kong.api_request", "kong.llm_request"
HOUR_7 = datetime(2026, 11, 22, 7, tzinfo=UTC)


def meter(key: str, aggregation: str, kind: str = TOKENS, events_from: str | None = None) -> Meter:
    return Meter(key, key, "", aggregation, kind, events_from=events_from)


def chosen(*meters: Meter, kind: str = TOKENS) -> Yardstick | None:
    return yardstick(kind, {one.key: one for one in meters})


def test_a_counting_meter_is_preferred_to_a_summing_one_and_the_standard_one_to_others() -> None:
    summing, counting = meter("kong_llm_tokens", "sum"), meter("zzz", "count")
    assert chosen(summing, meter("max", "max")) == Yardstick(TOKENS, "kong_llm_tokens", exact=False)
    assert chosen(meter("aaa", "sum"), summing) == Yardstick(TOKENS, "kong_llm_tokens", exact=False)
    assert chosen(summing, counting) == Yardstick(TOKENS, "zzz")
    assert chosen(meter("max", "max")) is None
    standard = meter("kong_api_requests", "count", REQUEST)
    assert chosen(meter("aaa", "count", REQUEST), standard, kind=REQUEST) == Yardstick(
        REQUEST, "kong_api_requests"
    )


def test_a_meter_covers_only_whole_hours_after_it_began_to_count() -> None:
    assert chosen(meter("m", "count", events_from="2026-11-22T06:00:01Z")) == Yardstick(
        TOKENS, "m", since=HOUR_7
    )
    assert chosen(meter("m", "count", events_from="2026-11-22T07:00:00+00:00")) == Yardstick(
        TOKENS, "m", since=HOUR_7
    )
    with pytest.raises(MalformedError, match="meter m"):
        chosen(meter("m", "count", events_from="yesterday"))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_sandbox() as url:
        times = ["06:59:59.999", "07:00:00.000", "07:30:00.000", "07:59:59.999", "08:00:00.000"]
        for number, time in enumerate(times):
            for subject, kind, data in (("alice", REQUEST, {}), ("bob", TOKENS, {"tokens": 40})):
                event = {"specversion": "1.0", "id": f"{subject}-{number}", "source": "kong", "type": kind}
                event |= {"subject": subject, "time": f"2026-11-22T{time}Z"}
                headers = {"content-type": "application/cloudevents+json"}
                body = {**event, "data": data}
                httpx.post(f"{url}/api/v1/events", json=body, headers=headers).raise_for_status()
        yield url


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_the_events_of_each_hour_and_subject_are_counted_at_their_hour(server: str, dialect: Dialect) -> None:
    with closing(open_target(dialect, server)) as target:
        checked(target._client, specs_of(dialect))
        meters = HourlyMeters(target)
        requests, tokens = meters.yardstick(REQUEST), meters.yardstick(TOKENS)
        assert requests is not None
        assert tokens == Yardstick(TOKENS, "kong_llm_events")
        assert meters.values(requests, HOUR_7, HOUR_7 + HOUR) == {Line(HOUR_7, REQUEST, "alice"): 3}
        assert meters.values(tokens, HOUR_7 - HOUR, HOUR_7 + HOUR) == {
            Line(HOUR_7 - HOUR, TOKENS, "bob"): 1,
            Line(HOUR_7, TOKENS, "bob"): 3,
        }
        summing = Yardstick(TOKENS, "kong_llm_tokens", exact=False)
        assert meters.values(summing, HOUR_7, HOUR_7 + HOUR) == {Line(HOUR_7, TOKENS, "bob"): 1}


def answered(row: object, aggregation: str = "COUNT") -> dict[Line, int]:
    def answer(asked: Asked) -> Answer:
        listed = [{"slug": "m", "aggregation": aggregation, "eventType": REQUEST}]
        return Answer(listed if asked.path == "/api/v1/meters" else {"data": [row]})

    with serving(answer) as fake, closing(target_at(fake.url)) as target:
        meters = HourlyMeters(target)
        used = meters.yardstick(REQUEST)
        assert used is not None
        return meters.values(used, HOUR_7, HOUR_7 + HOUR)


def test_the_hour_after_the_end_that_a_server_may_include_is_dropped() -> None:
    assert answered({"windowStart": "2026-11-22T08:00:00Z", "subject": "alice", "value": 7}) == {}


def test_an_event_without_a_subject_is_counted_under_the_empty_subject() -> None:
    row = {"windowStart": "2026-11-22T07:00:00Z", "subject": None, "value": 7}
    assert answered(row) == {Line(HOUR_7, REQUEST, ""): 7}


def test_a_sum_of_nothing_is_no_usage() -> None:
    row = {"windowStart": "2026-11-22T07:00:00Z", "subject": "alice"}
    assert answered({**row, "value": 0}, "SUM") == {}
    assert answered({**row, "value": 0.5}, "SUM") == {Line(HOUR_7, REQUEST, "alice"): 1}


@pytest.mark.parametrize(
    "row",
    [
        {"windowStart": "2026-11-22T07:00:00Z", "subject": "alice", "value": True},
        {"windowStart": "2026-11-22T07:00:00Z", "subject": "alice"},
        {"windowStart": "sometime", "subject": "alice", "value": 1},
        {"subject": "alice", "value": 1},
        {"windowStart": "2026-11-22T07:00:00Z", "subject": "alice", "value": 1.5},
        "row",
    ],
)
def test_an_unusable_answer_is_an_error_and_never_a_zero(row: object) -> None:
    with pytest.raises(MalformedError):
        answered(row)
