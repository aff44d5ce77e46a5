"""Accepting connections so that each worker gets its share.

Kong keeps its connections, and whoever wakes up first would take all that are waiting: with several workers
behind one socket, one would do all the work. So each tells the others how many it has, in memory that they
share, and one with more than its share leaves a connection to the others for a moment, but never for long.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import struct
from typing import Final

from openmeter_plugin.kong.connections import Connections
from openmeter_plugin.kong.server import Server
from openmeter_plugin.log import RateLimit, get_logger

_COUNT: Final = struct.Struct("<I")
_LEAVE_SECONDS: Final = 0.002
_REFUSED_SECONDS: Final = 1.0
_MAX_AT_ONCE: Final = 64
"""Connections taken in one turn of the event loop: after a restart thousands may wait."""
_MAX_LEAVES: Final = 5
"""In a row; then whoever should have taken the connection is not there to do so."""


class Shares:
    """How many connections each worker has; made before they are forked."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._memory = mmap.mmap(-1, workers * _COUNT.size)

    def tell(self, worker: int, connections: int) -> None:
        """Write down how many connections a worker has."""
        _COUNT.pack_into(self._memory, worker * _COUNT.size, connections)

    def fewest(self) -> int:
        """Return how many the worker with the fewest has."""
        return min(
            int(_COUNT.unpack_from(self._memory, worker * _COUNT.size)[0]) for worker in range(self.workers)
        )


class Acceptor:
    """Takes one worker's share of the connections from the socket that all of them listen on."""

    def __init__(
        self,
        listener: socket.socket,
        server: Server,
        connections: Connections,
        shares: Shares,
        worker: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._listener = listener
        self._server = server
        self._connections = connections
        self._shares = shares
        self._worker = worker
        self._loop = loop
        self._left = 0
        self._closed = False
        self._refused_limit = RateLimit()
        listener.setblocking(False)
        shares.tell(worker, 0)
        loop.add_reader(listener, self._ready)

    def close(self) -> None:
        """Take no more connections."""
        self._closed = True
        self._loop.remove_reader(self._listener)

    def look(self) -> None:
        """Take the connections that wait now."""
        self._ready()

    def _ready(self) -> None:
        for _ in range(_MAX_AT_ONCE):
            if not self._take():
                return

    def _take(self) -> bool:
        """Take a connection, if there is one for us; returns whether another look may be worth it."""
        mine = len(self._connections)
        self._shares.tell(self._worker, mine)
        if mine > self._shares.fewest() and self._left < _MAX_LEAVES:
            self._left += 1
            self._look_later(_LEAVE_SECONDS)
            return False
        self._left = 0
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return False
        except OSError as error:  # no descriptor or no memory left: the connection waits, Kong too
            if self._refused_limit.passes():
                get_logger().error("connection_not_accepted", reason=error.strerror)
            self._look_later(_REFUSED_SECONDS)
            return False
        self._connections.add(connection, self._server.connection)
        self._shares.tell(self._worker, mine + 1)
        return True

    def _look_later(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._look_again)

    def _look_again(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._ready)
