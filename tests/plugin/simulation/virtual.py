"""Virtual time: an event loop that never waits, and the clocks that the product reads."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

START = 1_795_800_000.0


class Clock:
    """Time as the simulation wants it: the wall may jump, what elapses never does."""

    def __init__(self) -> None:
        self.elapsed = 1000.0
        self.offset = START

    def monotonic(self) -> float:
        return self.elapsed

    def time(self) -> float:
        return self.elapsed + self.offset

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have everything in this process read this clock."""
        with (
            patch.object(time, "monotonic", self.monotonic),
            patch.object(time, "time", self.time),
            patch.object(time, "time_ns", self.time_ns),
        ):
            yield


class _Selector(selectors.SelectSelector):
    """Passes the time that the loop would wait."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that will never happen"
            self._clock.elapsed += timeout
        return ready


class _AtOnce(ThreadPoolExecutor):
    """Runs in the calling thread, so that each run of a history is the same."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def new_loop(clock: Clock) -> asyncio.AbstractEventLoop:
    """Return a loop in virtual time."""
    loop = asyncio.SelectorEventLoop(_Selector(clock))
    loop.set_default_executor(_AtOnce(1))
    return loop
