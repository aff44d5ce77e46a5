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

from openmeter_plugin.server import Server

_COUNT: Final = struct.Struct("<I")
_LEAVE_SECONDS: Final = 0.002
_MOST_LEAVES: Final = 5
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
        shares: Shares,
        worker: int,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._listener = listener
        self._server = server
        self._shares = shares
        self._worker = worker
        self._loop = loop
        self._left = 0
        self._closed = False
        self._making: set[asyncio.Task[object]] = set()
        listener.setblocking(False)
        shares.tell(worker, 0)
        loop.add_reader(listener, self._ready)

    def close(self) -> None:
        """Take no more connections."""
        self._closed = True
        self._loop.remove_reader(self._listener)

    def _ready(self) -> None:
        mine = len(self._server.connections) + len(self._making)
        self._shares.tell(self._worker, mine)
        if mine > self._shares.fewest() and self._left < _MOST_LEAVES:
            self._left += 1
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_LEAVE_SECONDS, self._look_again)
            return
        self._left = 0
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        connection.setblocking(False)
        making = self._loop.create_task(
            self._loop.connect_accepted_socket(self._server.connection, connection)
        )
        self._making.add(making)
        making.add_done_callback(self._making.discard)
        self._shares.tell(self._worker, mine + 1)

    def _look_again(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._ready)
