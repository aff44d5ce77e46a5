"""A settable clock, for syncd and its scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from unittest.mock import patch

import apscheduler.schedulers.base
import apscheduler.triggers.interval


class SettableClock:
    """Runs like the real clock, `ahead` of it."""

    def __init__(self, ahead: timedelta = timedelta(0)) -> None:
        self.ahead = ahead

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@contextmanager
def scheduling_by(clock: SettableClock) -> Iterator[None]:
    """Make APScheduler use this clock."""

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + clock.ahead

    with (
        patch.object(apscheduler.schedulers.base, "datetime", Shifted),
        patch.object(apscheduler.triggers.interval, "datetime", Shifted),
    ):
        yield
