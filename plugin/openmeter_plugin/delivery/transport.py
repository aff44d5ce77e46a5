"""Connections to the metering API: a backend of httpcore whose streams know what was received and not used.

httpcore's own backend (anyio) keeps received bytes where neither it nor httpcore counts them, so that an
answer too many could be taken for the next request's.
"""

# ruff: noqa: ASYNC109, ARG002 - the signatures are those of httpcore

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Iterable
from ssl import SSLContext
from typing import Any, Final

import httpcore

_HIGH_WATER: Final = 256 * 1024  # received bytes that wait to be read before the server is held back
_HAPPY_EYEBALLS: Final = 0.25  # seconds until the next address of a host is tried as well (RFC 8305)


class Backend(httpcore.AsyncNetworkBackend):
    """Opens the streams, and keeps the last one."""

    def __init__(self) -> None:
        self.stream: Stream | None = None

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect; raises httpcore.ConnectTimeout or ConnectError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, stream = await loop.create_connection(
                    Stream, host, port, happy_eyeballs_delay=_HAPPY_EYEBALLS
                )
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("connecting took too long") from error
        except (OSError, UnicodeError) as error:  # UnicodeError for a name that cannot be one
            raise httpcore.ConnectError(str(error)) from error
        self.stream = stream
        return stream

    async def sleep(self, seconds: float) -> None:
        """Wait; httpcore calls it between retries, of which we use none."""
        await asyncio.sleep(seconds)


class Stream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._ended = False
        self._error: Exception | None = None
        self._writing_paused = False
        self._reading_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self.received_early = False
        """Whether bytes came since the last write began, before all of it was sent."""

    @property
    def has_unread_bytes(self) -> bool:
        """Return whether bytes were received that are not read yet, or the connection has ended."""
        return bool(self._received) or self._ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type
        transport.set_write_buffer_limits(0)  # so that `write` returns once all is sent
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep what was received; too much of it holds the server back."""
        self._received += data
        self.received_early = self.received_early or self._writing_paused
        if len(self._received) > _HIGH_WATER and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """Note the end, and close the connection."""
        self._ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._ended = True
        self._error = self._error or exc
        self._wake()

    def pause_writing(self) -> None:
        """Note that what was written waits to be sent."""
        self._writing_paused = True

    def resume_writing(self) -> None:
        """Note that all is sent."""
        self._writing_paused = False
        self._wake()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return received bytes, none at the end; raises httpcore.ReadTimeout or ReadError."""
        while not self._received and not self._ended:
            await self._wait(timeout, httpcore.ReadTimeout)
        if not self._received and self._error is not None:
            raise httpcore.ReadError(str(self._error))
        data = bytes(self._received[:max_bytes])
        del self._received[:max_bytes]
        if self._reading_paused and not self._ended:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send the bytes, all of them; raises httpcore.WriteTimeout or WriteError."""
        if buffer and not self._ended:
            self.received_early = bool(self._received)
            self._transport.write(buffer)
        while self._writing_paused and not self._ended:
            await self._wait(timeout, httpcore.WriteTimeout)
        if self._ended:
            raise httpcore.WriteError(str(self._error or "the connection was closed"))

    async def aclose(self) -> None:
        """Close the connection."""
        self._transport.close()
        await asyncio.sleep(0)
        self._transport.abort()

    async def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """Continue with TLS; raises httpcore.ConnectTimeout or ConnectError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                transport = await loop.start_tls(
                    self._transport, self, ssl_context, server_hostname=server_hostname
                )
        except TimeoutError as error:
            self._transport.abort()
            raise httpcore.ConnectTimeout("the TLS handshake took too long") from error
        except OSError as error:  # ssl.SSLError among them
            self._transport.abort()
            raise httpcore.ConnectError(str(error) or "the TLS handshake failed") from error
        if transport is None:
            raise httpcore.ConnectError("the connection was closed in the TLS handshake")
        # As above; with 0, asyncio's SSLProtocol (3.11) would never resume.
        transport.set_write_buffer_limits(1, 0)
        self._transport = transport
        return self

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks for: `is_readable` says that an idle connection is of no use any more."""
        if info == "is_readable":
            return self.has_unread_bytes or self._is_socket_readable()
        return self._transport.get_extra_info(info)

    def _is_socket_readable(self) -> bool:
        connected = self._transport.get_extra_info("socket")
        if connected is None or connected.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(connected.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def _wait(self, timeout: float | None, late: type[Exception]) -> None:
        """Wait for anything to happen on the connection; raises `late`."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._waiter
        except TimeoutError:
            raise late("timed out") from None
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None:
            with contextlib.suppress(asyncio.InvalidStateError):
                self._waiter.set_result(None)
