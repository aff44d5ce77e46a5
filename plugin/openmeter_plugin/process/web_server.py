"""Embedded uvicorn server: no signal handlers, messages in our own log, and connection limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from openmeter_plugin.log import RateLimit, get_logger


class _ForwardedLog(logging.Handler):
    """Forwards uvicorn's messages to our log, which never waits for its reader."""

    def __init__(self, event: str) -> None:
        super().__init__(logging.WARNING)
        self._event = event
        self._limit = RateLimit()

    def emit(self, record: logging.LogRecord) -> None:
        if self._limit.passes():
            # Only the message and an exception's type: the arguments may quote what a client sent.
            kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
            get_logger().warning(self._event, message=str(record.msg).strip()[:200], exception=kind)


def forward_log(event: str) -> None:
    """Log uvicorn's messages as this event."""
    logger = logging.getLogger("uvicorn")
    logger.handlers, logger.propagate = [_ForwardedLog(event)], False


_TICK_SECONDS = 1.0
"""Time between two ticks, which set the Date header: 0.08 % of a core. uvicorn ticks each 0.1 s: 0.36 %."""


class EmbeddedServer(uvicorn.Server):
    """A uvicorn server that leaves signals to its process, and waits for `end` instead of polling."""

    _loop: asyncio.AbstractEventLoop | None = None

    def __init__(self, app: Any, **options: Any) -> None:
        """Make a server of an ASGI application; the options are those of `uvicorn.Config`."""
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                # Forwarded headers are not trusted: anyone on this machine could send them.
                proxy_headers=False,
                **options,
            )
        )

    def end(self) -> None:
        """End `serve` soon; any thread may call this, at any time."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._woken.set)

    async def main_loop(self) -> None:
        """Wait for the end; a tick each second."""
        self._woken = asyncio.Event()
        # Before `should_exit` is read, which `end` sets first: an end is never missed.
        self._loop = asyncio.get_running_loop()
        counter = 0
        while not await self.on_tick(counter):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _TICK_SECONDS)
            counter += 10  # as uvicorn counts, in tenths of a second

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


def limited_protocol(read_timeout: float, max_connections: int) -> type[H11Protocol]:
    """Return uvicorn's HTTP/1.1 protocol with the limits it lacks: on slow heads and idle connections."""

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
            self._start_head_timer()
            if len(self.connections) > max_connections:
                # Idle connections of others must not lock Kong out: drop the oldest idle one.
                idle = [c for c in self.connections if isinstance(c, Protocol) and not c.in_request]
                min(idle, key=lambda c: c.opened).transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.in_request:
                self._cancel_head_timer()
            elif self.head_timer is None:
                self._start_head_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_head_timer()
            super().connection_lost(exc)

        def _start_head_timer(self) -> None:
            self.head_timer = self.loop.call_later(read_timeout, self.transport.abort)

        def _cancel_head_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return Protocol
