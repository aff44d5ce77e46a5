"""Unbilled usage: how much, since when, and its fate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.core.changes import ChangeKind
from syncd.core.errors import MeterMissingError, UnreliableApiError
from syncd.core.model import ObservedState
from syncd.core.unbilled import first_day
from syncd.runs.unbilled import with_usage
from tests.syncd.builders import BY_TAG, OWNER, consumer, customer, observed, plan_for, static
from tests.syncd.memory_target import MemoryTarget
from tests.syncd.processes import Project

NOW = datetime(2026, 2, 1, 12, tzinfo=UTC)


class Metered(MemoryTarget):
    """Knows when each subject made its requests."""

    def __init__(self, state: ObservedState, requests: dict[str, list[datetime]]) -> None:
        super().__init__(state)
        self.requests = requests
        self.queries = 0

    def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
        self.queries += 1
        if meter != "kong_api_requests":
            return {}
        start = datetime.fromisoformat(since or "")
        end = datetime.fromisoformat(until) if until else NOW
        counts = {k: sum(start <= at < end for at in times) for k, times in self.requests.items()}
        return {key: float(count) for key, count in counts.items() if count}


def days(*ago: int) -> list[datetime]:
    return [NOW - timedelta(days=number, minutes=5) for number in ago]


def test_usage_under_the_id_of_a_customer_is_unbilled() -> None:
    state = observed(customer("acme", "x", identity="01ABC"))
    plan = with_usage(plan_for([], state), Metered(state, {"01ABC": days(1), "acme": days(1)}), state, NOW)
    assert plan.unbilled is not None
    assert [(s.key, s.events) for s in plan.unbilled.subjects] == [("01ABC", 1)]


def test_usage_that_an_unreliable_api_answers_stops_the_run() -> None:
    class Unreliable(Metered):
        def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
            raise UnreliableApiError("answers are mixed up")

    state = observed(customer("acme", "x"))
    with pytest.raises(UnreliableApiError):
        with_usage(plan_for([], state), Unreliable(state, {}), state, NOW)


def test_unbilled_usage_has_events_start_and_fate() -> None:
    state = observed(customer("acme", "x"), customer("finance", owner="other"))
    used = {"x": days(1), "consumer:1": days(3, 2), "stranger": days(9, 9, 1), "finance": days(1)}
    target = Metered(state, used)
    plan = with_usage(plan_for([consumer("1", "alice")], state), target, state, NOW)
    unbilled = plan.unbilled
    assert unbilled is not None
    assert [(s.key, s.events, s.fate) for s in unbilled.subjects] == [
        ("stranger", 3, "unknown"),
        ("consumer:1", 2, "planned"),
    ]
    assert unbilled.since is not None
    assert unbilled.since[:10] == "2026-01-23"
    assert unbilled.looked_from[:10] == "2026-01-01"


def test_a_blocked_change_has_the_events_that_it_leaves_unbilled() -> None:
    state = observed(customer("acme", "consumer:1", owner=OWNER, subscription="S"))
    target = Metered(state, {"consumer:2": days(2, 1)})
    tagged = [consumer("1", "alice", "customer:acme"), consumer("2", "bob", "customer:acme")]
    plan = with_usage(plan_for(tagged, state, rules=BY_TAG), target, state, NOW)
    (blocked,) = plan.changes
    assert blocked.usage is not None
    assert blocked.usage.events == 2
    assert plan.unbilled is not None
    figures = plan.unbilled.to_json()
    assert (figures["settled_events"], figures["blocked_events"]) == (2, 0), "a subscription is a decision"


def test_usage_under_the_id_of_a_customer_counts_as_unbilled_for_a_blocked_change_too() -> None:
    state = observed(customer("acme", "x", owner=OWNER, identity="01ABC", subscription="S"))
    target = Metered(state, {"01ABC": days(2, 1)})
    tagged = [static("01ABC", customer="acme")]
    plan = with_usage(plan_for(tagged, state, rules=BY_TAG), target, state, NOW)
    (blocked,) = plan.of(ChangeKind.BLOCKED)
    assert blocked.usage is not None
    assert blocked.usage.events == 2


def test_without_the_meters_the_plan_has_a_note() -> None:
    class Bare(MemoryTarget):
        def usage(self, meter: str, since: str | None, until: str | None) -> Mapping[str, float]:
            raise MeterMissingError("no meter")

    plan = with_usage(plan_for([consumer("1", "alice")], observed()), Bare(observed()), observed(), NOW)
    assert plan.unbilled is None
    assert plan.notes == ("unbilled usage is unknown: no meter",)
    assert plan.actionable


def test_without_unbilled_usage_the_first_day_is_not_searched() -> None:
    target = Metered(observed(), {})
    with_usage(plan_for([], observed()), target, observed(), NOW)
    assert target.queries == 2


@given(st.integers(0, 30))
def test_the_first_day_is_found_with_five_queries(day: int) -> None:
    asked = []
    used = NOW + timedelta(days=day, hours=3)

    def used_until(end: datetime) -> bool:
        asked.append(end)
        return used < end

    assert first_day(NOW, 31, used_until) == NOW + timedelta(days=day)
    assert len(asked) <= 5


def test_plan_shows_the_figure_in_table_and_json(tmp_path: Path, server: str) -> None:
    project = Project(tmp_path, server)
    with httpx.Client(base_url=server, headers={"Content-Type": "application/cloudevents+json"}) as client:
        event = {"specversion": "1.0", "source": "kong", "type": "kong.api_request", "subject": "stranger"}
        for number in range(3):
            client.post("/api/v1/events", json={**event, "id": str(number)}).raise_for_status()
    assert "Unbilled: 3 events of 1 subject without a customer, since" in project.call("plan").stdout
    figure = json.loads(project.call("plan", "--output=json").stdout)["unbilled"]
    assert (figure["subjects"], figure["events"], figure["blocked_events"]) == (1, 3, 0)


def test_a_blocked_move_leaves_nothing_unbilled_because_its_customer_pays_today() -> None:
    state = observed(customer("acme", "consumer:1", owner=OWNER), customer("globex", owner=OWNER))
    target = Metered(state, {"consumer:1": days(2, 1)})
    tagged = [consumer("1", "alice", "customer:globex")]
    plan = with_usage(plan_for(tagged, state, rules=BY_TAG), target, state, NOW)
    (blocked,) = plan.of(ChangeKind.BLOCKED)
    assert blocked.usage is None
    assert plan.unbilled is not None
    assert plan.unbilled.count() == 0
