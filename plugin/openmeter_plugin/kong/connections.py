"""The sockets of a worker's connections, in an epoll set of their own.

The event loop watches the set as one descriptor, and ready sockets are handled in rounds. An event is only
two short messages each way, so with asyncio's transport objects most of its cost would be theirs. Kong sends
a frame's length and its content in two writes, so a second `recv`, which costs next to nothing, mostly saves
a turn of the event loop.
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

from openmeter_plugin.process.handoff import BUSY, IDLE, NO_SLOT, Handoff

_CREDENTIALS: Final = struct.Struct("3i")  # ucred: pid, uid, gid
_MAX_READ: Final = 65536
_MAX_UNSENT: Final = 1024 * 1024
_MAX_ROUND: Final = 256  # sockets read before their records are written and their events answered
_NEXT_ROUND_SECONDS: Final = 0.001
"""How long to wait for another round after one: this is cheaper than a turn of the event loop."""
_MAX_ROUNDS_SECONDS: Final = 0.003
"""How long rounds may take before the event loop gets its turn, so that its other tasks do not starve."""
_SEND_RETRY_SECONDS: Final = 0.02
"""Delay until the next attempt to send the supervisor what its socket had no room for."""


class Handler(Protocol):
    """Receives a connection's bytes. Neither method raises."""

    def received(self, data: bytes) -> None:
        """Handle bytes of the stream."""

    def lost(self) -> None:
        """Handle the end of the connection; called once."""


class Link:
    """One connection's socket. Writes go out at once, or as soon as the peer reads."""

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
            if len(self._unsent) > _MAX_UNSENT:
                self.close()  # Kong reads each answer before it sends more
            return
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # the next read fails too, and that ends the connection
        if sent < len(data):
            self._unsent = data[sent:]
            self._connections.watch(self, select.EPOLLIN | select.EPOLLOUT)

    def finish(self, data: bytes) -> None:
        """Send the last bytes of the answer to a call, and mark the connection as idle."""
        self.write(data)
        if not self._unsent:
            self._connections.states[self.slot] = IDLE

    def write_rest(self) -> None:
        """Send the bytes that the peer had no room for."""
        data, self._unsent = self._unsent, b""
        self._connections.watch(self, select.EPOLLIN)
        self.write(data)

    def close(self) -> None:
        """Close the connection; the kernel still sends what is in its buffer."""
        self._connections.drop(self)

    def shut_down(self) -> None:
        """Shut down the writing side: the peer reads the end of the stream; its writes can still be read."""
        with contextlib.suppress(OSError):  # already disconnected
            self.socket.shutdown(socket.SHUT_WR)

    def peer_pid(self) -> int:
        """Return the pid of the process that connected, 0 if it cannot be read."""
        try:
            raw = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except (OSError, AttributeError):  # not a Unix socket, not Linux
            return 0
        return int(_CREDENTIALS.unpack(raw)[0])

    @property
    def has_unread(self) -> bool:
        """Whether the peer has sent unread bytes or closed its side."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    @property
    def has_unsent(self) -> bool:
        """Whether written bytes are still waiting for the peer to read."""
        return bool(self._unsent)


class EndedStream:
    """Handler of a connection that is shut down; it discards what still arrives."""

    def __init__(self, link: Link) -> None:
        link.shut_down()

    def received(self, data: bytes) -> None:
        """Discard the bytes."""

    def lost(self) -> None:
        """Do nothing."""


class Connections:
    """All connections of a worker. `round_ended` is called after each round of reads.

    With a `handoff`, the supervisor holds them open too.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, round_ended: Callable[[], None], handoff: Handoff | None = None
    ) -> None:
        self._loop = loop
        self._round_ended = round_ended
        self._handoff = handoff
        self._sending = False
        self.states: bytearray | mmap.mmap = bytearray(1) if handoff is None else handoff.states
        """For each slot, whether its connection is idle or busy."""
        self._links: dict[int, Link] = {}
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self._serve_ready)

    def __len__(self) -> int:
        return len(self._links)

    def add(self, connected: socket.socket, handler: Callable[[Link], Handler]) -> None:
        """Add a connected socket; its bytes go to the object that `handler` returns."""
        slot = NO_SLOT
        if self._handoff is not None:
            slot = self._handoff.add(connected)
            self._schedule_send()
        self._add(connected, slot, handler)

    def take_over(self, handler: Callable[[Link], Handler]) -> Counter[str]:
        """Serve the predecessor's connections; returns how many were `idle`, and how many were `ended`.

        A connection with a call under way is shut down instead, so that Kong resends its event.
        """
        counts: Counter[str] = Counter()
        for slot, connected, busy in self._handoff.take_over() if self._handoff is not None else ():
            self._add(connected, slot, EndedStream if busy else handler)
            counts["ended" if busy else "idle"] += 1
        return counts

    def _add(self, connected: socket.socket, slot: int, handler: Callable[[Link], Handler]) -> None:
        connected.setblocking(False)
        self._links[connected.fileno()] = Link(self, connected, slot, handler)
        self._epoll.register(connected.fileno(), select.EPOLLIN)

    def watch(self, link: Link, events: int) -> None:
        """Poll a connection's socket for these events."""
        descriptor = link.socket.fileno()
        if descriptor in self._links:
            self._epoll.modify(descriptor, events)

    def drop(self, link: Link) -> None:
        """Close a connection and call its handler's `lost`, unless that has happened already."""
        descriptor = link.socket.fileno()
        if self._links.pop(descriptor, None) is None:
            return
        self._epoll.unregister(descriptor)
        if self._handoff is not None:
            with contextlib.suppress(OSError):  # the peer has closed it already
                link.socket.shutdown(socket.SHUT_RDWR)  # the supervisor still holds it open for a moment
            self._handoff.remove(link.slot)
            link.slot = NO_SLOT  # a late answer must not mark the slot's next connection as idle
            self._schedule_send()
        link.socket.close()
        link.handler.lost()

    def close(self) -> None:
        """Close all connections and the epoll set."""
        for link in list(self._links.values()):
            self.drop(link)
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _schedule_send(self) -> None:
        """Send the supervisor new and closed connections, those of one turn of the event loop together."""
        if not self._sending:
            self._sending = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        if self._handoff is None or self._handoff.send():
            self._sending = False
        else:
            self._loop.call_later(_SEND_RETRY_SECONDS, self._send)

    def _serve_ready(self) -> None:
        end = time.monotonic() + _MAX_ROUNDS_SECONDS
        links, poll = self._links, self._epoll.poll
        wait = 0.0
        while ready := poll(wait, _MAX_ROUND):
            wait = _NEXT_ROUND_SECONDS
            for descriptor, events in ready:
                link = links.get(descriptor)
                if link is None:
                    continue  # closed earlier in this round
                if events & select.EPOLLOUT:
                    link.write_rest()
                if events & ~select.EPOLLOUT:
                    self._read(link)
            self._round_ended()
            if time.monotonic() >= end:
                return

    def _read(self, link: Link) -> None:
        self.states[link.slot] = BUSY
        try:
            data = link.socket.recv(_MAX_READ)
            if 0 < len(data) <= 4:
                with contextlib.suppress(BlockingIOError):
                    # The length of a frame: its content follows at once.
                    data += link.socket.recv(_MAX_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            link.handler.received(data)
        else:
            self.drop(link)
