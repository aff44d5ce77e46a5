"""Kong's connections, kept open while the worker that serves them is replaced.

An event whose connection just ends Kong sends again. One that it could not write, or whose connection was
reset, is lost, and where that was a StartInstance, so may be those that wait for its instance (`draining`).
A worker that dies did that to some whenever it was killed under load. So the supervisor holds each
connection too, and the next worker serves it on: what Kong has written meanwhile is still in the socket.

For each connection there is a byte in memory that both share: whether a call is under way on it. It is set
before anything is read and cleared after the answer is sent. What was read of a call is gone with the worker,
so a connection that has one under way is not served on: its stream is ended, and Kong sends the event again.
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

_MOST: Final = 65_536
_LEFT_FREE: Final = 256  # descriptors, for what else a process opens
_IN_A_MESSAGE: Final = 250  # the kernel passes no more than 253 descriptors at once
_MESSAGES_AT_ONCE: Final = 1_000
NOT_KEPT: Final = 0
"""The slot of all connections that are not kept."""
IDLE: Final = 0
UNDER_WAY: Final = 1


def room_for_connections() -> int:
    """Raise the limit of open files, usually 1024, and return how many connections it has room for.

    After a restart each of Kong's timers may have a connection. Children inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, (_MOST if soft == resource.RLIM_INFINITY else min(soft, _MOST)) - _LEFT_FREE)


class Kept:
    """The connections of one worker and of those that take its place; made before it is forked.

    At most `most` are kept at a time. The supervisor takes in what the worker sends, of many connections at
    once where many come: how many are new, their slots, the slots of those that are gone (each a
    little-endian uint32), and the new ones.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._supervisors, self._workers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._supervisors.setblocking(False)
        self._workers.setblocking(False)
        self.states = mmap.mmap(-1, most + 1)
        self._held: dict[int, int] = {}
        self._free: list[int] = []
        self._unused = NOT_KEPT + 1  # from this slot on all are free
        self._new: dict[int, socket.socket] = {}
        self._gone: list[int] = []

    def __len__(self) -> int:
        return len(self._held)

    # In the supervisor

    def take_in(self) -> bool:
        """Hold what the worker has sent, and let go of what is gone; returns whether there was something.

        Never waits, never raises.
        """
        for number in range(_MESSAGES_AT_ONCE):
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    self._supervisors,
                    4 * (1 + 2 * _IN_A_MESSAGE),
                    _IN_A_MESSAGE,
                    socket.MSG_CMSG_CLOEXEC,
                )
            except OSError:
                return number > 0
            new, *slots = struct.unpack(f"<{len(message) // 4}I", message)
            for slot in slots[new:]:
                if (descriptor := self._held.pop(slot, None)) is not None:
                    os.close(descriptor)
            # Fewer come with it where this process has too many open: those are not kept.
            self._held.update(zip(slots[:new], descriptors, strict=False))
        return True

    def close(self) -> None:
        """Let go of everything: in a process that is not to have it."""
        self._supervisors.close()
        self._workers.close()
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()

    # In the worker

    def take_over(self) -> Iterator[tuple[int, socket.socket, bool]]:
        """Yield what the worker before had: slot, connection, whether a call is under way. Call it first."""
        self._supervisors.close()
        self._unused = max(self._held, default=NOT_KEPT) + 1
        self._free = [slot for slot in range(NOT_KEPT + 1, self._unused) if slot not in self._held]
        for slot, descriptor in self._held.items():
            yield slot, socket.socket(fileno=descriptor), self.states[slot] == UNDER_WAY
        self._held.clear()

    def keep(self, connected: socket.socket) -> int:
        """Have the supervisor hold a connection too, from the next `send` on; returns its slot."""
        if self._free:
            slot = self._free.pop()
        elif self._unused <= self._most:
            slot = self._unused
            self._unused += 1
        else:
            return NOT_KEPT
        self.states[slot] = IDLE
        self._new[slot] = connected
        return slot

    def gone(self, slot: int) -> None:
        """Have the supervisor let go of a connection that is closed here."""
        if self._new.pop(slot, None) is not None:
            self._free.append(slot)
        elif slot != NOT_KEPT:
            self._gone.append(slot)

    def send(self) -> bool:
        """Send what is new and what is gone; returns whether nothing is left. Never waits, never raises."""
        while self._new or self._gone:
            new = dict(islice(self._new.items(), _IN_A_MESSAGE))
            gone = self._gone[:_IN_A_MESSAGE]
            message = struct.pack(f"<{1 + len(new) + len(gone)}I", len(new), *new, *gone)
            try:
                socket.send_fds(self._workers, [message], [connected.fileno() for connected in new.values()])
            except BlockingIOError:
                return False
            except OSError:  # too many descriptors are on their way in this machine: these are not kept
                if new:
                    gone = []
            for slot in new:
                del self._new[slot]
            del self._gone[: len(gone)]
            self._free += gone
        return True
