"""Heartbeats: how the supervisor detects a hung child process.

The processes share a page of memory with one slot per child process. The child's event loop writes the time
into its slot, and the supervisor reads it: CLOCK_MONOTONIC, which is the same in all processes and never
jumps. In the same slot the supervisor counts restarts, for the metrics.
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
INTERVAL: Final = 0.5  # seconds between two heartbeats


class Heartbeats:
    """The slots of all child processes; created before they are forked."""

    def __init__(self, slots: int) -> None:
        self._memory = mmap.mmap(-1, slots * _SLOT.size)

    def beat(self, slot: int) -> None:
        """Write a heartbeat."""
        _TIME.pack_into(self._memory, slot * _SLOT.size, time.monotonic())

    def silence(self, slot: int) -> float:
        """Return the seconds since the last heartbeat."""
        last, _ = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        return time.monotonic() - float(last)

    def count_restart(self, slot: int) -> None:
        """Count a restart; called by the supervisor."""
        _COUNT.pack_into(self._memory, slot * _SLOT.size + _TIME.size, self.restarts(slot) + 1)

    def restarts(self, slot: int) -> int:
        """Return how often the child process was restarted."""
        _, restarts = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        return int(restarts)

    async def keep_beating(self, slot: int) -> None:
        """Write heartbeats for as long as the event loop runs."""
        while True:
            self.beat(slot)
            await asyncio.sleep(INTERVAL)
