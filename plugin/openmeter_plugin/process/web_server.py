"""uvicorn on somebody else's event loop: no signals of its own, its messages in our log, and limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from openmeter_plugin.log import RateLimit, get_logger


class _ForwardedLog(logging.Handler):
    """Brings uvicorn's messages into our log, which never waits for its reader."""

    def __init__(self, event: str) -> None:
        super().__init__(logging.WARNING)
        self._event = event
        self._limit = RateLimit()

    def emit(self, record: logging.LogRecord) -> None:
        if self._limit.passes():
            # The message only: its arguments may quote what a client sent. Of an exception, its kind.
            kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
            get_logger().warning(self._event, message=str(record.msg).strip()[:200], exception=kind)


def forward_log(event: str) -> None:
    """Have what uvicorn says logged as this event."""
    logger = logging.getLogger("uvicorn")
    logger.handlers, logger.propagate = [_ForwardedLog(event)], False


class GuestServer(uvicorn.Server):
    """A uvicorn server that leaves the signals to the process that it is in."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


def guarded_protocol(read_timeout: float, max_connections: int) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 with the limits that it lacks: on slow heads and on idle connections."""

    class Protocol(H11Protocol):
        opened = 0.0
        head_timer: asyncio.TimerHandle | None = None

        @property
        def in_request(self) -> bool:
            cycle: RequestResponseCycle | None = self.cycle  # None before the first request
            return cycle is not None and not cycle.response_complete

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.opened = self.loop.time()
            self._expect_head()
            if len(self.connections) > max_connections:
                # Whoever only holds connections open must not keep Kong out: the oldest idle one goes.
                ours = [c for c in self.connections if isinstance(c, Protocol) and not c.in_request]
                min(ours, key=lambda c: c.opened).transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.in_request:
                self._forget_head()
            elif self.head_timer is None:
                self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            self.head_timer = self.loop.call_later(read_timeout, self.transport.abort)

        def _forget_head(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return Protocol
