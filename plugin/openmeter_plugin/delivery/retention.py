"""Retention of delivered segments: whole files, until they are too old or too large or the disk is full.

Ages are measured with a monotonic clock from when a segment is found delivered. Only its age at that moment
comes from the file's timestamp, which matters after a restart.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from openmeter_plugin.delivery.clock import SteadyClock
from openmeter_plugin.delivery.options import Retention

_MIN_FREE: Final = (
    64 * 1024 * 1024
)  # bytes, or a quarter of a smaller file system; more than the writer leaves
_LEFTOVER_AGE: Final = 3600.0  # seconds
_EMPTY_SECONDS: Final = 86_400.0  # after which a queue is retired; workers know its instance for two hours


class Delivered(NamedTuple):
    """A segment that is entirely delivered; `since` is its last write, in time.monotonic seconds.

    `found` is when it was found delivered; unlike `since`, it does not depend on the time of day.
    """

    path: Path
    since: float
    size: int
    found: float


def delivered_now(path: Path, clock: SteadyClock) -> Delivered:
    """Return the entry of a segment that was just found delivered; raises OSError.

    While the time is in doubt, its age counts from now.
    """
    status = path.stat()
    age = max(0.0, clock.now() - status.st_mtime) if clock.settled else 0.0
    now = time.monotonic()
    return Delivered(path, now - age, status.st_size, now)


def expired(delivered: Iterable[Delivered], retention: Retention, shortage: int) -> list[Delivered]:
    """Return the delivered segments to remove, oldest first.

    `shortage` is the number of bytes to free on the disk regardless of the retention.
    """
    oldest_first = sorted(delivered, key=lambda segment: (segment.since, segment.path))
    total = sum(segment.size for segment in oldest_first)
    now = time.monotonic()
    latest = now - retention.age.total_seconds()
    youngest = now - retention.resend_window.total_seconds()
    found = []
    for segment in oldest_first:
        retained = segment.since > latest and total <= retention.size
        if shortage <= 0 and (retained or segment.found > youngest):
            break
        found.append(segment)
        total -= segment.size
        shortage -= segment.size
    return found


def shortage(spool: Path) -> int:
    """Return how many bytes the file system lacks to its minimum of free space; raises OSError.

    The writer stops before the disk is full, so that the books can be written. Retained segments have to
    make room before that.
    """
    system = os.statvfs(spool)
    minimum = min(_MIN_FREE, system.f_blocks * system.f_frsize // 4)
    return minimum - system.f_bavail * system.f_frsize


def is_long_empty(directory: Path, clock: SteadyClock) -> bool:
    """Return whether a queue's folder has been without files but its description for long; raises OSError."""
    names = os.listdir(directory)  # noqa: PTH208 - no paths
    if len(names) > 1 or not clock.settled:
        return False
    changed = max(path.stat().st_mtime for path in (directory, *(directory / name for name in names)))
    return clock.now() - changed > _EMPTY_SECONDS


def remove_leftovers(spool: Path) -> list[Path]:
    """Remove temporary files of killed processes and return their paths; raises OSError."""
    removed = []
    for pattern in ("queues/*/*.tmp", "queues/*/.*.tmp", "tokens/.*.tmp", "damaged/.*.tmp"):
        for path in spool.glob(pattern):
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE:
                path.unlink()
                removed.append(path)
    return removed
