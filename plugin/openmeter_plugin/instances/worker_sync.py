"""Workers behind one socket tell each other of the instances that Kong starts.

Kong's next event may reach any of them, so a worker answers StartInstance only when the others know the
instance, or are not there to know it: one that just began does not know it, closes the connection, and
Kong starts the instance again.

Each worker has an inbox, a datagram socket made by the supervisor before it forks, so that it outlives
the worker. A configuration travels as an anonymous file: no size is too large for a datagram, and the API
token in it touches no disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

_STARTED: Final = b"S"
_CLOSED: Final = b"C"
_KNOWN: Final = b"K"
_MESSAGE: Final = struct.Struct("<cHi")  # kind, sender, instance id
PATIENCE: Final = 0.25  # seconds that an answer to Kong waits for the others


class Mailboxes:
    """An inbox for each worker; made by the supervisor, used by all workers."""

    def __init__(self, workers: int) -> None:
        self.pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(workers)]
        for reader, writer in self.pairs:
            reader.setblocking(False)
            writer.setblocking(False)


class WorkerSync:
    """A worker's view of the others."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        own: int,
        *,
        started: Callable[[int, bytes], object],
        closed: Callable[[int], None],
    ) -> None:
        self._own = own
        self._inbox = mailboxes.pairs[own][0]
        self._outboxes = {n: pair[1] for n, pair in enumerate(mailboxes.pairs)}
        self._others = [n for n in self._outboxes if n != own]
        self._started, self._closed = started, closed
        self._unconfirmed: dict[int, set[int]] = {}
        self._confirmed: dict[int, asyncio.Event] = {}

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the others' messages from now on; what came for this worker's predecessor is dropped."""
        with contextlib.suppress(BlockingIOError):
            while True:
                _, descriptors, _, _ = socket.recv_fds(self._inbox, _MESSAGE.size, 1)
                for descriptor in descriptors:
                    os.close(descriptor)
        loop.add_reader(self._inbox, self._receive)

    async def announce(self, instance_id: int, config: bytes) -> None:
        """Tell the others of an instance, and wait until they know it or are taken not to be there."""
        if not self._others:
            return
        self._unconfirmed[instance_id] = set(self._others)
        confirmed = self._confirmed[instance_id] = asyncio.Event()
        descriptor = os.memfd_create("openmeter-instance", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, config)
            for other in self._others:
                message = _MESSAGE.pack(_STARTED, self._own, instance_id)
                # An inbox that is full belongs to a worker that does not read: it will not know.
                with contextlib.suppress(OSError):
                    socket.send_fds(self._outboxes[other], [message], [descriptor])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(confirmed.wait(), PATIENCE)
        finally:
            os.close(descriptor)
            del self._unconfirmed[instance_id], self._confirmed[instance_id]

    def announce_close(self, instance_id: int) -> None:
        """Tell the others that Kong has closed an instance."""
        for other in self._others:
            self._send(other, _CLOSED, instance_id)

    def _send(self, to: int, kind: bytes, instance_id: int) -> None:
        with contextlib.suppress(OSError):
            self._outboxes[to].send(_MESSAGE.pack(kind, self._own, instance_id))

    def _receive(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._inbox, _MESSAGE.size, 1)
        except OSError:
            return
        kind, sender, instance_id = _MESSAGE.unpack(data)
        if kind == _STARTED:
            for descriptor in descriptors:
                with os.fdopen(descriptor, "rb") as file:
                    self._started(instance_id, os.pread(file.fileno(), os.fstat(descriptor).st_size, 0))
            self._send(sender, _KNOWN, instance_id)
        elif kind == _CLOSED:
            self._closed(instance_id)
        elif instance_id in self._unconfirmed:
            self._unconfirmed[instance_id].discard(sender)
            if not self._unconfirmed[instance_id]:
                self._confirmed[instance_id].set()
