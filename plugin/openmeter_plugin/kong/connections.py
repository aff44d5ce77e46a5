"""The sockets of a worker's connections, in an epoll set of their own.

The event loop watches the set as one descriptor, and whatever it has is worked off in rounds. An event is
two short messages each way, so what a transport object costs for each is most of what an event costs; and
Kong sends a frame's length and its content one after the other, so a second look at the socket, for next
to nothing, mostly saves a turn of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from openmeter_plugin.process.handoff import IDLE, NOT_KEPT, UNDER_WAY, Kept

_CREDENTIALS: Final = struct.Struct("3i")  # ucred: pid, uid, gid
_MAX_AT_ONCE: Final = 65536
_ROUND: Final = 256  # sockets looked at before records are written and answers given
_PATIENCE: Final = 0.001
"""Seconds to wait for the next round while there was one just now: less work than the event loop's turn."""
_BUDGET: Final = 0.003
"""Seconds of rounds before the event loop has its turn: whoever else is on it must not starve."""
_TELL_AGAIN: Final = 0.02
"""Seconds until the supervisor is told what it had no room for."""


class Handler(Protocol):
    """What a connection's bytes are for. Neither method raises."""

    def received(self, data: bytes) -> None:
        """Take bytes of the stream."""

    def lost(self) -> None:
        """Forget the connection, which is gone; called once."""


class Link:
    """One connection's socket: what is written goes out at once, or as soon as the peer takes it."""

    __slots__ = ("_connections", "_unsent", "handler", "slot", "socket")

    def __init__(
        self,
        connections: Connections,
        connected: socket.socket,
        slot: int,
        handler: Callable[[Link], Handler],
    ) -> None:
        self._connections = connections
        self.socket = connected
        self.slot = slot
        self._unsent = b""
        self.handler = handler(self)

    def write(self, data: bytes) -> None:
        """Send bytes, unless the connection is gone. Never waits."""
        if self._unsent:
            self._unsent += data
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the next look at the socket tells, and that is what ends the connection
        if sent < len(data):
            self._unsent = data[sent:]
            self._connections.watch(self, select.EPOLLIN | select.EPOLLOUT)

    def finish(self, data: bytes) -> None:
        """Send the last bytes of the answer to a call: from now on none is under way."""
        self.write(data)
        if not self._unsent:
            self._connections.states[self.slot] = IDLE

    def write_rest(self) -> None:
        """Send what could not be sent before."""
        data, self._unsent = self._unsent, b""
        self._connections.watch(self, select.EPOLLIN)
        self.write(data)

    def close(self) -> None:
        """Close the connection; what the kernel has taken is still sent."""
        self._connections.drop(self)

    def shut_down(self) -> None:
        """End our side of the stream: the peer finds its end there, and what it still writes can be read."""
        with contextlib.suppress(OSError):  # it is gone already
            self.socket.shutdown(socket.SHUT_WR)

    def peer(self) -> int:
        """Return the pid of the process that connected; 0 where that is not ours to see."""
        try:
            raw = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except (OSError, AttributeError):  # not a Unix socket, not Linux
            return 0
        return int(_CREDENTIALS.unpack(raw)[0])

    @property
    def has_unread(self) -> bool:
        """Whether the peer has written something that was not read yet, or has closed its side."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    @property
    def has_unsent(self) -> bool:
        """Whether the peer has not taken yet what was written."""
        return bool(self._unsent)


class Ended:
    """A connection whose stream is ended; what still comes is for nobody."""

    def __init__(self, link: Link) -> None:
        link.shut_down()

    def received(self, data: bytes) -> None:
        """Drop it."""

    def lost(self) -> None:
        """Do nothing."""


class Connections:
    """All connections of a worker. `round_ended` is called when what was there has been handled.

    They stay open in the supervisor's hands where that has `kept` them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, round_ended: Callable[[], None], kept: Kept | None = None
    ) -> None:
        self._loop = loop
        self._round_ended = round_ended
        self._kept = kept
        self._telling = False
        self.states: bytearray | mmap.mmap = bytearray(1) if kept is None else kept.states
        """For each slot whether a call is under way on its connection."""
        self._links: dict[int, Link] = {}
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self._work)

    def __len__(self) -> int:
        return len(self._links)

    def add(self, connected: socket.socket, handler: Callable[[Link], Handler]) -> None:
        """Take over a connected socket, whose bytes go to what `handler` returns."""
        slot = NOT_KEPT
        if self._kept is not None:
            slot = self._kept.keep(connected)
            self._tell_soon()
        self._add(connected, slot, handler)

    def take_over(self, handler: Callable[[Link], Handler]) -> Counter[str]:
        """Serve on what the worker before us had; returns how many were `idle`, and how many `ended`.

        Where a call was under way the stream is ended instead, which has Kong send its event again.
        """
        found: Counter[str] = Counter()
        for slot, connected, under_way in self._kept.take_over() if self._kept is not None else ():
            self._add(connected, slot, Ended if under_way else handler)
            found["ended" if under_way else "idle"] += 1
        return found

    def _add(self, connected: socket.socket, slot: int, handler: Callable[[Link], Handler]) -> None:
        connected.setblocking(False)
        self._links[connected.fileno()] = Link(self, connected, slot, handler)
        self._epoll.register(connected.fileno(), select.EPOLLIN)

    def watch(self, link: Link, events: int) -> None:
        """Look for these events on a connection's socket."""
        descriptor = link.socket.fileno()
        if descriptor in self._links:
            self._epoll.modify(descriptor, events)

    def drop(self, link: Link) -> None:
        """Close a connection and tell its handler, unless that has been done."""
        descriptor = link.socket.fileno()
        if self._links.pop(descriptor, None) is None:
            return
        self._epoll.unregister(descriptor)
        if self._kept is not None:
            with contextlib.suppress(OSError):  # the peer has closed it already
                link.socket.shutdown(socket.SHUT_RDWR)  # the supervisor has it open for a moment yet
            self._kept.gone(link.slot)
            link.slot = NOT_KEPT  # an answer may yet come, when the slot is another connection's
            self._tell_soon()
        link.socket.close()
        link.handler.lost()

    def close(self) -> None:
        """Close all connections, and the set."""
        for link in list(self._links.values()):
            self.drop(link)
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _tell_soon(self) -> None:
        """Have the supervisor told what is new and what is gone, all of a turn of the event loop at once."""
        if not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        if self._kept is None or self._kept.send():
            self._telling = False
        else:
            self._loop.call_later(_TELL_AGAIN, self._tell)

    def _work(self) -> None:
        end = time.monotonic() + _BUDGET
        links, poll = self._links, self._epoll.poll
        wait = 0.0
        while ready := poll(wait, _ROUND):
            wait = _PATIENCE
            for descriptor, events in ready:
                link = links.get(descriptor)
                if link is None:
                    continue  # closed by what was handled before it in this round
                if events & select.EPOLLOUT:
                    link.write_rest()
                if events & ~select.EPOLLOUT:
                    self._read(link)
            self._round_ended()
            if time.monotonic() >= end:
                return

    def _read(self, link: Link) -> None:
        self.states[link.slot] = UNDER_WAY
        try:
            data = link.socket.recv(_MAX_AT_ONCE)
            if 0 < len(data) <= 4:
                with contextlib.suppress(BlockingIOError):
                    # The length of a frame: its content follows at Kong's heels.
                    data += link.socket.recv(_MAX_AT_ONCE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            link.handler.received(data)
        else:
            self.drop(link)
