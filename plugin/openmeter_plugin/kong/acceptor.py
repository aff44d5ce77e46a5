"""Acceptor: accepts Kong's connections so that each worker gets its share.

Kong keeps its connections open, and the worker that wakes up first would accept all that are pending: of
several workers behind one socket, one would do all the work. So each worker publishes its number of
connections in shared memory. One that has more than its share leaves a connection to the others, briefly and
only a few times in a row.
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
"""In a row; after that, the worker that should accept the connection is evidently not able to."""


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
        """Accept this worker's share of the connections that are pending now."""
        end = time.monotonic() + _MAX_ACCEPT_SECONDS
        while self._accept() and time.monotonic() < end:
            pass

    def _accept(self) -> bool:
        """Accept a connection if this worker should; returns whether to try again at once."""
        count = len(self._connections)
        self._counts.set(self._worker, count)
        if count > self._counts.lowest() and self._deferrals < _MAX_DEFERRALS:
            self._deferrals += 1
            self._pause(_DEFER_SECONDS)
            return False
        self._deferrals = 0
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
        self._counts.set(self._worker, count + 1)
        return True

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self.accept_pending)
