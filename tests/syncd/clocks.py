"""A settable clock, for syncd and its schedule."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class SettableClock:
    """Runs like the real clock, `ahead` of it."""

    def __init__(self, ahead: timedelta = timedelta(0)) -> None:
        self.ahead = ahead

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead
