"""The folder that Kong's nginx workers write and this side reads: nothing outside it is read or removed.

Another user writes there. So each file is opened relative to the open folder, without following a link and
without waiting (for a FIFO's other end), and only a regular file with a single name is read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.queue import is_unlocked

INSTANCES: Final = "instances"
_MODE: Final = 0o2770
"""Kong's workers write there by the group; the bit keeps new files in the folder's group."""
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Content(NamedTuple):
    """A small file's content and the time of its last change, in nanoseconds."""

    content: bytes
    changed: int


class Directory:
    """An open directory and the files in it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)

    def is_at(self, name: str | Path, dir_fd: int | None = None) -> bool:
        """Return whether the directory still has this name."""
        with contextlib.suppress(OSError):
            named = os.stat(name, dir_fd=dir_fd, follow_symlinks=dir_fd is None)
            return os.path.samestat(os.fstat(self.descriptor), named)
        return False

    def changed(self) -> int:
        """Return when an entry came or went last, in nanoseconds."""
        return os.fstat(self.descriptor).st_mtime_ns

    def names(self) -> Iterator[str]:
        """Yield the names of the entries, however many; raises OSError."""
        with os.scandir(self.descriptor) as entries:
            for entry in entries:
                yield entry.name

    def status(self, name: str) -> os.stat_result | None:
        """Return the status of an entry, of a link itself; None if it is gone."""
        with contextlib.suppress(OSError):
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        return None

    def open(self, name: str) -> int | None:
        """Open a file to read it; None if it is gone or not plain: regular, with one name. Raises OSError."""
        status = self.status(name)
        if status is None or not _is_plain(status):
            return None  # opening a device could have effects
        try:
            descriptor = os.open(name, _FILE, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                return None
            raise
        if not _is_plain(os.fstat(descriptor)):
            os.close(descriptor)
            return None
        return descriptor

    def read(self, name: str, limit: int) -> Content | None:
        """Return up to `limit` bytes of a file; None as `open` does. Raises OSError."""
        descriptor = self.open(name)
        if descriptor is None:
            return None
        try:
            return Content(os.pread(descriptor, limit, 0), os.fstat(descriptor).st_mtime_ns)
        finally:
            os.close(descriptor)

    def is_unlocked(self, name: str) -> bool:
        """Return whether a file is there that no process writes any more."""
        with contextlib.suppress(OSError):
            descriptor = self.open(name)
            if descriptor is not None:
                try:
                    return is_unlocked(descriptor)
                finally:
                    os.close(descriptor)
        return False

    def remove(self, name: str, descriptor: int | None = None) -> None:
        """Remove a file, if it still is the open one; raises OSError."""
        if descriptor is not None:
            status = self.status(name)
            if status is None or not os.path.samestat(status, os.fstat(descriptor)):
                return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)


class Folder:
    """The folder at a path, with the segments in it and the instance files in the one below."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generation = 0
        """Counts the folders that were opened."""
        self._files: Directory | None = None
        self._instances: Directory | None = None
        self._limit = RateLimit()

    @property
    def files(self) -> Directory:
        """The folder itself, once it is `ready`."""
        if self._files is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
        return self._files

    @property
    def instances(self) -> Directory:
        """The folder of the instance files, once this one is `ready`."""
        if self._instances is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path / INSTANCES))
        return self._instances

    def ready(self) -> bool:
        """Open the folder, or the one that has replaced it under its path; creates a missing one.

        Returns whether this process may read it, which it may not while another one does. Never raises.
        """
        if self._is_in_place():
            return True
        self.close()
        try:
            self._open()
        except BlockingIOError:
            self._report("kong_segments_read_elsewhere", "another process reads this folder")
        except OSError as error:
            self._report("kong_segments_unreadable", error.strerror or str(error))
        else:
            get_logger().info("kong_segments_opened", folder=str(self.path))
            self.generation += 1
            return True
        self.close()
        return False

    def close(self) -> None:
        """Close the folder, which unlocks it."""
        for directory in (self._files, self._instances):
            if directory is not None:
                directory.close()
        self._files = self._instances = None

    def _is_in_place(self) -> bool:
        files, instances = self._files, self._instances
        if files is None or instances is None or not files.is_at(self.path):
            return False
        return instances.is_at(INSTANCES, files.descriptor)

    def _open(self) -> None:
        _make(self.path)
        self._files = Directory(os.open(self.path, _DIRECTORY))
        fcntl.flock(self._files.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _make(self.path / INSTANCES)
        at = self._files.descriptor
        self._instances = Directory(os.open(INSTANCES, _DIRECTORY | os.O_NOFOLLOW, dir_fd=at))

    def _report(self, event: str, reason: str) -> None:
        if self._limit.passes():
            get_logger().error(
                event,
                folder=str(self.path),
                reason=reason,
                consequence="what Kong has written there waits; without the folder it writes nothing",
            )


def _is_plain(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _make(path: Path) -> None:
    """Create a directory that Kong's group may write, whatever the umask; raises OSError."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=_MODE)
        path.chmod(_MODE)
