"""What time is it, and is that so? The metering API's Date header is the witness; a jump is told by a timer.

Grace periods are days, so a bound of minutes (`guards.max_clock_skew`) is tight enough. Where syncd and
the metering API run on one machine both may be wrong alike: then the witness is of no use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx

from syncd.http.client import Endpoint

Now = Callable[[], datetime]

_NO_JUMP = timedelta(seconds=30)
_HALF_SECOND = timedelta(milliseconds=500)


def utc_now() -> datetime:
    """Return the time of this machine."""
    return datetime.now(UTC)


def date_of(header: str | None) -> datetime | None:
    """Return the time that a Date header tells (RFC 9110), None where it tells none."""
    try:
        told = parsedate_to_datetime(header or "")
    except ValueError:
        return None
    # It has whole seconds: on average it is half a second behind.
    return told.replace(tzinfo=told.tzinfo or UTC) + _HALF_SECOND


class Stopwatch:
    """A moment of this machine's clock that goes on by a timer, whatever the clock does afterwards."""

    def __init__(self, now: Now, timer: Callable[[], float] = time.monotonic) -> None:
        self.start = now()
        self._timer = timer
        self._began = timer()

    def now(self) -> datetime:
        """Return what the clock would say had it gone on from the start."""
        return self.start + timedelta(seconds=self._timer() - self._began)


class JumpWatch:
    """Tells when this machine's clock was set, or slept."""

    def __init__(self, now: Now, timer: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._timer = timer
        self._watch = Stopwatch(now, timer)

    def jumped(self) -> timedelta:
        """Return by how much it jumped ahead (or, negative, back) since it did last; zero if not by much."""
        ahead = self._now() - self._watch.now()
        if abs(ahead) < _NO_JUMP:
            return timedelta(0)
        self._watch = Stopwatch(self._now, self._timer)
        return ahead


def server_time(endpoint: Endpoint) -> datetime | None:
    """Return the time that an API tells by the Date header of any answer, None where it tells none.

    Raises httpx.HTTPError where there is no answer.
    """
    answer = httpx.get(endpoint.url, headers=endpoint.headers(), timeout=endpoint.timeout)
    return date_of(answer.headers.get("date"))


def clock_skew(endpoint: Endpoint, watch: Stopwatch) -> timedelta | None:
    """Return how far this machine is ahead of an API, None where that does not tell the time."""
    try:
        told = server_time(endpoint)
    except httpx.HTTPError:
        return None
    return None if told is None else watch.now() - told
