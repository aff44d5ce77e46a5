"""How often something is tried, and the wait between: exponential backoff with jitter, or Retry-After."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from syncd.errors import UnreachableError

_T = TypeVar("_T")

_LONGEST_RETRY_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently, in seconds; `sleep` may return early, then the next attempt follows."""

    attempts: int = 5
    first_wait: float = 0.2
    longest_wait: float = 10.0
    sleep: Callable[[float], object] = time.sleep

    def run(self, attempt: Callable[[], _T]) -> _T:
        """Call `attempt` until it raises no UnreachableError; the last one tells how often it was tried."""
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=self._wait,
            sleep=self._pause,
            retry=tenacity.retry_if_exception_type(UnreachableError),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except UnreachableError as error:
            raise UnreachableError(f"{error} (tried {self.attempts} times)") from None

    def _pause(self, seconds: float) -> None:
        self.sleep(seconds)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        jitter = random.random()  # noqa: S311 - spreads retries, protects nothing
        if isinstance(error, UnreachableError) and error.retry_after is not None:
            return min(error.retry_after, _LONGEST_RETRY_AFTER) + jitter * self.first_wait
        backoff = min(self.first_wait * 2.0 ** (state.attempt_number - 1), self.longest_wait)
        return backoff * (0.5 + jitter / 2)
