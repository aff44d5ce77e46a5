"""The schedule of the daemon: a run at its start, then by interval or crontab expression, with jitter.

APScheduler's triggers say which time comes next. The wait is our own, since APScheduler waits by the time of
day alone: a clock that is set back by an hour would stop all runs for that hour. Here it is measured on the
monotonic clock. The time of day ends it too: after a jump ahead, or once a machine that slept is awake (the
monotonic clock stands still meanwhile), one run makes up for all that were missed. No time of a crontab
expression counts twice.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.interval import IntervalTrigger

from syncd.config.sections import ScheduleConfig, next_times
from syncd.runs.clock import Now, utc_now

_LARGEST_STEP_BACK = timedelta(hours=1)
"""A clock that is set back by more was wrong before, so the times that it showed then count no longer."""


class StandardCronTrigger(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """The times of a crontab expression as cron itself has them.

    APScheduler's CronTrigger numbers weekdays from Monday = 0 and combines both kinds of days by AND.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime:
        """Return the first time after both: no time comes twice on a clock that is set back."""
        return next_times(self.expression, max(previous_fire_time or now, now), 1)[0]


def trigger_of(config: ScheduleConfig) -> BaseTrigger:
    """Return the trigger of a schedule, without its jitter."""
    if config.cron is not None:
        return StandardCronTrigger(config.cron)
    return IntervalTrigger(seconds=config.interval.total_seconds(), timezone=UTC)


class Timetable:
    """When the next run is due: at once at first."""

    def __init__(
        self, config: ScheduleConfig, now: Now = utc_now, timer: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._trigger = trigger_of(config)
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
        self._config, self._trigger, self._slot = config, trigger_of(config), self._now()
        self.advance()

    def _following(self, now: datetime) -> datetime:
        slot = now if self._slot - now > _LARGEST_STEP_BACK else self._slot
        following: datetime = self._trigger.get_next_fire_time(slot, now)
        if self._config.cron is None and not now < following <= now + self._config.interval:
            following = self._trigger.get_next_fire_time(now, now)
        return following


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
