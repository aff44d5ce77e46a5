"""Any order of edits, faults, lags and runs of syncd; `judge` says what has to hold."""

from __future__ import annotations

import os

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.syncd.model.machine import SyncdMachine

_STEPS = int(os.environ.get("MODEL_STEPS", "2000"))
_SEED = int(os.environ.get("MODEL_SEED", "0"))
_AT_ONCE = 40
_PARTS = 4


def run_model(steps: int, number: int) -> None:
    seeded: type[SyncdMachine] = seed(number)(type("Seeded", (SyncdMachine,), {}))
    how = settings(max_examples=max(1, steps // _AT_ONCE), stateful_step_count=_AT_ONCE, print_blob=False)
    run_state_machine_as_test(seeded, settings=how)


def test_nothing_of_people_changes_no_subject_strays_and_peace_brings_order() -> None:
    run_model(240, _PARTS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("MODEL_STEPS" not in os.environ, reason="takes minutes: run make model")
@pytest.mark.parametrize("part", range(_PARTS))
def test_the_same_holds_for_thousands_of_steps(part: int) -> None:
    """`make model` does 10,000, and others with another SEED."""
    run_model(_STEPS // _PARTS, _SEED * _PARTS + part)
