"""Whether the disk is quick enough to be written to by the thread that serves Kong."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

SLOW: Final = 0.005  # seconds of one write(2); into the page cache one takes some microseconds
_FIRST_PAUSE: Final = 10.0
_LONGEST_PAUSE: Final = 300.0


class Pace:
    """Remembers slow writes, whoever made them, and for how long they tell against the disk.

    After a slow write the disk is not trusted for a pause, which doubles for as long as the disk is slow
    again soon after.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = _FIRST_PAUSE
        self._trusted_from = float("-inf")

    @property
    def trusted(self) -> bool:
        """Whether the next write may be expected to be quick."""
        return self._clock() >= self._trusted_from

    def took(self, seconds: float) -> None:
        """Note how long a write took."""
        if seconds < SLOW:
            return
        now = self._clock()
        if now < self._trusted_from:
            pass  # known already: the pause begins anew
        elif now - self._trusted_from < self._pause:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self._pause = _FIRST_PAUSE
        self._trusted_from = now + self._pause
