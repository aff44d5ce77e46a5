"""The records on their way into one queue's files."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from openmeter_plugin.spool.destination import Destination, make_private, queues_directory
from openmeter_plugin.spool.segment_file import Segment, room, whole_records

_ROOM_AHEAD: Final = 512 * 1024
"""Bytes that are written before the file system is asked again what room it has, less where that is little.

Others write too: delivery its memory, and other workers. What they take meanwhile must not come out of what
is left free for that memory, or a full file system would stay full for ever.
"""
_PART_AHEAD: Final = 4


@dataclass(frozen=True, slots=True)
class Rotation:
    """When a segment is followed by another, and who closes it then."""

    most_bytes: int
    most_seconds: float
    retired: SimpleQueue[Segment]


class SpoolQueue:
    """The records for one destination. All but `id` belongs to whoever holds the writer's disk lock."""

    def __init__(self, spool: Path, queue_id: str, rotation: Rotation) -> None:
        self.id = queue_id
        self.directory = queues_directory(spool) / queue_id
        self.description: Destination | None = None
        self.segment: Segment | None = None
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
        self.lost = 0
        self._rotation = rotation
        self._room_ahead = 0

    @property
    def failing(self) -> bool:
        """Whether something waits for a disk that refused it."""
        return bool(self.waiting or self.lost or self.description)

    def append(self, records: list[bytes]) -> int:
        """Write records, oldest first, and return how many are completely in a file; raises OSError."""
        if self.segment is not None and self._segment_is_full(self.segment):
            self.retire()
        if self.segment is None:
            make_private(self.directory)
        available = room(self.directory)
        fitting = records[: whole_records(records, available)]
        if not fitting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.segment is None:
            self.segment = Segment(self.directory)
        self._room_ahead = min(_ROOM_AHEAD, (available - sum(map(len, fitting))) // _PART_AHEAD)
        return self._write(self.segment, fitting)

    def append_quickly(self, records: list[bytes]) -> int:
        """Write records if the open segment has room for all of them, with a single call of the kernel.

        Returns how many are completely in the file: none where anything else would have to be done first.
        Never raises.
        """
        size = sum(map(len, records))
        segment = self.segment
        if segment is None or self.failing or size > self._room_ahead or self._segment_is_full(segment):
            return 0
        self._room_ahead -= size
        return self._write(segment, records)

    def retire(self) -> None:
        """Have the segment put on the disk and unlocked by the thread that waits for that."""
        if self.segment is not None:
            self._rotation.retired.put(self.segment)
            self.segment = None

    def _write(self, segment: Segment, records: list[bytes]) -> int:
        data = b"".join(records)
        written = segment.append(data)
        if written < len(data):
            # What follows half a record in this file would be damage; the rest starts a new one.
            self.retire()
            return whole_records(records, written)
        return len(records)

    def _segment_is_full(self, segment: Segment) -> bool:
        rotation = self._rotation
        return (
            segment.size >= rotation.most_bytes or time.monotonic() - segment.opened >= rotation.most_seconds
        )


Item = tuple[SpoolQueue, bytes | None, Any, Destination | None]
"""What is handed over: a queue, and a record with its token or a new description."""
