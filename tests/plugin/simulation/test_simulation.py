"""Thousands of short histories of spool, books and delivery, with whatever can go wrong, in virtual time.

    SIMULATED_HISTORIES=10000 .venv/bin/pytest -n 2 tests/plugin/simulation     the long tier
    SIMULATED_FIRST=4711 SIMULATED_HISTORIES=1 ...                              one history again

A failure names its seed: the same seed is the same history.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests.plugin.simulation.history import simulate

HISTORIES = int(os.environ.get("SIMULATED_HISTORIES", "200"))
FIRST = int(os.environ.get("SIMULATED_FIRST", "0"))
GROUP = 100


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(FIRST, FIRST + HISTORIES, GROUP))
def test_what_was_acknowledged_is_delivered_once_or_a_dead_letter_or_counted_as_lost(first: int) -> None:
    sums: Counter[str] = Counter()
    for seed in range(first, min(first + GROUP, FIRST + HISTORIES)):
        try:
            outcome = simulate(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}: run it again with SIMULATED_FIRST={seed} SIMULATED_HISTORIES=1")
            raise
        sums.update(events=outcome.events, dead=outcome.dead, lost=outcome.lost)
    print(f"seeds {first} to {seed}: {dict(sums)}")
    if HISTORIES >= GROUP:
        assert sums["events"] > 10 * GROUP, "the histories should have events"
        assert sums["dead"], "some should be refused"


def test_a_history_is_the_same_each_time() -> None:
    assert simulate(3) == simulate(3)
