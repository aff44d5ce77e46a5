"""The segments process: reads the folder that Kong's workers write, with everything on one thread.

It is a child of the supervisor. If it is killed at any moment, the next one continues where it was; Kong's
workers do not notice, because nothing of theirs waits for it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.segments.folder import Folder
from openmeter_plugin.segments.reader import Reader, StoppedError
from openmeter_plugin.segments.stats import ReaderStats
from openmeter_plugin.spool.journal import Journal, JournalTakenError
from openmeter_plugin.spool.writer import Fsync, SpoolWriter

POLL: Final = 0.1
"""Seconds between two looks at the segments: what most requests wait until they are in the spool."""
_RETRY: Final = 0.5  # seconds after a failure of the disk
_STOP_SECONDS: Final = 4.0  # at most, for reading what is there and for the disk

OpenWriter = Callable[..., SpoolWriter]


def run_segments(
    path: Path,
    spool: Path,
    fsync: Fsync,
    open_writer: OpenWriter,
    beat: Callable[[], None],
    stats: ReaderStats,
) -> None:
    """Read the folder until SIGTERM or SIGINT; then read what is there and return. `beat` is a heartbeat."""
    stop = _StopSignal()

    def beat_or_stop() -> None:
        beat()
        if stop.overdue:
            raise StoppedError

    with contextlib.suppress(StoppedError):
        journal = _open_journal(spool, fsync, beat, stop)
        name = f"{os.getpid()}.{secrets.token_hex(8)}"
        writer = open_writer(_notify, name=name)
        writer.start()
        reader = Reader(Folder(path), spool, journal, writer, name, stats=stats, beat=beat_or_stop)
        get_logger().info("serving")
        _read_until_stopped(reader, beat, stop)
        reader.close()
        writer.close(_STOP_SECONDS)
    get_logger().info("stopped")


class _StopSignal:
    """Whether the process was asked to stop, and whether its time for that is over."""

    def __init__(self) -> None:
        self._received: float | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self._received = self._received or time.monotonic()

    @property
    def received(self) -> bool:
        return self._received is not None

    @property
    def overdue(self) -> bool:
        return self._received is not None and time.monotonic() > self._received + _STOP_SECONDS


def _notify(tokens: list[Any]) -> None:
    for token in tokens:
        if token is not None:
            token.set()


def _open_journal(spool: Path, fsync: Fsync, beat: Callable[[], None], stop: _StopSignal) -> Journal:
    """Open the journal once no other process has it; raises StoppedError."""
    limit = RateLimit()
    while True:
        try:
            journal = Journal(spool, sync=fsync == "always")
            with contextlib.suppress(OSError):
                journal.reserve()
        except JournalTakenError:
            reason = "another process reads Kong segments into this spool"
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            return journal
        if limit.passes():
            get_logger().warning("kong_segments_journal_unavailable", reason=reason)
        beat()
        if stop.received:
            raise StoppedError
        time.sleep(POLL)


def _read_until_stopped(reader: Reader, beat: Callable[[], None], stop: _StopSignal) -> None:
    limit = RateLimit()
    while True:
        last = stop.received  # first, so that all that was there at the stop is read
        beat()
        try:
            more = reader.step()
        except OSError as error:
            if limit.passes():
                get_logger().error("kong_segments_read_failed", reason=str(error))
            if last:
                raise StoppedError from None
            time.sleep(_RETRY)
            continue
        if more and not stop.overdue:
            continue
        if last:
            return
        time.sleep(POLL)
