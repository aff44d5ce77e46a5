"""The benchmarks run: with a few events each, so that their figures are not looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench import backlog, beside, plugin

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
