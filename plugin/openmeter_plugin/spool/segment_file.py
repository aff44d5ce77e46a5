"""Segment files on the writer's side: lock, append, sync. `segment` describes their layout."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from openmeter_plugin.spool.destination import make_private, write_atomically
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
