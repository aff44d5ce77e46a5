"""How often something is tried, and the wait between: exponential backoff with jitter, or Retry-After."""

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
    """What an API that answers with Retry-After asks of all threads that talk to it.

    Until that time is over nobody begins anything. Then those that were refused go first, one at a
    time, each until it has its answer, and only after them all go on at once. So whoever is refused
    is not crowded out by the others until its attempts are used up.
    """

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._noting = threading.Lock()
        self._until = 0.0

    def refused(self, seconds: float, turns: ExitStack) -> None:
        """Note the wait, and wait for a turn alone, which lasts until `turns` is left."""
        with self._noting:
            self._until = max(self._until, time.monotonic() + seconds)
        turns.enter_context(self._turn)

    def remaining(self) -> float:
        """Return how many seconds are left to wait."""
        return max(0.0, self._until - time.monotonic())

    def wait(self, seconds: float, sleep: Callable[[float], object]) -> None:
        """Sleep so long; what an API asked for is over then, unless it asked again meanwhile."""
        until, left = self._until, self.remaining()
        sleep(seconds)
        if seconds >= left:
            with self._noting:
                self._until = 0.0 if self._until == until else self._until

    def begin(self, sleep: Callable[[float], object]) -> None:
        """Return when this thread may ask."""
        with self._turn:
            pass
        if (left := self.remaining()) > 0:
            self.wait(left, sleep)


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently, in seconds; `sleep` may return early, then the next attempt follows.

    All that talk to one API at a time share a `pace`.
    """

    attempts: int = 5
    first_wait: float = 0.2
    longest_wait: float = 10.0
    sleep: Callable[[float], object] = time.sleep
    pace: Pace = field(default_factory=Pace, compare=False, repr=False)

    def run(self, attempt: Callable[[], _T]) -> _T:
        """Call `attempt` until it raises no UnreachableError; the last one tells how often it was tried."""
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
                return self._tried(paced)
            except UnreachableError as error:
                raise UnreachableError(f"{error} (tried {self.attempts} times)") from None

    def _tried(self, attempt: Callable[[], _T]) -> _T:
        first: UnreachableError | None = None
        try:
            return attempt()
        except UnreachableError as error:
            if self.attempts == 1:
                raise
            first = error

        def again() -> _T:
            # The first attempt was made above: nearly all need no other, and none of what follows.
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
