"""Signs of life: how the supervisor notices a process that neither works nor ends.

A page of memory shared with the children, one slot for each: the child's event loop writes the time into
its own, the supervisor reads. CLOCK_MONOTONIC, which is the same in all processes and never jumps. Beside
it the supervisor counts how often it started the child again, for whoever shows that.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
import time
from typing import Final

_SLOT: Final = struct.Struct("<dQ")
_TIME: Final = struct.Struct("<d")
_COUNT: Final = struct.Struct("<Q")
INTERVAL: Final = 0.5  # seconds between two signs


class Heartbeats:
    """The slots of all children; made before they are forked."""

    def __init__(self, slots: int) -> None:
        self._memory = mmap.mmap(-1, slots * _SLOT.size)

    def beat(self, slot: int) -> None:
        """Give a sign of life."""
        _TIME.pack_into(self._memory, slot * _SLOT.size, time.monotonic())

    def silence(self, slot: int) -> float:
        """Return the seconds since the last sign."""
        last, _ = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        return time.monotonic() - float(last)

    def restarted(self, slot: int) -> None:
        """Count that the child was started again; the supervisor does."""
        _COUNT.pack_into(self._memory, slot * _SLOT.size + _TIME.size, self.restarts(slot) + 1)

    def restarts(self, slot: int) -> int:
        """Return how often the child was started again."""
        _, restarts = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        return int(restarts)

    async def keep_beating(self, slot: int) -> None:
        """Beat for as long as the event loop turns."""
        while True:
            self.beat(slot)
            await asyncio.sleep(INTERVAL)
