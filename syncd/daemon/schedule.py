"""The schedule of the daemon: a run at its start, then by interval or crontab expression, with jitter.

A wait is measured on the monotonic clock, so a clock that is set back delays no run. The time of day ends it
too: after a jump ahead, or once a machine that slept is awake (the monotonic clock stands still meanwhile),
one run makes up for all that were missed. No time of a crontab expression counts twice.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from syncd.config.run import ScheduleConfig, next_times
from syncd.runs.clock import Now, utc_now

_LARGEST_STEP_BACK = timedelta(hours=1)
"""A clock that is set back by more was wrong before, so the times that it showed then count no longer."""


class Timetable:
    """When the next run is due: at once at first."""

    def __init__(
        self, config: ScheduleConfig, now: Now = utc_now, timer: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._now = now
        self._timer = timer
        self._slot = now()
        """The time that is due next, without jitter."""
        self._due, self._deadline = self._slot, timer()

    def remaining(self) -> float:
        """Return the seconds until the next run is due, by whichever clock says so first."""
        by_clock = (self._due - self._now()).total_seconds()
        return max(0.0, min(by_clock, self._deadline - self._timer()))

    def advance(self) -> None:
        """Go on to the run after the one that is due."""
        now = self._now()
        self._slot = self._following(now)
        self._due = self._slot + random.random() * (self._config.jitter or timedelta(0))  # noqa: S311
        self._deadline = self._timer() + (self._due - now).total_seconds()

    def change(self, config: ScheduleConfig) -> None:
        """Follow another schedule from now on."""
        self._config, self._slot = config, self._now()
        self.advance()

    def _following(self, now: datetime) -> datetime:
        slot = now if self._slot - now > _LARGEST_STEP_BACK else self._slot
        if self._config.cron is not None:
            return next_times(self._config.cron, max(slot, now), 1)[0]
        interval = self._config.interval
        return slot + interval if now < slot + interval <= now + interval else now + interval


class Schedule:
    """Calls `request` whenever a run is due; `change` and `next_run` are thread-safe.

    The clocks are looked at every `check_seconds`, and when a run is due.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        request: Callable[[], object],
        now: Now = utc_now,
        *,
        check_seconds: float = 20.0,
    ) -> None:
        self._timetable = Timetable(config, now)
        self._request = request
        self._now = now
        self._check_seconds = check_seconds
        self._changed = threading.Condition()
        self._stopped = False

    def work(self) -> None:
        """Wait and call `request`, until `stop`."""
        while self._wait():
            self._request()

    def _wait(self) -> bool:
        """Wait until a run is due; return False if stopped."""
        with self._changed:
            while not self._stopped and (remaining := self._timetable.remaining()) > 0:
                self._changed.wait(min(remaining, self._check_seconds))
            if not self._stopped:
                self._timetable.advance()
            return not self._stopped

    def change(self, config: ScheduleConfig) -> None:
        """Follow another schedule from now on."""
        with self._changed:
            self._timetable.change(config)
            self._changed.notify_all()

    def stop(self) -> None:
        """End `work`."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def next_run(self) -> datetime:
        """Return when the next run is due, on this machine's clock as it is set now."""
        with self._changed:
            return self._now() + timedelta(seconds=self._timetable.remaining())
