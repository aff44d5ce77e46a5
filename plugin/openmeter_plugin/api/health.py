"""Health of the delivery process, for readiness and metrics: the lock, the processes, queues, the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from openmeter_plugin.books.read_models import SpoolError, check_books
from openmeter_plugin.process.supervisor import Heartbeats
from openmeter_plugin.segments.stats import ReaderStats
from openmeter_plugin.spool.queue import writable_bytes

if TYPE_CHECKING:
    from openmeter_plugin.delivery.process import SpoolDelivery
    from openmeter_plugin.delivery.queue_delivery import QueueDelivery

_MIN_WRITABLE: Final = 64 * 1024  # bytes that the workers can still write


@dataclass(slots=True)
class HealthMonitor:
    """State of the delivery process. `children`: heartbeat slots by name, empty without a supervisor."""

    spool: Path
    children: Mapping[str, int] = field(default_factory=dict)
    heartbeats: Heartbeats | None = None
    hang_seconds: float = 10.0
    reader: ReaderStats | None = None
    """The numbers of the reader of Kong segments, if there is one."""
    gate: Path | None = None
    """The gate's socket, if there is a gate."""
    delivery: SpoolDelivery | None = None
    """Set once this process holds the spool's lock."""

    def started(self, delivery: SpoolDelivery) -> None:
        """Record that this process holds the lock and delivers."""
        self.delivery = delivery

    def queues(self) -> dict[str, QueueDelivery]:
        """Return the queues that this process delivers."""
        return dict(self.delivery.queues) if self.delivery is not None else {}

    def restarts(self) -> dict[str, int]:
        """Return how often each child was restarted."""
        if self.heartbeats is None:
            return {}
        return {child: self.heartbeats.restarts(slot) for child, slot in self.children.items()}

    def problems(self) -> list[str]:
        """Return what keeps this process from working, as sentences. Reads the disk, so it blocks."""
        found = []
        if self.delivery is None or self.delivery.stopped:
            found.append(
                "nothing is delivered yet: this process is starting, or waits for the lock of another"
                " process that delivers this spool"
            )
        if self.heartbeats is not None:
            for child, slot in self.children.items():
                silence = self.heartbeats.silence(slot)
                if silence > self.hang_seconds:
                    found.append(f"no heartbeat from {child} for {silence:.0f} s")
        if self.reader is not None and not self.reader.read().readable:
            found.append(
                "the folder of the Kong segments cannot be read: see the log of the process segments"
            )
        for name, queue in self.queues().items():
            if (hold := queue.endpoint.held) is not None:
                found.append(f"destination {name} is held: {hold.text}")
        return found + _disk_problems(self.spool)


def _disk_problems(spool: Path) -> list[str]:
    try:
        check_books(spool)
    except SpoolError as error:
        return [str(error)]
    if not os.access(spool, os.W_OK):
        return ["this user cannot write to the spool"]
    try:
        if os.statvfs(spool).f_flag & os.ST_RDONLY:
            return ["the spool's file system is read-only"]
        if writable_bytes(spool) < _MIN_WRITABLE:
            return ["the spool's file system is full"]
    except OSError as error:
        return [f"the spool's file system: {error.strerror}"]
    return []
