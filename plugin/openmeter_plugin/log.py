"""Logging that never blocks the gateway: JSON lines on stderr, which Kong merges into its own log.

The process that reads stderr may stop reading. A line that cannot be written at once is dropped and
counted, and the count is logged once stderr is writable again.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import structlog

_MAX_LINE: Final = 4000
"""Bytes of a line. A pipe that polls as writable takes PIPE_BUF (4096) without blocking (pipe(7))."""


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
        data = line.encode("utf-8", "replace") + b"\n"
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        try:
            return bool(poll.poll(0)) and os.write(self._fd, data) == len(data)
        except OSError:
            return False


def render(_logger: object, _method: str, event: structlog.typing.EventDict) -> str:
    """Return a log event as JSON of at most `_MAX_LINE` bytes; long fields are cut, and say so."""
    return next(line for line in _renderings(event) if len(line) <= _MAX_LINE)


def _renderings(event: structlog.typing.EventDict) -> Iterator[str]:
    """Yield the event in full, then with ever shorter fields, and finally without its details."""
    yield _as_json(event)
    for limit in (2000, 1000, 500, 200, 100):
        yield _as_json({name: _shortened(value, limit) for name, value in event.items()})
    named = {name: _shortened(event.get(name), 100) for name in ("event", "level", "timestamp", "process")}
    yield _as_json(named | {"fields_left_out": len(event.keys() - named.keys())})


def _as_json(value: object) -> str:
    return json.dumps(value, default=repr)  # in ASCII, so a character is a byte


def _shortened(value: object, limit: int) -> object:
    """Return the value with the middle of a long text left out: an exception's last line matters most."""
    text = value if isinstance(value, str) else _as_json(value)
    if len(_as_json(text)) <= limit:
        return value
    kept = limit // 2
    while True:
        cut = f"{text[:kept]} [... {len(text) - 2 * kept} characters cut ...] {text[-kept:]}"
        if len(_as_json(cut)) <= limit or kept <= 8:
            return cut
        kept //= 2


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
            render,
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
