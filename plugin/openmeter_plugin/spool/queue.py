"""The writer's side of one queue: its open segment, and the records that wait in memory for the disk."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from openmeter_plugin.spool.destination import Destination, is_described, make_private, queues_directory
from openmeter_plugin.spool.segment_file import (
    Segment,
    following_number,
    whole_records,
    writable_bytes,
)

_MAX_UNCHECKED_BYTES: Final = 512 * 1024
"""Bytes written before the file system's free space is checked again; fewer when little is free.

Delivery (its books) and other workers write too. What they use between two checks cannot come out of the
space that is left free for the books, or a full file system would stay full for ever.
"""
_UNCHECKED_DIVISOR: Final = 4  # at most this part of the free space is written without a check


@dataclass(frozen=True, slots=True)
class Rotation:
    """When a new segment replaces the open one, and the queue of retired segments to be closed.

    `writer` is the middle part of the segments' names, the pid if it is empty.
    """

    max_bytes: int
    max_seconds: float
    retired: SimpleQueue[Segment]
    sync_first: bool
    """Whether a segment is synced before it is retired after a partial write: no one waits for the syncer."""
    writer: str = ""

    def is_due(self, segment: Segment) -> bool:
        """Return whether a new segment has to replace this one."""
        return segment.size >= self.max_bytes or time.monotonic() - segment.opened >= self.max_seconds


class SpoolQueue:
    """The records for one destination. Hold the writer's write lock to use anything but `id`."""

    def __init__(self, spool: Path, queue_id: str, rotation: Rotation) -> None:
        self.id = queue_id
        self.directory = queues_directory(spool) / queue_id
        self.description: Destination | None = None
        """The description that is not written yet."""
        self.described: Destination | None = None
        """The description that was written last."""
        self.segment: Segment | None = None
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
        self.lost = 0
        self._rotation = rotation
        self._unchecked_bytes = 0

    @property
    def failing(self) -> bool:
        """Whether something still waits to be written because the disk refused it."""
        return bool(self.waiting or self.lost or self.description)

    @property
    def mark(self) -> tuple[int, int]:
        """The number of the segment in which the next record may be, and its size so far (`journal`)."""
        segment = self.segment
        return (following_number(), 0) if segment is None else (segment.number, segment.size)

    def append(self, records: list[bytes]) -> int:
        """Write records, oldest first, and return how many are entirely in a file; raises OSError."""
        self.rotate()
        if self.segment is None:
            make_private(self.directory)
        available = writable_bytes(self.directory)
        fitting = records[: whole_records(records, available)]
        if not fitting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.segment is None:
            self.segment = Segment(self.directory, self._rotation.writer)
        left = available - sum(map(len, fitting))
        self._unchecked_bytes = min(_MAX_UNCHECKED_BYTES, left // _UNCHECKED_DIVISOR)
        return self._write(self.segment, fitting)

    def append_quickly(self, records: list[bytes]) -> int:
        """Write records with a single system call if the open segment has room for all of them.

        Returns how many are entirely in the file: none if anything else would have to happen first. Never
        raises.
        """
        size = sum(map(len, records))
        segment = self.segment
        if segment is None or self.failing or size > self._unchecked_bytes or self._rotation.is_due(segment):
            return 0
        self._unchecked_bytes -= size
        return self._write(segment, records)

    def rotate(self) -> None:
        """Retire the open segment if it is due."""
        if self.segment is not None and self._rotation.is_due(self.segment):
            self.retire()

    @property
    def description_to_write(self) -> Destination | None:
        """A new description, or the last one: delivery removes the folder of a queue that is long empty."""
        if self.description is None and self.segment is None and not is_described(self.directory):
            return self.described
        return self.description

    def retire(self) -> None:
        """Hand the open segment to the syncer thread, which syncs, closes and thereby unlocks it."""
        if self.segment is not None:
            self._rotation.retired.put(self.segment)
            self.segment = None

    def _write(self, segment: Segment, records: list[bytes]) -> int:
        data = b"".join(records)
        written = segment.append(data)
        if written < len(data):
            # Records after half a record would be read as damage; the rest starts a new segment.
            if self._rotation.sync_first:
                segment.sync()
            self.retire()
            return whole_records(records, written)
        return len(records)


Item = tuple[SpoolQueue, bytes | None, Any, Destination | None]
"""What the serving thread hands over: a queue, and a record with its token or a new description."""
