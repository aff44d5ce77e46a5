"""Acceptor: accepts Kong's connections so that each worker gets its share.

Kong keeps its connections open, and the worker that wakes up first would accept all that are pending: of
several workers behind one socket, one would do all the work. So each worker publishes its number of
connections in shared memory. One that has more than its share leaves those that are pending to the others,
briefly and only a few times in a row. Thousands must not wait for an exact balance: Kong's may be the last of
them, and while the socket's queue is full, Kong's are refused.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import struct
import time
from typing import Final

from openmeter_plugin.kong.connections import Connections
from openmeter_plugin.kong.server import Server
from openmeter_plugin.log import RateLimit, get_logger

_COUNT: Final = struct.Struct("<I")
_DEFER_SECONDS: Final = 0.002
_RETRY_SECONDS: Final = 1.0
_MAX_ACCEPT_SECONDS: Final = 0.005
"""How long connections are accepted in one turn of the event loop: after a restart thousands may be pending,
and while the socket's queue is full, Kong's are refused."""
MAX_CONNECTIONS: Final = 16_384
"""Of one worker; beyond that, some that are not in use are closed for each new one."""
_MAX_DEFERRALS: Final = 5
"""In a row; after that, the worker that should accept what is pending is evidently not able to."""
_SLACK_DIVISOR: Final = 8
"""A worker's share is what the one with the fewest has, and an eighth more. With an exact balance two workers
accepted 1,000 connections a second: behind 5,314 others, an event was answered after 3.5 s."""


class ConnectionCounts:
    """The number of connections of each worker, in shared memory; created before the workers are forked."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, workers * _COUNT.size)

    def set(self, worker: int, connections: int) -> None:
        """Publish a worker's number of connections."""
        _COUNT.pack_into(self._memory, worker * _COUNT.size, connections)

    def lowest(self) -> int:
        """Return the lowest number of connections that any worker has."""
        return min(
            int(_COUNT.unpack_from(self._memory, worker * _COUNT.size)[0]) for worker in range(self.workers)
        )


class Acceptor:
    """Accepts one worker's share of the connections from the socket that all workers listen on."""

    def __init__(
        self,
        listener: socket.socket,
        server: Server,
        connections: Connections,
        counts: ConnectionCounts,
        worker: int,
        loop: asyncio.AbstractEventLoop,
        *,
        max_connections: int = MAX_CONNECTIONS,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        self._listener = listener
        self._server = server
        self._connections = connections
        self._counts = counts
        self._worker = worker
        self._loop = loop
        self._max_connections = max_connections
        self._retry_seconds = retry_seconds
        self._deferrals = 0
        self._closed = False
        self._error_limit = RateLimit()
        listener.setblocking(False)
        counts.set(worker, 0)
        loop.add_reader(listener, self.accept_pending)

    def close(self) -> None:
        """Stop accepting connections."""
        self._closed = True
        self._loop.remove_reader(self._listener)

    def accept_pending(self) -> None:
        """Accept this worker's share of the connections that are pending now; all if others do not."""
        end = time.monotonic() + _MAX_ACCEPT_SECONDS
        unclaimed = self._deferrals >= _MAX_DEFERRALS
        self._deferrals = 0 if unclaimed else self._deferrals
        while (unclaimed or not self._defer()) and self._accept() and time.monotonic() < end:
            pass

    def _defer(self) -> bool:
        """Leave what is pending to other workers for a moment if this one has more than its share."""
        count = len(self._connections)
        self._counts.set(self._worker, count)
        lowest = self._counts.lowest()
        if count <= lowest + lowest // _SLACK_DIVISOR:
            self._deferrals = 0
            return False
        self._deferrals += 1
        self._pause(_DEFER_SECONDS)
        return True

    def _accept(self) -> bool:
        """Accept a connection; returns whether another may be pending."""
        count = len(self._connections)
        if count >= self._max_connections:
            # Connections of others must not take the descriptors that Kong's need.
            self._server.close_spare()
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return False
        except OSError as error:  # out of descriptors or memory: the connection stays pending, and Kong waits
            if self._error_limit.passes():
                get_logger().error("accept_failed", reason=error.strerror)
            self._pause(self._retry_seconds)
            return False
        self._connections.add(connection, self._server.connection)
        self._counts.set(self._worker, len(self._connections))
        return True

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self.accept_pending)
