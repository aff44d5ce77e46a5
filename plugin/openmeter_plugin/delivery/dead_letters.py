"""Limits of dead letters: no queue empties itself into them, and they never fill the disk.

An event becomes a dead letter because the metering API refuses it and takes others. When it refuses nearly
everything, something else is wrong (the API's schema, a setting, a proxy): then the queue is held with its
events, as while the API is down. arroyo's DlqPolicy has the same limits: a ratio and a number in a row.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final, Literal

from openmeter_plugin.spool.destination import queues_directory
from openmeter_plugin.spool.queue import writable_bytes

ENOUGH: Final = 100
"""Refused events before the ratio counts."""
_RATIO: Final = 9  # held when there are more than this many refused events for each accepted one
_WINDOW: Final = 1000  # events; older ones count less and less
_ROOM: Final = 12 * 1024 * 1024
"""Bytes that dead letters leave to usage and books, or an eighth of a smaller file system."""
PERMISSION: Final = "accept-refusals"
"""The file in a queue's directory by which an operator has its refused events become dead letters."""


def permit(spool: Path, queue: str) -> None:
    """Have a queue's refused events become dead letters until most are accepted again; raises OSError."""
    (queues_directory(spool) / queue / PERMISSION).touch(mode=0o600)


class DeadLetterLimit:
    """Decides whether a queue's refused event becomes a dead letter."""

    def __init__(self, spool: Path, queue: str) -> None:
        self._directory = queues_directory(spool) / queue
        self._permission = self._directory / PERMISSION
        self._accepted = 0
        self._refused = 0

    def accepted(self, events: int) -> None:
        """Count accepted events: a held queue starts over, and a permission ends once most are accepted."""
        if self._over():
            self._refused = self._accepted = 0
        self._count(events, 0)
        if self._accepted >= ENOUGH and not self._over():
            with contextlib.suppress(OSError):
                self._permission.unlink()

    def refused(self) -> None:
        """Count a dead letter."""
        self._count(0, 1)

    def hinders(self) -> Literal["refusals", "disk"] | None:
        """Return why another dead letter is out of the question, None if it is not."""
        if self._over() and not self._permission.exists():
            return "refusals"
        with contextlib.suppress(OSError):
            system = os.statvfs(self._directory)
            if writable_bytes(self._directory) < min(_ROOM, system.f_blocks * system.f_frsize // 8):
                return "disk"
        return None

    def _over(self) -> bool:
        return self._refused >= ENOUGH and self._refused > _RATIO * self._accepted

    def _count(self, accepted: int, refused: int) -> None:
        self._accepted += accepted
        self._refused += refused
        if self._accepted + self._refused > _WINDOW:
            self._accepted //= 2
            self._refused //= 2
