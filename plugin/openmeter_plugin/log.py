"""Logging that never blocks the gateway: JSON lines on stderr, which Kong merges into its own log.

The process that reads stderr may stop reading. A line that cannot be written at once is dropped and
counted, and the count is logged once stderr is writable again.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from typing import Any, Final

import structlog

_MAX_LINE: Final = 4000
"""Bytes. A pipe that polls as writable takes PIPE_BUF (4096) without blocking (pipe(7))."""


class StderrSink:
    """Writes lines to a file descriptor and never waits for its reader."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._fd = sys.__stderr__.fileno() if descriptor is None and sys.__stderr__ else descriptor or 2
        self._lock = threading.Lock()
        self.dropped = 0

    def msg(self, line: str) -> None:
        """Write the line, or count it as dropped if writing would block."""
        if not self._lock.acquire(blocking=False):
            self.dropped += 1
            return
        try:
            if self.dropped and self._write(f'{{"event":"log_lines_dropped","lines":{self.dropped}}}'):
                self.dropped = 0
            if not self._write(line):
                self.dropped += 1
        finally:
            self._lock.release()

    log = debug = info = warning = error = critical = exception = fatal = failure = err = warn = msg

    def _write(self, line: str) -> bool:
        data = line.encode("utf-8", "replace")[:_MAX_LINE] + b"\n"
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        try:
            return bool(poll.poll(0)) and os.write(self._fd, data) == len(data)
        except OSError:
            return False


class RateLimit:
    """Lets one message through per interval and counts those that it suppressed in between.

    A broken disk or endpoint would otherwise write one line per request.
    """

    def __init__(self, interval_seconds: float = 10.0) -> None:
        self._interval = interval_seconds
        self._next = 0.0
        self._suppressed = 0

    def passes(self) -> bool:
        """Return whether the message may be written now."""
        now = time.monotonic()
        if now < self._next:
            self._suppressed += 1
            return False
        self._next = now + self._interval
        return True

    def suppressed(self) -> int:
        """Return how many messages were suppressed since the last call."""
        count, self._suppressed = self._suppressed, 0
        return count


def configure_logging(process: str) -> None:
    """Set up structlog for this process; `process` names it in each line (supervisor, worker, delivery)."""
    sink = StderrSink()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(component="openmeter-plugin", process=process, pid=os.getpid())


def get_logger() -> Any:
    """Return the logger of this process. Event names are snake_case; details are keywords."""
    return structlog.get_logger()
