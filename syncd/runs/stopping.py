"""How a request to stop reaches the requests of a run."""

from __future__ import annotations

import time
from collections.abc import Callable

_GRACE = 3.0
"""Seconds for the changes under way: each then ends whole, and syncd still ends within five."""


class Stop:
    """Whether requests end: at once while states are read, after a moment while changes are made."""

    def __init__(self, requested: Callable[[], bool], timer: Callable[[], float] = time.monotonic) -> None:
        self.applying = False
        self._requested = requested
        self._timer = timer
        self._at: float | None = None

    def __call__(self) -> bool:
        """Return whether requests and waits are to end now."""
        if not self._requested():
            return False
        if not self.applying:
            return True
        if self._at is None:
            self._at = self._timer() + _GRACE
        return self._timer() >= self._at
