"""Looking at other systems: at once, with a deadline, remembered for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from syncd.core.errors import SourceError
from syncd.dashboard.reading import Reader
from tests.syncd.dashboard.test_session import Clock
from tests.syncd.waiting import eventually


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What slow readings wait for; open at the end, so that no thread stays."""
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


def test_an_answer_is_shown_again_while_it_is_fresh() -> None:
    clock = Clock()
    reader = Reader(clock, fresh=15)
    calls, read = counted(["first", "second"])
    assert reader.ask_one("x", read).value == "first"
    clock.now += 14
    assert reader.ask_one("x", read).value == "first"
    clock.now += 1
    assert reader.ask_one("x", read).value == "second"
    assert len(calls) == 2


def test_what_cannot_be_read_says_why_and_is_not_asked_at_each_view() -> None:
    clock = Clock()
    reader = Reader(clock)
    calls, read = counted([SourceError("kong", "HTTP 500"), "back again"])
    answer = reader.ask_one("x", read)
    assert (answer.value, answer.problem) == (None, "source kong: HTTP 500")
    assert reader.ask_one("x", read).problem == "source kong: HTTP 500"
    assert len(calls) == 1
    clock.now += 60
    assert reader.ask_one("x", read).value == "back again"


def test_a_mistake_of_ours_shows_nothing_of_itself() -> None:
    answer = Reader().ask_one("x", counted([ZeroDivisionError("secret")])[1])
    assert answer.problem == "internal error; the daemon's log has the details"


def test_all_questions_together_wait_no_longer_than_the_patience(gate: threading.Event) -> None:
    reader = Reader(patience=0.2)
    begun = time.monotonic()
    answers = reader.ask({"a": gate.wait, "b": gate.wait, "c": gate.wait, "quick": lambda: True})
    took = time.monotonic() - begun
    assert 0.2 <= took < 0.5
    assert answers["quick"].value is True
    assert answers["a"].problem == "no answer within 0.2 s; look again in a moment"


def test_of_one_thing_there_is_one_reading_at_a_time(gate: threading.Event) -> None:
    reader = Reader(patience=0.01)
    calls: list[int] = []

    def read() -> bool:
        calls.append(1)
        return gate.wait(10)

    for _ in range(20):
        reader.ask_one("x", read)
    assert len(calls) == 1


def test_a_late_answer_is_there_for_the_next_view(gate: threading.Event) -> None:
    reader = Reader(patience=0.01)
    assert reader.ask_one("x", lambda: gate.wait(10) and "late").problem
    gate.set()
    assert eventually(lambda: reader.ask_one("x", lambda: "another").value, what="the answer") == "late"


def test_what_answers_no_more_is_shown_as_it_was(gate: threading.Event) -> None:
    clock = Clock()
    reader = Reader(clock, patience=0.01)
    first = reader.ask_one("x", lambda: "as it was", patience=10)
    clock.now += 100
    answer = reader.ask_one("x", lambda: gate.wait(10) and "new")
    assert (answer.value, answer.late, answer.read_at) == ("as it was", True, first.read_at)


def test_too_many_slow_readings_at_once_are_refused_and_told(gate: threading.Event) -> None:
    reader = Reader(patience=0.01, at_once=2)
    for name in ("a", "b"):
        reader.ask_one(name, lambda: gate.wait(10))
    assert reader.ask_one("c", lambda: "never asked").problem == (
        "too much is being read at once; look again in a moment"
    )
    gate.set()
    assert eventually(lambda: reader.ask_one("c", lambda: "asked").value, what="a free place") == "asked"


def test_what_nobody_looks_at_any_more_is_forgotten() -> None:
    reader = Reader()
    for number in range(300):
        reader.ask_one(str(number), lambda: True)
    assert len(reader._entries) == 200
