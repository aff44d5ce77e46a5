"""Ending Kong's connections so that it loses nothing, even if it writes to one at that very moment.

Kong keeps a pool of idle connections for each of its nginx workers, used last in, first out, and looks at
none before it takes it. What it does with one that we close (Kong 3.9, runloop/plugin_servers/rpc/pb_rpc.lua
and ngx_http_lua_socket_tcp.c):

- idle in the pool: it reads the end of the stream and closes its side. Nothing is lost;
- a call cannot be written ("broken pipe"), or its answer is cut off while we had bytes unread ("connection
  reset by peer"): the event is lost, and where the call was StartInstance, all others wait 10 s for it;
- the stream ends where an answer is due ("closed"): an event is sent again, after its instance has been
  started again, on whatever connection the pool has next. A StartInstance that ends so loses its event.

So only our side of an idle connection is shut down, and what still comes on it is read: then the worst is
"closed". And it is one connection at a time, until Kong has closed its side, so that the StartInstance that
follows a "closed" finds one that is alive. The one that was not used for the longest time comes first: the
last that the pool would give out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Final

from openmeter_plugin.kong.server import Connection, Server

_LOOK_SECONDS: Final = 0.001
_AFTER_A_RACE: Final = 0.1
"""Seconds until the next connection, after Kong wrote to one that was shut down: it starts its instance."""
_LAST_SECONDS: Final = 0.25
"""Seconds at the end in which Kong may still take notice of all that were left."""


class _Pool:
    """The connections of one nginx worker."""

    def __init__(self, now: float) -> None:
        self.connections: list[Connection] = []
        self._ending: list[Connection] = []
        self._began = now
        self._not_before = now
        self._round_seconds = 0.0

    def step(self, now: float, unhurried_until: float) -> None:
        """Shut the next idle connection down if the one before is gone; more only where time gets short."""
        if self._ending:
            if any(connection.is_open for connection in self._ending):
                return
            self._round_seconds = now - self._began
            if any(connection.was_called_late for connection in self._ending):
                self._not_before = now + _AFTER_A_RACE
            self._ending = []
        if now < self._not_before:
            return
        idle = sorted((c for c in self.connections if c.is_idle), key=lambda c: c.used)
        rounds = (unhurried_until - now) / max(self._round_seconds, _LOOK_SECONDS)
        chosen = idle[: math.ceil(len(idle) / max(rounds, 1.0))]
        self._ending = [connection for connection in chosen if not connection.has_unread]
        self._began = now
        for connection in self._ending:
            connection.shut_down()


async def drain(server: Server, seconds: float, unhurried: float) -> None:
    """Finish what is under way and end all connections, within `seconds`.

    Those that are idle are to be gone after `unhurried` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds - _LAST_SECONDS
    unhurried_until = min(loop.time() + unhurried, deadline)
    pools: dict[int, _Pool] = {}
    while server.connections and (now := loop.time()) < deadline:
        _assign(server.connections, pools, now)
        for pool in pools.values():
            pool.step(now, unhurried_until)
        await asyncio.sleep(_LOOK_SECONDS)
    for connection in list(server.connections):
        connection.shut_down()
    while server.connections and loop.time() < deadline + _LAST_SECONDS:  # noqa: ASYNC110 - of many
        await asyncio.sleep(_LOOK_SECONDS)


def _assign(connections: Iterable[Connection], pools: dict[int, _Pool], now: float) -> None:
    for pool in pools.values():
        pool.connections = []
    for connection in connections:
        pools.setdefault(connection.peer, _Pool(now)).connections.append(connection)
