"""The daemon's look at closed months: who looks, and what a failure costs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from syncd.close.closing import Closing, LateWatch
from syncd.core.errors import StateError
from tests.syncd.waiting import eventually


class Looks:
    """A closing that only counts how often it was asked."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.number = 0
        self.fail = fail

    def check(self) -> list[Any]:
        self.number += 1
        if self.fail is not None:
            raise self.fail
        return []


@contextmanager
def watching(looks: Looks, **settings: Any) -> Iterator[list[object]]:
    """Run the thread; yields what it reports."""
    stopping, reports = threading.Event(), list[object]()
    closing = cast("Callable[[], Closing]", lambda: looks)
    watch = LateWatch(closing, reports.append, stopping, **settings)
    thread = threading.Thread(target=watch.work)
    thread.start()
    try:
        yield reports
    finally:
        stopping.set()
        thread.join(10)
        assert not thread.is_alive()


def test_a_daemon_that_does_not_lead_compares_nothing_until_it_does() -> None:
    asked, leads = threading.Event(), threading.Event()

    def may_check() -> bool:
        asked.set()
        return leads.is_set()

    looks = Looks()
    with watching(looks, may_check=may_check, standby=0.01) as reports:
        for _ in range(3):
            asked.clear()
            assert asked.wait(10)
        assert looks.number == 0
        leads.set()
        eventually(lambda: reports == [[]])
    assert looks.number == 1, "the next look is an hour away"


@pytest.mark.parametrize("error", [StateError("the disk is full"), ZeroDivisionError()])
def test_a_look_that_fails_is_followed_by_the_next(error: Exception) -> None:
    looks = Looks(error)
    with watching(looks, every=0.01) as reports:
        eventually(lambda: looks.number >= 3)
        looks.fail = None
        eventually(lambda: reports)
