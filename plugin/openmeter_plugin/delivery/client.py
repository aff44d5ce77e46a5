"""Client that POSTs batches of CloudEvents to one destination.

Both dialects of the metering API accept the same body (OpenMeter v1 answers 204, v3 and Konnect 202, and
self-hosted versions have answered 200), so any 2xx counts as delivered. `answers` says what the others mean.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpcore

from openmeter_plugin import __version__
from openmeter_plugin.delivery.answers import Answer, UndeliveredError, failure_of
from openmeter_plugin.delivery.options import Network
from openmeter_plugin.delivery.transport import Backend
from openmeter_plugin.foreign import foreign_text
from openmeter_plugin.network.reuse import has_trailing_bytes
from openmeter_plugin.spool.destination import Destination, is_header_value

CONTENT_TYPE: Final = "application/cloudevents-batch+json"
"""OpenMeter compares it exactly: with a charset parameter it refuses the batch."""

_MAX_ANSWER_BYTES: Final = 256 * 1024  # bytes read of an answer
_TOTAL_TIMEOUT_FACTOR: Final = 3
"""Limit of a whole POST, in multiples of the configured timeout of each step: connect, send, each read."""

_ERRORS: Final = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    OSError,  # TimeoutError among them
)


class EventsClient:
    """HTTP client of one destination's events endpoint; the constructor raises ValueError or OSError.

    Each POST in flight has a pool of one connection, and a connection on which anything was received besides
    its answer is closed: an answer too many would be taken for that of the next POST.
    """

    def __init__(self, destination: Destination, network: Network) -> None:
        self.destination = destination
        self._url = _url(destination.endpoint)
        scheme, host, port = self._url.scheme.decode(), self._url.host.decode(), self._url.port
        self._proxy = network.proxy_for(scheme, host, port)
        self.tls = tls_of(destination, network)
        self._headers = [(b"host", _host_header(self._url)), *_headers(destination)]
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), destination.timeout)
        self._extensions = {"timeout": timeouts}
        self._idle: list[_Connection] = []
        self._secrets = [destination.token or "", *(self._proxy.credentials or () if self._proxy else ())]

    async def post(self, events: Sequence[bytes], written: asyncio.Future[None] | None = None) -> None:
        """POST the events, each a JSON object or several separated by commas; raises DeliveryError.

        `written` is completed once the body is written and only the answer is missing.
        """
        try:
            # The HTTP library's timeout is per read: a server that trickles could block us for ever.
            async with asyncio.timeout(self.destination.timeout * _TOTAL_TIMEOUT_FACTOR):
                answer = await self._answer(b"[" + b",".join(events) + b"]", written)
        except _ERRORS as error:
            raise UndeliveredError(
                f"{type(error).__name__}: {_message(error, self._secrets)}", endpoint_fails=True
            ) from None
        if (failure := failure_of(answer, self._secrets)) is not None:
            raise failure

    async def close(self) -> None:
        """Close the connections that no POST uses."""
        while self._idle:
            await self._idle.pop().pool.aclose()

    async def _answer(self, content: bytes, written: asyncio.Future[None] | None) -> Answer:
        connection = self._idle.pop() if self._idle else self._connection()
        is_clean = False
        try:
            request = httpcore.Request(
                "POST",
                self._url,
                # With a content-length, the body is not sent in chunks.
                headers=[*self._headers, (b"content-length", b"%d" % len(content))],
                content=_body(content, written),
                extensions=self._extensions,
            )
            response = await connection.pool.handle_async_request(request)
            try:
                body = await _read(response)
            finally:
                await response.aclose()
            if connection.answered_early and response.status < 300:
                raise httpcore.RemoteProtocolError("answered before it had the events")
            is_clean = not connection.has_unread_bytes()
        finally:
            if is_clean:
                self._idle.append(connection)
            else:
                await connection.pool.aclose()
        return Answer(response.status, {name.lower(): value for name, value in response.headers}, body)

    def _connection(self) -> _Connection:
        backend = Backend()
        options: dict[str, Any] = {
            "ssl_context": self.tls,
            "keepalive_expiry": self.destination.keepalive,
            "network_backend": backend,
            "max_connections": 1,
        }
        proxy = self._proxy
        if proxy is None:
            return _Connection(httpcore.AsyncConnectionPool(**options), backend)
        kind = httpcore.AsyncSOCKSProxy if proxy.is_socks else httpcore.AsyncHTTPProxy
        pool = kind(proxy_url=proxy.url, proxy_auth=proxy.credentials, **options)
        return _Connection(pool, backend)


class _Connection:
    """A pool of one connection, and the backend that opened it."""

    def __init__(self, pool: httpcore.AsyncConnectionPool, backend: Backend) -> None:
        self.pool = pool
        self._backend = backend

    @property
    def answered_early(self) -> bool:
        """Return whether the server sent anything before it had the whole request."""
        return self._backend.stream is not None and self._backend.stream.received_early

    def has_unread_bytes(self) -> bool:
        """Return whether more was received than the answer."""
        if self._backend.stream is not None and self._backend.stream.has_unread_bytes:
            return True
        return any(map(has_trailing_bytes, self.pool.connections))


def tls_of(destination: Destination, network: Network) -> ssl.SSLContext:
    """Return the settings of TLS for a destination; raises TlsError."""
    if not destination.endpoint.lower().startswith("https:"):
        return _no_tls()
    return network.tls.context(verify=destination.ssl_verify)


@cache
def _no_tls() -> ssl.SSLContext:
    """Return settings for plain HTTP: they trust no certificate, should one ever be needed."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _url(endpoint: str) -> httpcore.URL:
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("the endpoint must be an http or https URL with a host")
    try:
        name = host if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise ValueError("the endpoint's host is not a valid name") from None
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    return httpcore.URL(scheme=parts.scheme, host=name, port=parts.port, target=target)


def _host_header(url: httpcore.URL) -> bytes:
    host = b"[%s]" % url.host if b":" in url.host else url.host
    return host if url.port is None else b"%s:%d" % (host, url.port)


def _headers(destination: Destination) -> list[tuple[bytes, bytes]]:
    headers = {
        "accept": "application/json",
        "accept-encoding": "identity",  # so that no answer has to be unpacked
        "content-type": CONTENT_TYPE,
        "user-agent": f"kong-openmeter/{__version__}",
    }
    if destination.token:
        if not is_header_value(destination.token):
            raise ValueError("the token is not printable ASCII, so it cannot be sent in a header")
        headers["authorization"] = f"Bearer {destination.token}"
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _body(content: bytes, written: asyncio.Future[None] | None) -> AsyncIterator[bytes]:
    yield content
    if written is not None and not written.done():
        written.set_result(None)


async def _read(response: httpcore.Response) -> bytes:
    body = b""
    async for chunk in response.aiter_stream():
        body += chunk
        if len(body) > _MAX_ANSWER_BYTES:
            break
    return body


def _message(error: Exception, secrets: Sequence[str]) -> str:
    """Return an error in words; of a protocol error only its kind, because the text quotes the server."""
    if isinstance(error, TimeoutError | httpcore.TimeoutException):
        return "the metering API did not answer in time"
    if isinstance(error, httpcore.RemoteProtocolError):
        if str(error).startswith("answered before"):
            return "the server answered before it had received the events"
        if str(error).startswith("Server disconnected"):
            return "the connection was closed"
        return "the answer is not valid HTTP, or was cut off"
    if isinstance(error, httpcore.ProtocolError):
        return "the request cannot be sent as HTTP"
    return foreign_text(str(error), secrets) or "the connection was closed"
