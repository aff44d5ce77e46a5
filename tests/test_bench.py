"""The benchmarks run: with a few events each, so that their figures are not looked at."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.bench import plugin

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("contender", plugin.CONTENDERS, ids=lambda contender: contender.name)
def test_each_server_is_measured(contender: plugin.Contender) -> None:
    measured = plugin.measure(replace(contender, events=100))
    assert measured.rate > 0
    assert measured.pss > 0


def test_a_drain_is_compared_with_a_bare_loop() -> None:
    (drain,) = plugin.drain(1000, 1, lambda _: None)
    assert drain.ratio > 0
