"""A wall clock that does not jump: setting the time makes the process remove or give up nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from openmeter_plugin.log import get_logger

_JUMP: Final = 60.0  # seconds between the two clocks that count as a jump
_IDLE: Final = 3600.0  # seconds without a sign of the time after which the time at the start is doubted
_DOUBT: Final = 60.0  # seconds that it then has to stay the same


class SteadyClock:
    """The earlier of the wall time and the wall time at the start plus what has elapsed since.

    A clock that is set ahead while the process runs is ignored, and one that was ahead at the start counts
    until it is set right. `last_known` is a moment known to be in the past, such as that of the last write:
    if the clock is far ahead of it at the start, `settled` is False for the first minute.
    """

    def __init__(
        self,
        last_known: float | None = None,
        *,
        wall: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._wall, self._elapsed = wall, elapsed
        started = elapsed()
        self._offset = wall() - started
        doubtful = last_known is not None and wall() - last_known > _IDLE
        self._settled_from = started + (_DOUBT if doubtful else 0.0)
        self._jumped = False

    @property
    def settled(self) -> bool:
        """Whether `now` may be used to give up or remove what is old."""
        return self._elapsed() >= self._settled_from

    def now(self) -> float:
        """Return the time in seconds since the epoch; logs a jump once."""
        wall, steady = self._wall(), self._offset + self._elapsed()
        jumped = abs(wall - steady) > _JUMP
        if jumped and not self._jumped:
            get_logger().warning(
                "clock_jumped",
                seconds=round(wall - steady),
                consequence="ages are measured by the earlier time until the clocks agree or a restart",
            )
        self._jumped = jumped
        return min(wall, steady)

    def utc(self) -> datetime:
        """Return `now` as a date in UTC."""
        return datetime.fromtimestamp(self.now(), UTC)
