"""Worker sync: workers behind one socket announce to each other which instances Kong starts and closes.

Kong's next event may reach any of them, so a worker answers StartInstance only when the others have confirmed
the instance or do not respond. A worker that has just started does not know the instance: it closes the
connection of the event, and Kong starts the instance again.

Each worker has an inbox, a datagram socket that the supervisor creates before it forks, so that it outlives
the worker. A configuration is sent as an anonymous file: its size is not limited to that of a datagram, and
the API token in it never touches the disk.
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
_CONFIRMED: Final = b"K"
_MESSAGE: Final = struct.Struct("<cHi")  # kind, sender, instance id
_CONFIRM_SECONDS: Final = 0.25  # how long the answer to Kong waits for the other workers


class Mailboxes:
    """An inbox for each worker; created by the supervisor, used by all workers."""

    def __init__(self, workers: int) -> None:
        self.pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(workers)]
        for reader, writer in self.pairs:
            reader.setblocking(False)
            writer.setblocking(False)


class WorkerSync:
    """Exchanges a worker's announcements with the other workers."""

    def __init__(
        self,
        mailboxes: Mailboxes,
        number: int,
        *,
        on_start: Callable[[int, bytes], object],
        on_close: Callable[[int], None],
    ) -> None:
        self._number = number
        self._inbox = mailboxes.pairs[number][0]
        self._outboxes = {n: pair[1] for n, pair in enumerate(mailboxes.pairs)}
        self._others = [n for n in self._outboxes if n != number]
        self._on_start, self._on_close = on_start, on_close
        self._unconfirmed: dict[int, set[int]] = {}
        self._confirmed: dict[int, asyncio.Event] = {}

    def listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start receiving messages, and discard those for this worker's predecessor."""
        with contextlib.suppress(BlockingIOError):
            while True:
                _, descriptors, _, _ = socket.recv_fds(self._inbox, _MESSAGE.size, 1)
                for descriptor in descriptors:
                    os.close(descriptor)
        loop.add_reader(self._inbox, self._receive)

    async def announce(self, instance_id: int, config: bytes) -> None:
        """Announce an instance, and wait until the other workers have confirmed it or time is up."""
        if not self._others:
            return
        self._unconfirmed[instance_id] = set(self._others)
        confirmed = self._confirmed[instance_id] = asyncio.Event()
        descriptor = os.memfd_create("openmeter-instance", os.MFD_CLOEXEC)
        try:
            os.write(descriptor, config)
            for other in self._others:
                message = _MESSAGE.pack(_STARTED, self._number, instance_id)
                # A full inbox belongs to a worker that does not read; it will not know the instance.
                with contextlib.suppress(OSError):
                    socket.send_fds(self._outboxes[other], [message], [descriptor])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(confirmed.wait(), _CONFIRM_SECONDS)
        finally:
            os.close(descriptor)
            del self._unconfirmed[instance_id], self._confirmed[instance_id]

    def announce_close(self, instance_id: int) -> None:
        """Announce that Kong has closed an instance."""
        for other in self._others:
            self._send(other, _CLOSED, instance_id)

    def _send(self, to: int, kind: bytes, instance_id: int) -> None:
        with contextlib.suppress(OSError):
            self._outboxes[to].send(_MESSAGE.pack(kind, self._number, instance_id))

    def _receive(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._inbox, _MESSAGE.size, 1)
        except OSError:
            return
        kind, sender, instance_id = _MESSAGE.unpack(data)
        if kind == _STARTED:
            for descriptor in descriptors:
                with os.fdopen(descriptor, "rb") as file:
                    self._on_start(instance_id, os.pread(file.fileno(), os.fstat(descriptor).st_size, 0))
            self._send(sender, _CONFIRMED, instance_id)
        elif kind == _CLOSED:
            self._on_close(instance_id)
        elif instance_id in self._unconfirmed:
            self._unconfirmed[instance_id].discard(sender)
            if not self._unconfirmed[instance_id]:
                self._confirmed[instance_id].set()
