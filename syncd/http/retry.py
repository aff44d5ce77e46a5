"""Retries with exponential backoff and jitter, or after the wait that Retry-After asks for."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import tenacity

from syncd.core.errors import UnreachableError

_T = TypeVar("_T")

_MAX_RETRY_AFTER = 60.0


class Pace:
    """The Retry-After of one API, applied to all threads that talk to it.

    No thread starts a request before that time is over. Then the refused requests go first, one at a
    time, each until it has its answer; after them all threads continue in parallel. So the others cannot
    crowd out a refused request until its attempts are used up.
    """

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._until_lock = threading.Lock()
        self._until = 0.0

    def refused(self, seconds: float, turns: ExitStack) -> None:
        """Record the wait, and take the turn, which lasts until `turns` is closed."""
        with self._until_lock:
            self._until = max(self._until, time.monotonic() + seconds)
        turns.enter_context(self._turn)

    def remaining(self) -> float:
        """Return how many seconds are left to wait."""
        return max(0.0, self._until - time.monotonic())

    def wait(self, seconds: float, sleep: Callable[[float], object]) -> None:
        """Sleep; clears the wait that the API asked for if it is over and was not asked for again."""
        until, left = self._until, self.remaining()
        sleep(seconds)
        if seconds >= left:
            with self._until_lock:
                self._until = 0.0 if self._until == until else self._until

    def begin(self, sleep: Callable[[float], object]) -> None:
        """Block until this thread may send a request."""
        with self._turn:
            pass
        if (left := self.remaining()) > 0:
            self.wait(left, sleep)


@dataclass(frozen=True, slots=True)
class Retry:
    """Number of attempts, and waits in seconds; if `sleep` returns early, the next attempt follows at once.

    All clients of one API share a `pace`.
    """

    attempts: int = 5
    first_wait: float = 0.2
    longest_wait: float = 10.0
    sleep: Callable[[float], object] = time.sleep
    pace: Pace = field(default_factory=Pace, compare=False, repr=False)

    def run(self, attempt: Callable[[], _T]) -> _T:
        """Call `attempt` until it raises no UnreachableError; the last error gives the number of tries."""
        with ExitStack() as turns:

            def paced() -> _T:
                self.pace.begin(self.sleep)
                try:
                    return attempt()
                except UnreachableError as error:
                    if error.retry_after is not None:
                        self.pace.refused(min(error.retry_after, _MAX_RETRY_AFTER), turns)
                    raise

            try:
                return self._attempts(paced)
            except UnreachableError as error:
                raise UnreachableError(f"{error} (tried {self.attempts} times)") from None

    def _attempts(self, attempt: Callable[[], _T]) -> _T:
        first: UnreachableError | None = None
        try:
            return attempt()
        except UnreachableError as error:
            if self.attempts == 1:
                raise
            first = error

        def again() -> _T:
            # The first attempt was made above: nearly all succeed, and then tenacity is not needed.
            nonlocal first
            if first is not None:
                failed, first = first, None
                raise failed
            return attempt()

        return self._retrying()(again)

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self._wait,
            sleep=self._pause,
            retry=tenacity.retry_if_exception_type(UnreachableError),
            reraise=True,
        )

    def _pause(self, seconds: float) -> None:
        self.pace.wait(seconds, self.sleep)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        jitter = random.random()  # noqa: S311 - spreads retries, protects nothing
        if isinstance(error, UnreachableError) and error.retry_after is not None:
            return self.pace.remaining() + jitter * self.first_wait
        backoff = min(self.first_wait * 2.0 ** (state.attempt_number - 1), self.longest_wait)
        return backoff * (0.5 + jitter / 2)
