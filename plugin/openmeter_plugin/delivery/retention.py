"""What stays of the delivered segments: whole files, until they are old, too many, or the disk is full.

Time is counted from when a segment was found delivered, by a clock that never jumps; only how old it was
then, after a restart, is taken from the file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from openmeter_plugin.delivery.options import Retention

_MIN_FREE: Final = 64 * 1024 * 1024  # bytes, or a quarter of a smaller file system; more than the writer's
_LEFTOVER_AGE: Final = 3600.0  # seconds


class Delivered(NamedTuple):
    """A segment that is delivered to its end; `since` is when it was last written, by time.monotonic."""

    path: Path
    since: float
    size: int


def delivered_now(path: Path) -> Delivered:
    """Return the segment as one that was just found delivered; raises OSError."""
    status = path.stat()
    age = max(0.0, time.time() - status.st_mtime)
    return Delivered(path, time.monotonic() - age, status.st_size)


def expired(delivered: Iterable[Delivered], retention: Retention, shortage: int) -> list[Delivered]:
    """Return which of the delivered segments to remove, oldest first.

    `shortage` is how many bytes are wanted on the disk whatever the retention says.
    """
    oldest_first = sorted(delivered, key=lambda segment: (segment.since, segment.path))
    total = sum(segment.size for segment in oldest_first)
    latest = time.monotonic() - retention.age.total_seconds()
    found = []
    for segment in oldest_first:
        if segment.since > latest and total <= retention.size and shortage <= 0:
            break
        found.append(segment)
        total -= segment.size
        shortage -= segment.size
    return found


def shortage(spool: Path) -> int:
    """Return how many bytes the file system has less than it should have free; raises OSError.

    The writer stops before the disk is full, so that the books can be written; what is only retained has
    to make room before that.
    """
    system = os.statvfs(spool)
    wanted = min(_MIN_FREE, system.f_blocks * system.f_frsize // 4)
    return wanted - system.f_bavail * system.f_frsize


def remove_leftovers(spool: Path) -> list[Path]:
    """Remove what processes that were killed have left half made, and return it; raises OSError."""
    removed = []
    for pattern in ("queues/*/*.tmp", "queues/*/.*.tmp", "tokens/.*.tmp", "damaged/.*.tmp"):
        for path in spool.glob(pattern):
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE:
                path.unlink()
                removed.append(path)
    return removed
