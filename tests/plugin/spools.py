"""Helpers for spool and delivery tests: read a spool's files, run a writer, and simulate a failing disk."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.spool.destination import Destination, queues_directory
from openmeter_plugin.spool.reader import Position, QueueReader, read_chunk
from openmeter_plugin.spool.segment import MAGIC, SUFFIX, Damage, Record
from openmeter_plugin.spool.writer import SpoolWriter

QUEUE = "aaaabbbbccccdddd"


def destination(endpoint: str = "http://127.0.0.1:9/events", **changes: Any) -> Destination:
    """Return a destination with short timeouts and delays."""
    quick = {
        "timeout": 2.0,
        "max_coalescing_delay": 0.0,
        "initial_retry_delay": 0.01,
        "max_retry_delay": 0.05,
    }
    return Destination(**{"id": QUEUE, "endpoint": endpoint, **quick, **changes})


def segments(spool: Path, queue: str = QUEUE) -> list[Path]:
    """Return the queue's segment files, oldest first."""
    return sorted((queues_directory(spool) / queue).glob(f"*{SUFFIX}"))


def scan(data: bytes, base: int, *, final: bool) -> list[Record | Damage]:
    """Return the records and damage in `data`, which starts at offset `base` of a segment."""
    return list(read_chunk(data, base, final=final).items())


@contextmanager
def reading(
    spool: Path, queue: str = QUEUE, positions: Mapping[str, Position] | None = None
) -> Iterator[QueueReader]:
    """Read a queue's segments."""
    with closing(QueueReader(queues_directory(spool) / queue, positions or {})) as reader:
        yield reader


def items(spool: Path, queue: str = QUEUE) -> list[Record | Damage]:
    """Return everything in the queue's files, as a reader finds it once the writer is gone."""
    found: list[Record | Damage] = []
    for path in segments(spool, queue):
        content = path.read_bytes()
        assert content.startswith(MAGIC)
        found += scan(content[len(MAGIC) :], len(MAGIC), final=True)
    return found


def payloads(spool: Path, queue: str = QUEUE) -> list[bytes]:
    """Return the payloads of the valid records."""
    return [item.kind + item.body for item in items(spool, queue) if isinstance(item, Record)]


def is_locked(path: Path) -> bool:
    """Return whether a process holds the file's lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def file_of(descriptor: int) -> Path:
    """Return the file behind a descriptor of this process."""
    return Path(f"/proc/self/fd/{descriptor}").readlink()


@contextmanager
def small_file_system(at: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size; skips the test if mounting is not permitted."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


class Acknowledged:
    """The tokens that a writer returned, in their groups."""

    def __init__(self) -> None:
        self.groups: list[list[Any]] = []

    def __call__(self, tokens: list[Any]) -> None:
        self.groups.append(tokens)

    @property
    def tokens(self) -> list[Any]:
        """All of them, in order."""
        return [token for group in list(self.groups) for token in group]


@contextmanager
def running_writer(
    spool: Path, notify: Callable[[list[Any]], None] | None = None, **options: Any
) -> Iterator[SpoolWriter]:
    """Run a writer and close it at the end; by default it never syncs and retries a failed disk at once."""
    options = {"fsync": "never", "retry_seconds": 0.01, **options}
    writer = SpoolWriter(spool, notify or Acknowledged(), **options)
    writer.start()
    try:
        yield writer
    finally:
        writer.close(10)


class Disk:
    """Replaces os.write for a spool's files: accepts a limited number of bytes, or blocks for a while."""

    def __init__(self, spool: Path) -> None:
        self._prefix = f"{spool}/"
        self._write = os.write
        self.room: int | None = None
        self.refused = 0
        self.writes: list[int] = []
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.at_gate = threading.Event()

    def write(self, descriptor: int, data: Any) -> int:
        """Write as many bytes as there is room for, as a full disk does."""
        if not str(file_of(descriptor)).startswith(self._prefix):
            return self._write(descriptor, data)
        if not self.open_gate.is_set():
            self.at_gate.set()
            self.open_gate.wait(30)
        if self.room is not None:
            if self.room <= 0:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = memoryview(data)[: self.room]
            self.room -= len(data)
        self.writes.append(len(data))
        return self._write(descriptor, data)
