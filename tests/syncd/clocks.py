"""A clock of this machine that a test can set, for syncd and for the scheduler that it uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from unittest.mock import patch

import apscheduler.schedulers.base
import apscheduler.triggers.interval


class SettableClock:
    """Goes on as the real one does, `ahead` of it."""

    def __init__(self, ahead: timedelta = timedelta(0)) -> None:
        self.ahead = ahead

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@contextmanager
def scheduling_by(clock: SettableClock) -> Iterator[None]:
    """Have APScheduler read this clock."""

    class Shown(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + clock.ahead

    with (
        patch.object(apscheduler.schedulers.base, "datetime", Shown),
        patch.object(apscheduler.triggers.interval, "datetime", Shown),
    ):
        yield
