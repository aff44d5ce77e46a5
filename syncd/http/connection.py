"""Connections of one thread to one API, with limits that no answer can exceed.

httpcore's limits of time hold for each read and write: a server that sends one byte a second would never
reach them, and a request to stop would wait for them. So each connection is wrapped: every wait ends at the
deadline of the whole request, and soon after a request to stop.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from ssl import SSLContext, SSLSocket
from typing import Any

import httpcore

from openmeter_plugin.network.proxies import Proxy
from openmeter_plugin.network.reuse import has_trailing_bytes
from syncd.core.errors import StoppedError
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Permit, Retry

TOTAL_FACTOR = 3
"""Limit for a whole request, in multiples of the limit for each of its steps (connect, send, each read)."""
_SLICE = 0.25
"""Seconds between two looks at whether to stop."""
_KEEPALIVE_EXPIRY = 5.0
_READ_BYTES = 64 * 1024
_READING = frozenset({"GET", "HEAD"})

_Headers = list[tuple[bytes, bytes]]


class AnswerError(Exception):
    """An answer that cannot be read: too long, or packed in a way that was not asked for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose body is unpacked; `headers` have lower-case names."""

    status: int
    headers: dict[bytes, bytes]
    content: bytes

    def header(self, name: str) -> str | None:
        """Return a header, None if there is none."""
        value = self.headers.get(name.encode())
        return None if value is None else value.decode("latin-1")


class Connections:
    """The connections of one thread at a time to one API.

    A pool of httpcore (1.0.9) that threads share may close a connection on which one of them waits for its
    answer (encode/httpcore#1110), so each request in flight has a pool of its own.
    """

    def __init__(self, endpoint: Endpoint, proxy: Proxy | None, tls: SSLContext, retry: Retry) -> None:
        self._limits = _Limits(retry.should_stop, retry.permit)
        self._step = endpoint.timeout
        self._max_answer_bytes = endpoint.max_answer_bytes
        self._extensions = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), endpoint.timeout)}
        self._pool = _pool(endpoint, proxy, tls, _Backend(self._limits))

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def send(self, method: str, url: httpcore.URL, headers: _Headers, content: bytes | None) -> Answer:
        """Send one request and read its answer; raises httpcore's errors, AnswerError or StoppedError."""
        self._limits.begin(self._step * TOTAL_FACTOR, writes=method not in _READING)
        request = httpcore.Request(method, url, headers=headers, content=content, extensions=self._extensions)
        response = self._pool.handle_request(request)
        try:
            received = {name.lower(): value for name, value in response.headers}
            encoding = received.get(b"content-encoding", b"")
            content = _unpacked(response.iter_stream(), encoding, self._max_answer_bytes)
        finally:
            response.close()
            if self._has_unread_bytes():
                # Sent after the answer that was asked for: the next request would take it for its own.
                self._pool.close()
        return Answer(response.status, received, content)

    def _has_unread_bytes(self) -> bool:
        """Return whether an idle connection has received more than its answers."""
        return any(has_trailing_bytes(one) for one in self._pool.connections if one.is_idle())


def _pool(
    endpoint: Endpoint, proxy: Proxy | None, tls: SSLContext, backend: httpcore.NetworkBackend
) -> httpcore.ConnectionPool:
    if proxy is None:
        return httpcore.ConnectionPool(
            ssl_context=tls,
            keepalive_expiry=_KEEPALIVE_EXPIRY,
            uds=endpoint.unix_socket,
            network_backend=backend,
        )
    kind = httpcore.SOCKSProxy if proxy.is_socks else httpcore.HTTPProxy
    return kind(
        proxy_url=proxy.url,
        proxy_auth=proxy.credentials,
        ssl_context=tls,
        keepalive_expiry=_KEEPALIVE_EXPIRY,
        network_backend=backend,
    )


def _unpacked(chunks: Iterable[bytes], encoding: bytes, limit: int) -> bytes:
    """Return the body, unpacked; raises AnswerError before it is longer than `limit`."""
    if encoding.strip().lower() in {b"gzip", b"x-gzip"}:
        chunks = _gunzipped(chunks)
    elif encoding.strip().lower() not in {b"", b"identity"}:
        raise AnswerError("a body packed in a way that was not asked for (Content-Encoding)")
    parts, length = [], 0
    for chunk in chunks:
        parts.append(chunk)
        length += len(chunk)
        if length > limit:
            raise AnswerError(f"more than {limit // 1024**2} MiB")
    return b"".join(parts)


def _gunzipped(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Unpack in small steps: 64 KiB may unpack to 64 MiB at once."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        for chunk in chunks:
            waiting = chunk
            while waiting and not unpacker.eof:
                yield unpacker.decompress(waiting, _READ_BYTES)
                waiting = unpacker.unconsumed_tail
    except zlib.error:
        raise AnswerError("a body that cannot be unpacked") from None
    if not unpacker.eof:
        raise AnswerError("a packed body that is cut off")


class _Limits:
    """Deadline of the request under way, whether it may be sent, and the request to stop."""

    def __init__(self, should_stop: Callable[[], bool], permit: Permit) -> None:
        self._should_stop = should_stop
        self._permit = permit
        self._writes = False
        self._deadline = 0.0

    def begin(self, seconds: float, *, writes: bool) -> None:
        self._deadline = time.monotonic() + seconds
        self._writes = writes

    def check(self) -> None:
        """Raise the error of `permit` if a request that may change something must not be sent now."""
        if self._writes:
            self._permit()

    def slices(self, timeout: float | None, late: type[Exception]) -> Iterator[float]:
        """Yield short waits until `timeout` or the deadline is over, then raise `late`; or StoppedError."""
        end = self._deadline if timeout is None else min(self._deadline, time.monotonic() + timeout)
        while (left := end - time.monotonic()) > 0:
            # Before each wait: a server that sends a little again and again never lets one run out.
            if self._should_stop():
                raise StoppedError("stopped by request")
            yield min(left, _SLICE)
        raise late("timed out")


class _Backend(httpcore.NetworkBackend):
    """httpcore's own backend, in limits.

    Looking up a name, connecting and the TLS handshake cannot be interrupted, so they run in a thread of
    their own, which is left behind when it takes too long.
    """

    def __init__(self, limits: _Limits) -> None:
        self._limits = limits
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        def connect() -> httpcore.NetworkStream:
            return self._inner.connect_tcp(host, port, timeout, local_address, socket_options)

        return _Stream(_aside(connect, self._limits, timeout), self._limits)

    def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        def connect() -> httpcore.NetworkStream:
            return self._inner.connect_unix_socket(path, timeout, socket_options)

        return _Stream(_aside(connect, self._limits, timeout), self._limits)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    """A connection in limits."""

    def __init__(self, inner: httpcore.NetworkStream, limits: _Limits) -> None:
        self._inner = inner
        self._limits = limits

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        for wait in self._limits.slices(timeout, httpcore.ReadTimeout):
            with contextlib.suppress(httpcore.ReadTimeout):
                return self._inner.read(max_bytes, wait)
        raise AssertionError  # slices() ends by an exception

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # As late as can be: a process may be frozen anywhere before this, and wake up much later.
        if buffer:  # httpcore also writes nothing, at the end of a request that is sent
            self._limits.check()
        # Not in slices: after a timeout nobody knows how much was written.
        self._inner.write(buffer, timeout)

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        def handshake() -> httpcore.NetworkStream:
            return self._inner.start_tls(ssl_context, server_hostname, timeout)

        plain = self._inner.get_extra_info("socket")
        try:
            return _Stream(_aside(handshake, self._limits, timeout), self._limits)
        except (StoppedError, httpcore.ConnectTimeout):
            with contextlib.suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)  # ends the handshake's wait
            raise

    def get_extra_info(self, info: str) -> Any:
        found = self._inner.get_extra_info(info)
        if info == "is_readable" and not found:
            # TLS may have unpacked more than was read.
            connected = self._inner.get_extra_info("socket")
            return isinstance(connected, SSLSocket) and connected.pending() > 0
        return found


def _aside(
    connect: Callable[[], httpcore.NetworkStream], limits: _Limits, timeout: float | None
) -> httpcore.NetworkStream:
    """Return what `connect` returns, within the limits; a connection that comes too late is closed."""
    future: Future[httpcore.NetworkStream] = Future()

    def run() -> None:
        try:
            future.set_result(connect())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="syncd-connect", daemon=True).start()
    try:
        for wait in limits.slices(timeout, httpcore.ConnectTimeout):
            with contextlib.suppress(TimeoutError):
                return future.result(wait)
    except (StoppedError, httpcore.ConnectTimeout):
        future.add_done_callback(_close_late)
        raise
    raise AssertionError  # slices() ends by an exception


def _close_late(future: Future[httpcore.NetworkStream]) -> None:
    if future.exception() is None:
        future.result().close()
