"""Retries with exponential backoff and jitter, or after the wait that Retry-After asks for."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from syncd.core.errors import StoppedError, UnreachableError

_T = TypeVar("_T")

MAX_RETRY_AFTER = 60.0
"""Longest wait in seconds that an API can ask for."""


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


_paces: dict[str, Pace] = {}
_paces_lock = threading.Lock()


def pace_of(origin: str) -> Pace:
    """Return the pace of an API (scheme, host and port), which all its clients of this process share."""
    with _paces_lock:
        return _paces.setdefault(origin, Pace())


Permit = Callable[[], None]
"""Raises an error if nothing may be changed any longer."""


def unlimited() -> None:
    """Permit every change."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Retry:
    """Number of attempts, waits in seconds, and the request to stop, which ends each wait.

    `permit` is called before each piece of a request that may change something is sent.

    `sleep` may return early when `should_stop` becomes true; nothing is sent after that. Without a `pace`, a
    client uses that of its API.
    """

    attempts: int = 5
    first_wait: float = 0.2
    longest_wait: float = 10.0
    sleep: Callable[[float], object] = time.sleep
    should_stop: Callable[[], bool] = _never
    permit: Permit = unlimited
    pace: Pace | None = field(default=None, compare=False, repr=False)

    def at_pace_of(self, origin: str) -> Retry:
        """Return this policy at the pace of an API, unless it has one of its own."""
        return self if self.pace else replace(self, pace=pace_of(origin))

    def run(self, attempt: Callable[[], _T], *, once: bool = False) -> _T:
        """Return the result of `attempt`, repeated (unless `once`) while an UnreachableError allows it.

        The last error gives the number of tries. Raises StoppedError.
        """
        tries, pace = 0, self.pace or Pace()
        with ExitStack() as turns:
            while True:
                self._check_stop()
                pace.begin(self.sleep)
                self._check_stop()
                tries += 1
                try:
                    return attempt()
                except UnreachableError as error:
                    if error.retry_after is not None:
                        pace.refused(min(error.retry_after, MAX_RETRY_AFTER), turns)
                    if once or tries == self.attempts or not error.retryable:
                        raise _counted(error, tries) from None
                    wait = self._wait(error, tries, pace)
                pace.wait(wait, self.sleep)

    def _check_stop(self) -> None:
        if self.should_stop():
            raise StoppedError("stopped by request")

    def _wait(self, error: UnreachableError, tries: int, pace: Pace) -> float:
        jitter = random.random()  # noqa: S311 - spreads retries, protects nothing
        if error.retry_after is not None:
            return pace.remaining() + jitter * self.first_wait
        backoff = min(self.first_wait * 2.0 ** (tries - 1), self.longest_wait)
        return backoff * (0.5 + jitter / 2)


def _counted(error: UnreachableError, tries: int) -> UnreachableError:
    if tries == 1:
        return error
    return UnreachableError(
        f"{error} (tried {tries} times)",
        retryable=error.retryable,
        status=error.status,
        retry_after=error.retry_after,
    )


def http_date(header: str | None) -> datetime | None:
    """Return the time of a header such as Date (RFC 9110), in UTC, None if it has none: any text may come."""
    try:
        moment = parsedate_to_datetime(header or "")
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    # OverflowError for a year far away, the others for texts that only resemble a date (bpo-30681 and after).
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for (RFC 9110: number or date), None if it is odd."""
    text = (header or "").strip()
    try:
        seconds = float(text)
    except ValueError:
        moment = http_date(text)
        seconds = (moment - datetime.now(UTC)).total_seconds() if moment else float("nan")
    if seconds != seconds:  # not a number
        return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER)
