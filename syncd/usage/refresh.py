"""The refresh: brings the kept usage up to date with the metering API, in few and bounded requests.

For each meter one request returns the totals of all kept days. Only a day whose total differs from the kept
one is fetched, by subject and dimensions: today's as a rule, and older ones with late usage. A first refresh
does so for each day with usage, the newest first, `_MAX_DAYS` at a time.

Each day is written at once, so a refresh may end anywhere: the next one finds what is left by the same rule.
It has a client of its own and takes no lock of the runs. One day of one meter is in memory at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

import structlog

from syncd.config.settings import Config
from syncd.core.errors import ApiError, RefusedError, StoppedError, SyncdError
from syncd.metering.base import Meter, MeteringApi
from syncd.metering.usage import rfc3339
from syncd.runs.clock import Now, utc_now
from syncd.runs.factory import target_of
from syncd.usage.days import Days, midnight
from syncd.usage.estimates import ADDITIVE, prices_of
from syncd.usage.store import KeptDay, KeptMeter, Refresh, UsageStore, same

_log = structlog.get_logger("syncd.usage")

_MAX_DAYS: Final = 60
"""Days of meters that one refresh fetches, each in a request."""
_MAX_SECONDS: Final = 300.0
"""Seconds after which a refresh begins no further day."""
_SOON_SECONDS: Final = 10.0
"""Wait before the refresh that continues what the one before left."""
_STANDBY_SECONDS: Final = 60.0
"""How often a daemon that may not refresh checks whether it may."""
_COMPLETE_AFTER: Final = timedelta(hours=24)
"""A day's usage is complete this long after its end; what comes later is late."""
_MISSING: Final = "the metering API has no such meter; `syncd meters apply` creates the standard ones"
_NOT_ADDITIVE: Final = (
    "its aggregation is {}; only meters that count or sum can be added up over days and subjects"
)


@dataclass(frozen=True, slots=True)
class _ChangedDay:
    """A day whose total in the metering API differs from the kept one."""

    day: date
    meter: Meter
    dimensions: tuple[str, ...]
    reported: float
    late: bool


@dataclass(frozen=True, slots=True)
class _Survey:
    """What a refresh has to do for a meter; one that is not usable has its problem noted already."""

    key: str
    usable: bool
    problem: str | None = None
    changed: tuple[_ChangedDay, ...] = ()


