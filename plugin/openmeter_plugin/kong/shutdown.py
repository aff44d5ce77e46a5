"""Shutdown of Kong's connections without losing events, even if Kong writes to one at that very moment.

Kong keeps a pool of idle connections for each of its nginx workers, last in, first out, and does not check a
connection before it takes it. When the plugin server closes one, Kong does this (Kong 3.9,
runloop/plugin_servers/rpc/pb_rpc.lua and ngx_http_lua_socket_tcp.c):

- The connection is idle in the pool: Kong reads the end of the stream and closes its side. Nothing is lost.
- A call cannot be written ("broken pipe"), or its answer is cut off because we had unread bytes ("connection
  reset by peer"): the event is lost. If the call was StartInstance, all other events wait 10 s for it.
- The stream ends where an answer is due ("closed"): Kong starts the instance again and resends the event, on
  the connection that its pool gives out next. If the call was StartInstance, its event is lost.

So a connection that is in use ends right after an answer: nginx reads the end of the stream with the answer
and does not put the connection into its pool, so no later call can meet it. Under load this empties the pools
within milliseconds. In runs of four restarts at 600 to 1,000 requests/s on overloaded cores, 16 to 146 calls
met an ended connection before, 2 to 7 since; StartInstance was among them 8 times in six runs, once in five.

Of an idle connection only our side is shut down, and what still arrives on it is read: the worst case is then
"closed". Idle ones are shut down one at a time, each after Kong has closed the previous one, so that the
StartInstance that follows a "closed" gets a connection that works. They go in the order of their last use,
oldest first: the last ones that the pool would give out.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Final

from openmeter_plugin.kong.server import Connection, Server

_POLL_SECONDS: Final = 0.001
_RACE_PAUSE_SECONDS: Final = 0.1
"""Delay of the next connection after Kong wrote to one that was shut down: Kong starts its instance then."""
_FINAL_SECONDS: Final = 0.25
"""Time at the end for Kong to close all connections that were left."""


class Pool:
    """The connections of one nginx worker."""

    def __init__(self, now: float, race_pause: float = _RACE_PAUSE_SECONDS) -> None:
        self.connections: list[Connection] = []
        self._closing: list[Connection] = []
        self._race_pause = race_pause
        self._began = now
        self._not_before = now
        self._round_seconds = 0.0

    def step(self, now: float, idle_deadline: float) -> None:
        """Shut the next idle connection down if the previous one is closed; several if time is short."""
        if self._closing:
            if any(connection.is_open for connection in self._closing):
                return
            self._round_seconds = now - self._began
            if any(connection.called_after_shutdown for connection in self._closing):
                self._not_before = now + self._race_pause
            self._closing = []
        if now < self._not_before:
            return
        idle = sorted((c for c in self.connections if c.is_idle), key=lambda c: c.last_used)
        rounds = (idle_deadline - now) / max(self._round_seconds, _POLL_SECONDS)
        chosen = idle[: math.ceil(len(idle) / max(rounds, 1.0))]
        self._closing = [connection for connection in chosen if not connection.has_unread]
        self._began = now
        for connection in self._closing:
            connection.shut_down()


async def drain(
    server: Server, seconds: float, idle_seconds: float, *, race_pause: float = _RACE_PAUSE_SECONDS
) -> None:
    """Finish calls under way and close all connections within `seconds`, idle ones within `idle_seconds`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds - _FINAL_SECONDS
    idle_deadline = min(loop.time() + idle_seconds, deadline)
    pools: dict[int, Pool] = {}
    server.stop()
    while server.connections and (now := loop.time()) < deadline:
        _assign(server.connections, pools, now, race_pause)
        for pool in pools.values():
            pool.step(now, idle_deadline)
        await asyncio.sleep(_POLL_SECONDS)
    for connection in list(server.connections):
        connection.shut_down()
    while server.connections and loop.time() < deadline + _FINAL_SECONDS:  # noqa: ASYNC110 - of many
        await asyncio.sleep(_POLL_SECONDS)


def _assign(connections: Iterable[Connection], pools: dict[int, Pool], now: float, race_pause: float) -> None:
    for pool in pools.values():
        pool.connections = []
    for connection in connections:
        pool = pools.setdefault(connection.peer_pid, Pool(now, race_pause))
        pool.connections.append(connection)
