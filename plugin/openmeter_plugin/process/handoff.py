"""Connection handoff: Kong's connections stay open while the worker that serves them is replaced.

When a connection simply ends, Kong resends its event. An event that Kong could not write, or whose connection
was reset, is lost; if it was a StartInstance, so may be the events that wait for its instance
(`kong/shutdown.py`). A worker that was killed under load cost some events that way each time. So the
supervisor holds a descriptor of each connection too, and the next worker serves it: what Kong has written in
between is still in the socket.

Both share one byte of memory for each connection, which says whether a call is under way on it. It is set
before anything is read and cleared after the answer is sent. What a worker has read of a call is gone with
the worker, so the next one does not serve a busy connection: it ends the stream, and Kong resends the event.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import socket
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Final

_MAX_CONNECTIONS: Final = 65_536
_RESERVED_DESCRIPTORS: Final = 256  # for the other files that a process opens
_MAX_PER_MESSAGE: Final = 250  # the kernel passes no more than 253 descriptors at once
_MAX_MESSAGES: Final = 1_000
NO_SLOT: Final = 0
"""The slot of all connections that the supervisor does not hold."""
IDLE: Final = 0
BUSY: Final = 1


def raise_connection_limit() -> int:
    """Raise the limit of open files, usually 1024, and return how many connections fit in it.

    After a restart each of Kong's timers may have a connection. Child processes inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, _MAX_CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    usable = _MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(soft, _MAX_CONNECTIONS)
    return max(1, usable - _RESERVED_DESCRIPTORS)


class Handoff:
    """The connections that one worker passes on to its successors; created before the worker is forked.

    The supervisor holds at most `limit` of them. The worker sends it one message for many changes: the number
    of new connections, their slots, the slots of closed ones (each a little-endian uint32), and the
    descriptors of the new ones.
    """

    def __init__(self, limit: int = _MAX_CONNECTIONS, *, per_message: int = _MAX_PER_MESSAGE) -> None:
        self._limit = limit
        self._per_message = per_message
        self._supervisor_end, self._worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._supervisor_end.setblocking(False)
        self._worker_end.setblocking(False)
        self.states = mmap.mmap(-1, limit + 1)
        self._held: dict[int, int] = {}
        self._free: list[int] = []
        self._unused = NO_SLOT + 1  # all slots from this one on are free
        self._new: dict[int, socket.socket] = {}
        self._closed: list[int] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def limit(self) -> int:
        """How many connections the supervisor can hold."""
        return self._limit

    # In the supervisor

    def receive(self) -> bool:
        """Hold the connections that the worker has sent, and close those that are gone.

        Returns whether there was a message. Never blocks, never raises.
        """
        for number in range(_MAX_MESSAGES):
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    self._supervisor_end,
                    4 * (1 + 2 * self._per_message),
                    self._per_message,
                    socket.MSG_CMSG_CLOEXEC,
                )
            except OSError:
                return number > 0
            new, *slots = struct.unpack(f"<{len(message) // 4}I", message)
            for slot in slots[new:]:
                if (descriptor := self._held.pop(slot, None)) is not None:
                    os.close(descriptor)
            # Fewer descriptors arrive if this process has too many open; the rest are not held.
            self._held.update(zip(slots[:new], descriptors, strict=False))
        return True

    def close(self) -> None:
        """Close everything, in a process that does not use it."""
        self._supervisor_end.close()
        self._worker_end.close()
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    # In the worker

    def take_over(self) -> Iterator[tuple[int, socket.socket, bool]]:
        """Yield the predecessor's connections: slot, socket, whether it is busy. Call this first."""
        self._supervisor_end.close()
        self._unused = max(self._held, default=NO_SLOT) + 1
        self._free = [slot for slot in range(NO_SLOT + 1, self._unused) if slot not in self._held]
        for slot, descriptor in self._held.items():
            yield slot, socket.socket(fileno=descriptor), self.states[slot] == BUSY
        self._held.clear()

    def add(self, connected: socket.socket) -> int:
        """Assign a slot to a new connection and return it; the next `send` passes the connection on."""
        if self._free:
            slot = self._free.pop()
        elif self._unused <= self._limit:
            slot = self._unused
            self._unused += 1
        else:
            return NO_SLOT
        self.states[slot] = IDLE
        self._new[slot] = connected
        return slot

    def remove(self, slot: int) -> None:
        """Note that a connection is closed here; the next `send` has the supervisor close it too."""
        if self._new.pop(slot, None) is not None:
            self._free.append(slot)
        elif slot != NO_SLOT:
            self._closed.append(slot)

    def send(self) -> bool:
        """Send new and closed connections; returns whether all were sent. Never blocks, never raises."""
        while self._new or self._closed:
            new = dict(islice(self._new.items(), self._per_message))
            closed = self._closed[: self._per_message]
            message = struct.pack(f"<{1 + len(new) + len(closed)}I", len(new), *new, *closed)
            try:
                socket.send_fds(
                    self._worker_end, [message], [connected.fileno() for connected in new.values()]
                )
            except BlockingIOError:
                return False
            except OSError:  # this machine has too many descriptors in flight: these are not held
                if new:
                    closed = []
            for slot in new:
                del self._new[slot]
            del self._closed[: len(closed)]
            self._free += closed
        return True
