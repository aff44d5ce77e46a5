"""Reads of other systems: concurrent, cached, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from syncd.core.errors import SourceError
from syncd.dashboard.queries import Reader
from tests.syncd.dashboard.test_session import Clock
from tests.syncd.waiting import eventually


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Blocks slow reads; set at the end, so that no thread is left."""
    event = threading.Event()
    yield event
    event.set()


def counted(answers: list[object]) -> tuple[list[int], Callable[[], object]]:
    calls: list[int] = []

    def read() -> object:
        calls.append(1)
        answer = answers[min(len(calls), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return calls, read


def test_an_answer_is_reused_while_it_is_fresh() -> None:
    clock = Clock()
    reader = Reader(clock, fresh=15)
    calls, read = counted(["first", "second"])
    assert reader.read_one("x", read).value == "first"
    clock.now += 14
    assert reader.read_one("x", read).value == "first"
    clock.now += 1
    assert reader.read_one("x", read).value == "second"
    assert len(calls) == 2


def test_a_failed_read_has_a_reason_and_is_not_repeated_at_each_view() -> None:
    clock = Clock()
    reader = Reader(clock)
    calls, read = counted([SourceError("kong", "HTTP 500"), "back again"])
    answer = reader.read_one("x", read)
    assert (answer.value, answer.problem) == (None, "source kong: HTTP 500")
    assert reader.read_one("x", read).problem == "source kong: HTTP 500"
    assert len(calls) == 1
    clock.now += 60
    assert reader.read_one("x", read).value == "back again"


def test_an_internal_error_reveals_no_details() -> None:
    answer = Reader().read_one("x", counted([ZeroDivisionError("secret")])[1])
    assert answer.problem == "internal error; the daemon's log has the details"


def test_all_reads_together_wait_no_longer_than_the_timeout(gate: threading.Event) -> None:
    reader = Reader(timeout=0.2)
    begun = time.monotonic()
    answers = reader.read_all({"a": gate.wait, "b": gate.wait, "c": gate.wait, "quick": lambda: True})
    took = time.monotonic() - begun
    assert 0.2 <= took < 0.5
    assert answers["quick"].value is True
    assert answers["a"].problem == "no answer within 0.2 s; try again in a moment"


def test_each_system_is_read_once_at_a_time(gate: threading.Event) -> None:
    reader = Reader(timeout=0.01)
    calls: list[int] = []

    def read() -> bool:
        calls.append(1)
        return gate.wait(10)

    for _ in range(20):
        reader.read_one("x", read)
    assert len(calls) == 1


def test_a_late_answer_is_available_to_the_next_view(gate: threading.Event) -> None:
    reader = Reader(timeout=0.01)
    assert reader.read_one("x", lambda: gate.wait(10) and "late").problem
    gate.set()
    assert eventually(lambda: reader.read_one("x", lambda: "another").value, what="the answer") == "late"


def test_a_system_that_stopped_answering_keeps_its_previous_answer(gate: threading.Event) -> None:
    clock = Clock()
    reader = Reader(clock, timeout=0.01)
    first = reader.read_one("x", lambda: "as it was", timeout=10)
    clock.now += 100
    answer = reader.read_one("x", lambda: gate.wait(10) and "new")
    assert (answer.value, answer.stale, answer.read_at) == ("as it was", True, first.read_at)


def test_too_many_concurrent_slow_reads_are_refused(gate: threading.Event) -> None:
    reader = Reader(timeout=0.01, max_concurrent=2)
    for name in ("a", "b"):
        reader.read_one(name, lambda: gate.wait(10))
    assert reader.read_one("c", lambda: "never asked").problem == (
        "too many systems are being read; try again in a moment"
    )
    gate.set()
    assert eventually(lambda: reader.read_one("c", lambda: "asked").value, what="a free place") == "asked"


def test_the_oldest_answers_are_evicted() -> None:
    reader = Reader()
    for number in range(300):
        reader.read_one(str(number), lambda: True)
    assert len(reader._entries) == 200
