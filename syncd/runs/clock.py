"""Clock check: how far this machine's clock is off the metering API's, by the Date header of an answer.

Grace periods are days long, so a limit of minutes (`guards.max_clock_skew`) is strict enough. If syncd and
the metering API share one machine, both clocks may be wrong alike, and the check finds nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from syncd.core.errors import ApiError
from syncd.http.client import ApiClient
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry, http_date

Now = Callable[[], datetime]

_LAST_SECOND = datetime.max.replace(second=0, tzinfo=UTC)
_HALF_SECOND = timedelta(milliseconds=500)


def utc_now() -> datetime:
    """Return the time of this machine."""
    return datetime.now(UTC)


def date_of(header: str | None) -> datetime | None:
    """Return the time of a Date header (RFC 9110), None if it has none."""
    server = http_date(header)
    if server is None:
        return None
    # It has whole seconds: on average it is half a second behind.
    return min(server, _LAST_SECOND) + _HALF_SECOND


class Stopwatch:
    """Reads the clock once, then continues from there by a timer that clock changes do not affect."""

    def __init__(self, now: Now, timer: Callable[[], float] = time.monotonic) -> None:
        self.start = now()
        self._timer = timer
        self._began = timer()

    def now(self) -> datetime:
        """Return the start time plus the elapsed time."""
        return self.start + timedelta(seconds=self._timer() - self._began)


def server_time(endpoint: Endpoint) -> datetime | None:
    """Return the time in the Date header of an API's answer, None if it has none.

    Any answer will do. Raises ApiError if there is none.
    """
    with ApiClient(endpoint, Retry(attempts=1)) as client:
        return date_of(client.header("date"))


def clock_skew(endpoint: Endpoint, watch: Stopwatch) -> timedelta | None:
    """Return how far this machine's clock is ahead of an API's; None if the API's time is unknown."""
    try:
        server = server_time(endpoint)
    except ApiError:
        return None
    return None if server is None else watch.now() - server
