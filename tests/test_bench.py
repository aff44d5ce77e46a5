"""The benchmarks run: with a few events each, so that their figures are not looked at."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from tests.bench import backlog, beside, plugin, world

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("contender", plugin.CONTENDERS, ids=lambda contender: contender.name)
def test_each_server_is_measured(contender: plugin.Contender) -> None:
    measured = plugin.measure(replace(contender, events=100))
    assert measured.rate > 0
    assert measured.pss > 0


def test_a_drain_is_compared_with_a_bare_loop() -> None:
    (drain,) = plugin.drain(1000, 1, lambda _: None)
    assert drain.ratio > 0


def test_a_start_with_a_backlog_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog, "SEGMENT", 100_000)
    monkeypatch.setattr(backlog, "_SECONDS", 1.0)
    start = backlog.measure(0.001, lambda _: None)
    assert start.ready > 0
    assert start.pss > 0


def test_calls_are_measured_beside_posts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "SIZE", 20_000)
    results = beside.measure(0.3, lambda _: None)
    assert all(result.posts > 0 for name, result in results.items() if name != "no post")
    assert all(result.waits for result in results.values())


@pytest.mark.parametrize("meter", ["kong_api_requests", "kong_llm_tokens"])
def test_the_generated_world_has_the_same_total_by_day_and_by_subject(meter: str) -> None:
    generated = world.World(customers=20, subjects=60, days=90)
    api = world.Api(generated, "http://world")
    for age in (0, 25, 40, 89, 90):
        day = generated.today - timedelta(days=age)
        by_labels = sum(value for *_, value in generated.rows(meter, day, ["route_name", "model", "type"]))
        assert by_labels == generated.total(meter, day)
        path = f"/api/v1/meters/{meter}/query?from={day}T00:00:00Z&to={day + timedelta(days=1)}T00:00:00Z"
        _, body = api.answer("GET", f"{path}&groupBy=subject")
        assert isinstance(body, dict)
        assert sum(row["value"] for row in body["data"]) == by_labels
    assert generated.total(meter, generated.today - timedelta(days=90)) == 0