def wanted_meters(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the meters to keep with their dimensions: those of the settings, and those that prices need."""
    found = dict(config.usage.meters)
    prices = prices_of(config.prices)
    for meter in sorted(prices.meters) if prices else ():
        found[meter] = (*found.get(meter, ()), *sorted(prices.dimensions(meter) if prices else ()))
    return {meter: tuple(dict.fromkeys(dimensions)) for meter, dimensions in found.items()}


class Refresher:
    """Refreshes the kept usage on a schedule of its own; `refresh` may also be called directly."""

    def __init__(
        self,
        store: UsageStore,
        config: Callable[[], Config],
        now: Now = utc_now,
        *,
        stopping: threading.Event | None = None,
        may_refresh: Callable[[], bool] = lambda: True,
        most_days: int = _MAX_DAYS,
    ) -> None:
        self._store = store
        self._config = config
        self._now = now
        self._stopping = stopping or threading.Event()
        self._may_refresh = may_refresh
        self._most_days = most_days

    def work(self, first_wait: float) -> None:
        """Refresh until stopped, for the first time after `first_wait` seconds."""
        wait = first_wait
        while not self._stopping.wait(wait):
            if not self._may_refresh():
                wait = _STANDBY_SECONDS
                continue
            refreshed = self._refresh_safely()
            wait = self._config().usage.interval.total_seconds()
            if refreshed is not None and refreshed.remaining and refreshed.problem is None:
                wait = _SOON_SECONDS

    def _refresh_safely(self) -> Refresh | None:
        try:
            return self.refresh()
        except SyncdError as error:
            _log.warning("usage_not_refreshed", error=str(error))
        except Exception:
            _log.exception("usage_refresh_failed")
        return None

    def refresh(self) -> Refresh:
        """Refresh once and return how it went; raises StateError."""
        config, started, begun = self._config(), self._now(), time.monotonic()
        wanted = wanted_meters(config)
        self._store.forget_others(wanted)
        today = started.date()
        range_ = Days(today - config.usage.keep, today + timedelta(days=1))
        written, remaining, problem = 0, 0, None
        try:
            with closing(target_of(config, self._stopping.wait, self._stopping.is_set)) as api:
                meters = api.meters() if wanted else {}
                surveys = [
                    self._survey(api, key, meters.get(key), dimensions, range_)
                    for key, dimensions in wanted.items()
                ]
                changed = [entry for survey in surveys for entry in survey.changed]
                changed.sort(key=lambda entry: entry.day, reverse=True)
                for entry in changed:
                    spent = time.monotonic() - begun > _MAX_SECONDS
                    if written >= self._most_days or spent or self._stopping.is_set():
                        break
                    self._fetch(api, entry)
                    written += 1
                remaining = len(changed) - written
                left = {entry.meter.key for entry in changed[written:]}
                for survey in surveys:
                    if survey.usable and survey.key not in left:
                        self._store.note_complete(survey.key, range_.since, started, survey.problem)
        except StoppedError:
            pass
        except ApiError as error:
            problem = str(error)
        self._store.forget_before(range_.since)
        refreshed = Refresh(started, self._now(), written, remaining, problem)
        self._store.note_refresh(refreshed)
        _log.info(
            "usage_refreshed" if problem is None else "usage_not_refreshed",
            days=written,
            remaining=remaining,
            seconds=round(time.monotonic() - begun, 1),
            **({"error": problem} if problem else {}),
        )
        return refreshed

    def _survey(
        self,
        api: MeteringApi,
        key: str,
        meter: Meter | None,
        dimensions: tuple[str, ...],
        range_: Days,
    ) -> _Survey:
        """Return which days of a meter must be fetched, by one request for the totals of all."""
        if meter is None:
            # What is kept stays: a list without the meter says nothing about its usage.
            self._store.note_missing(key, _MISSING)
            return _Survey(key, usable=False)
        known = tuple(name for name in dimensions if name in meter.dimensions)
        self._store.keep_meter(key, known)
        if meter.aggregation not in ADDITIVE:
            self._store.note_problem(key, _NOT_ADDITIVE.format(meter.aggregation))
            return _Survey(key, usable=False)
        try:
            totals = api.daily_totals(meter, rfc3339(range_.start), rfc3339(range_.end))
        except RefusedError as error:
            self._store.note_problem(key, str(error))
            return _Survey(key, usable=False)
        kept, days = self._store.meter(key), self._store.days(key)
        changed = tuple(
            _ChangedDay(day, meter, known, reported, _is_late(kept, day))
            for day in range_
            if _differs(days.get(day), reported := totals.get(day, 0.0))
        )
        lacking = ", ".join(name for name in dimensions if name not in known)
        problem = f"the meter has no dimension {lacking}" if lacking else None
        return _Survey(key, usable=True, problem=problem, changed=changed)

    def _fetch(self, api: MeteringApi, changed: _ChangedDay) -> None:
        day = Days(changed.day, changed.day + timedelta(days=1))
        rows = api.grouped_usage(changed.meter, changed.dimensions, rfc3339(day.start), rfc3339(day.end))
        self._store.replace_day(
            changed.meter.key, changed.day, rows, changed.reported, self._now(), late=changed.late
        )


def _differs(kept: KeptDay | None, reported: float) -> bool:
    """Return whether a day must be fetched: neither what was reported then nor what its rows add up to.

    Rows and totals are two requests, between which events may arrive.
    """
    if kept is None:
        return reported != 0
    return not any(same(reported, known) for known in (kept.reported, kept.total))


def _is_late(kept: KeptMeter, day: date) -> bool:
    """Return whether a change of this day is late: it was complete already at the last whole refresh."""
    if kept.refreshed_at is None or kept.since is None or day < kept.since:
        return False
    return kept.refreshed_at >= midnight(day + timedelta(days=1)) + _COMPLETE_AFTER
