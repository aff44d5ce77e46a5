"""Any order of edits, faults, lags and runs of syncd; `judge` says what has to hold."""

from __future__ import annotations

import os

import pytest
from hypothesis import seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.syncd.model.api import Fault
from tests.syncd.model.kong import Consumer
from tests.syncd.model.machine import SyncdMachine

_STEPS = int(os.environ.get("MODEL_STEPS", "2000"))
_SEED = int(os.environ.get("MODEL_SEED", "0"))
_AT_ONCE = 40
_PARTS = 4


def run_model(steps: int, number: int) -> None:
    seeded: type[SyncdMachine] = seed(number)(type("Seeded", (SyncdMachine,), {}))
    how = settings(max_examples=max(1, steps // _AT_ONCE), stateful_step_count=_AT_ONCE, print_blob=False)
    run_state_machine_as_test(seeded, settings=how)


@pytest.mark.slow
def test_nothing_of_people_changes_no_subject_strays_and_peace_brings_order() -> None:
    run_model(240, _PARTS)


def test_an_answer_about_the_customer_that_was_asked_for_is_not_judged_as_one_about_someone_else() -> None:
    """A write that the server refuses, whose answer is then the customer as it was: found with SEED=11."""
    machine = SyncdMachine()
    try:
        machine.settings(policy="sync", key="{kind}-{id}", attempts=1)
        globex = Consumer("1", "alice", "globex")
        machine.a_person_is_faster(consumer=globex, dialect="openmeter-v1", race=Fault("key", 0, "taken-key"))
        machine.replicas_fall_behind(lists=1, reads=0)
        machine.a_person_is_faster(
            consumer=Consumer("2", "alice", None),
            dialect="openmeter-v3",
            race=Fault("create", 1, "taken-key"),
        )
        machine.syncd_meets_a_fault(
            news=[Consumer("2", "alice", "globex")],
            dialect="openmeter-v1",
            move=False,
            fault=Fault("write", 0, "someone-else"),
            again=False,
        )
    finally:
        machine.teardown()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("MODEL_STEPS" not in os.environ, reason="takes minutes: run make model")
@pytest.mark.parametrize("part", range(_PARTS))
def test_the_same_holds_for_thousands_of_steps(part: int) -> None:
    """`make model` does 10,000, and others with another SEED."""
    run_model(_STEPS // _PARTS, _SEED * _PARTS + part)
