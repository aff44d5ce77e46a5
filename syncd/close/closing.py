"""Closing of a month, for the command and the daemon: check, close, close again, and look for late events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta

import structlog

from syncd.close.collect import EMPTY, Asked, collect, late_of, not_ended
from syncd.close.report import Acceptance, Kind, LateUsage, Month, Report, accepting, make
from syncd.close.store import ClosedMonth, ClosedMonths
from syncd.config.settings import Config
from syncd.core.errors import ApiError, StoppedError, SyncdError
from syncd.core.unbilled import ignored_on
from syncd.metering.base import MeteringApi
from syncd.runs.clock import Now, server_time, utc_now
from syncd.runs.factory import gateways_of, metering_endpoint, target_of
from syncd.runs.ignored import IgnoredEntry, IgnoredSubjects
from syncd.state.database import State

CHECKED_MONTHS = 13
"""How many of the latest closed months are compared with the meters: a year, and the month before it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person decided: the kinds of objections to accept, why, and who it was."""

    kinds: frozenset[Kind] = frozenset()
    reason: str = ""
    by: str | None = None


_NOTHING = Decision()


@dataclass(frozen=True, slots=True)
class Result:
    """A report, and the month as it is kept if it is closed; `late` is what has arrived for it since."""

    report: Report
    kept: ClosedMonth | None = None
    late: tuple[LateUsage, ...] = ()

    @property
    def is_closed(self) -> bool:
        """Return whether the month is closed, and its meters still count what the report says."""
        return self.report.closed and not self.late


@dataclass(frozen=True, slots=True)
class Closing:
    """Closes months with one configuration; without `months`, no report is kept."""

    config: Config
    months: ClosedMonths | None
    noted: Sequence[IgnoredEntry] = ()
    """The subjects that people ignore in the dashboard."""
    settle: float = 30.0
    on_wait: Callable[[int], object] = lambda _missing: None
    on_part: Callable[[int], object] = lambda _hours: None
    now: Now = utc_now
    sleep: Callable[[float], object] = time.sleep
    should_stop: Callable[[], bool] = lambda: False

    def close(
        self, month: Month, decision: Decision = _NOTHING, *, again: bool = False, keep: bool = True
    ) -> Result:
        """Close a month if there are no objections; a closed one is compared with the meters instead.

        With `again` a closed month gets a new revision. Raises SyncdError.
        """
        kept = next((one for one in self._closed() if one.month == month), None)
        with closing(target_of(self.config, self.sleep, self.should_stop)) as api:
            if self.months and kept is not None and not again:
                report = self.months.report(kept)
                late = self._late(api, kept, report)
                return Result(report, replace(kept, late=late), late)
            report = self._report(api, month, decision)
        if not (report.closed and keep and self.months):
            return Result(report)
        after = kept.revision if kept else 0
        return Result(report, self.months.keep(report, after, self.now(), decision.by))

    def check(self) -> list[ClosedMonth]:
        """Return all closed months, the latest of them compared with the meters. Raises SyncdError."""
        months = self._closed()
        if self.months is None or not months:
            return []
        with closing(target_of(self.config, self.sleep, self.should_stop)) as api:
            checked = [
                replace(kept, late=self._late(api, kept, self.months.report(kept)))
                for kept in months[:CHECKED_MONTHS]
            ]
        return checked + months[CHECKED_MONTHS:]

    def _report(self, api: MeteringApi, month: Month, decision: Decision) -> Report:
        now = self.now()
        if (objection := not_ended(month, now, self._metering_time())) is not None:
            return make(month, EMPTY, [objection])
        late: dict[Month, Sequence[LateUsage]] = {}
        lost: dict[str, int] = {}
        if self.months is not None:
            earlier = [one for one in self._closed() if one.month < month][:CHECKED_MONTHS]
            for kept in reversed(earlier):
                report = self.months.report(kept)
                late[kept.month] = self._late(api, kept, report)
                lost |= {one["name"]: one["requests_lost"] for one in report.content["gateways"]}
        asked = Asked(
            month,
            self.config,
            self._ignored((month.until - timedelta(days=1)).date()),
            lost,
            late,
        )
        with ExitStack() as stack:
            gateways = [stack.enter_context(closing(one)) for one in gateways_of(self.config)]
            found = collect(
                asked, api, gateways, settle=self.settle, on_wait=self.on_wait, on_part=self.on_part
            )
        accepted = Acceptance(decision.reason, decision.by or "")
        return make(month, found.figures, accepting(found.objections, decision.kinds, accepted))

    def _ignored(self, last_day: date) -> dict[str, str]:
        """Return the subjects that are meant to be unbilled until the end of the month."""
        return ignored_on(last_day, self.config.ignore, self.noted)

    def _closed(self) -> list[ClosedMonth]:
        return self.months.all() if self.months else []

    def _late(self, api: MeteringApi, kept: ClosedMonth, report: Report) -> tuple[LateUsage, ...]:
        late = late_of(api, report)
        if self.months and late != kept.late:
            self.months.note_late(kept, late, self.now())
        return late

    def _metering_time(self) -> datetime | None:
        """Return the metering API's time: a clock of this machine that is ahead closes no month early."""
        try:
            found = server_time(metering_endpoint(self.config))
        except ApiError:
            return None
        return found.astimezone(UTC) if found else None


@contextmanager
def opened(config: Config, *, create: bool) -> Iterator[tuple[ClosedMonths | None, Sequence[IgnoredEntry]]]:
    """Open the closed months and the ignored subjects; without `create`, none if there is no state so far."""
    if not create and not config.daemon.state.exists():
        yield None, ()
        return
    with State(config.daemon.state) as state:
        yield ClosedMonths(state), IgnoredSubjects(state).active()


_log = structlog.get_logger("syncd.close")

EVERY_SECONDS = 3600.0
STANDBY_SECONDS = 60.0
"""Time after which a daemon that may not check looks again whether it may."""


@dataclass(frozen=True, slots=True)
class LateWatch:
    """Checks closed months until `stopping` is set; `closing` is called for each check.

    `report` receives all closed months after each check that succeeded.
    """

    closing: Callable[[], Closing]
    report: Callable[[Sequence[ClosedMonth]], object]
    stopping: threading.Event
    may_check: Callable[[], bool] = lambda: True
    every: float = EVERY_SECONDS
    standby: float = STANDBY_SECONDS

    def work(self) -> None:
        """Check at once, and again each time that `every` seconds have passed, while it may."""
        while not self.stopping.is_set():
            may_check = self.may_check()
            if may_check:
                self.check()
            self.stopping.wait(self.every if may_check else self.standby)

    def check(self) -> None:
        """Check once; a failure is logged, and the state keeps what the last check found."""
        try:
            found = self.closing().check()
        except StoppedError:
            return
        except SyncdError as error:
            _log.warning("late_check_failed", error=str(error))
            return
        except Exception:
            _log.exception("late_check_failed")
            return
        for one in found:
            if one.late:
                _log.warning(
                    "late_usage",
                    month=str(one.month),
                    subjects=len(one.late),
                    requests=one.late_requests,
                    tokens=one.late_tokens,
                )
        self.report(found)
