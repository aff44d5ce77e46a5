"""The writer's side of one queue: its segment files, and the records that wait in memory for the disk.

A segment file is locked, appended to and synced here; `segment` describes what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from openmeter_plugin.spool.destination import (
    Destination,
    is_described,
    make_private,
    queues_directory,
    write_atomically,
)
from openmeter_plugin.spool.segment import MAGIC, SUFFIX

_LEFT_FREE: Final = 4 * 1024 * 1024  # bytes, or an eighth of a smaller file system


class _Numbers:
    """The numbers of this process's segments."""

    def __init__(self) -> None:
        self.following = 1

    def take(self) -> int:
        """Return the next number."""
        number = self.following
        self.following += 1
        return number


_numbers: Final = _Numbers()


def following_number() -> int:
    """Return the number that the next segment of this process will have, at least."""
    return _numbers.following


class Segment:
    """A segment file that this process appends to, locked for as long as it is open.

    `writer` is the middle part of its name: the pid, unless the process has to be recognised.
    """

    def __init__(self, directory: Path, writer: str = "") -> None:
        self.number = _numbers.take()
        path = self.path = _new_path(directory, writer, self.number)
        unready = path.with_suffix(".tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self.descriptor = os.open(unready, flags, 0o600)
        try:
            # Gets its final name once it is locked: a reader takes an unlocked segment for finished and
            # would remove it while we write.
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            _write_all(self.descriptor, MAGIC)
            unready.rename(path)
        except OSError:
            self.close()
            unready.unlink(missing_ok=True)
            raise
        self._directory = directory
        self._directories_synced = False
        self.size = len(MAGIC)
        self.opened = time.monotonic()
        self.unsynced = True
        self.size_in_place = self.size
        """The size when the file was last seen under its name."""

    def append(self, data: bytes) -> int:
        """Write the bytes and return how many were written: all, unless the disk refused the rest."""
        view = memoryview(data)
        written = 0
        with contextlib.suppress(OSError):
            while written < len(data):
                written += os.write(self.descriptor, view[written:])
        self.size += written
        self.unsynced = True
        return written

    def sync(self) -> None:
        """Sync the content to disk; raises OSError."""
        self.unsynced = False
        os.fdatasync(self.descriptor)
        if not self._directories_synced:
            # A file that no directory on disk lists is lost with all its content.
            for directory in (self._directory, *list(self._directory.parents)[:2]):
                sync_directory(directory)
            self._directories_synced = True

    def in_place(self) -> bool:
        """Return whether the file is still under its name, neither removed nor moved; raises OSError."""
        size = self.size  # before the check: so much was written to a file in its place
        try:
            found = os.path.samestat(os.fstat(self.descriptor), self.path.stat())
        except FileNotFoundError:
            return False
        if found:
            self.size_in_place = size
        return found

    def save_removed(self) -> int:
        """Copy what was written after the file was removed into a segment of its own; raises OSError.

        Returns how many bytes. Nothing is copied of a file that still has a name. What the copy shares with
        a reader that had the file open has ids that the books know: it counts as resent.
        """
        start = self.size_in_place
        if self.size <= start or os.fstat(self.descriptor).st_nlink:
            return 0
        # The only way to a file without a name: our own descriptor cannot read.
        reading = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.pread(reading, self.size - start, start)
        finally:
            os.close(reading)
        make_private(self._directory)
        write_atomically(_new_path(self._directory, "", _numbers.take()), MAGIC + content)
        sync_directory(self._directory)
        self.size_in_place = self.size
        return len(content)

    def close(self) -> None:
        """Close the file, which also unlocks it: it never grows after that."""
        os.close(self.descriptor)


def _new_path(directory: Path, writer: str, number: int) -> Path:
    return directory / f"{time.time_ns():020d}-{writer or os.getpid()}-{number}{SUFFIX}"


def is_unlocked(descriptor: int) -> bool:
    """Return whether no process has the exclusive lock that a writer holds on its file; raises OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def writer_and_number(name: str) -> tuple[str, int]:
    """Return the middle part of a segment's name and its number; an empty writer if it has neither."""
    parts = name.removesuffix(SUFFIX).split("-")
    return (parts[1], int(parts[2])) if len(parts) == 3 and parts[2].isdecimal() else ("", 0)


def writable_bytes(directory: Path) -> int:
    """Return how many bytes may be written there; raises OSError.

    Some space is left for the books: if they could not be written, no segment would ever be removed, and
    a spool that has filled its file system would stay full for ever.
    """
    system = os.statvfs(directory)
    return system.f_bavail * system.f_frsize - min(_LEFT_FREE, system.f_blocks * system.f_frsize // 8)


def whole_records(records: list[bytes], written: int) -> int:
    """Return how many records lie entirely within the first `written` bytes."""
    for index, record in enumerate(records):
        written -= len(record)
        if written < 0:
            return index
    return len(records)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write a few bytes at once; raises OSError, also if the disk takes only some of them."""
    if os.write(descriptor, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def sync_directory(path: Path) -> None:
    """Sync a directory's entries to disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
