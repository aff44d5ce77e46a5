"""Kong's side of the ProtoBuf:1 protocol, as a real Kong 3.9.1 behaves (tests/data/kong-wire).

The fate of an event follows runloop/plugin_servers/rpc/pb_rpc.lua, plugin.lua and the sockets of
ngx_http_lua_socket_tcp.c, rule by rule:

- Connections are kept in a pool, last in, first out, and are not checked before use. One that ends while it
  is idle is closed when the event loop gets to it.
- A frame is written in two sends. If one fails ("broken pipe"), the event is lost: the send raises.
- If the stream ends where an answer is due ("closed"), all instances of the plugin are forgotten, and the
  event is resent. Any other error, such as "connection reset by peer", loses it.
- An instance is started by the first event that needs it; the others check every 0.1 s whether it is started,
  100 times at most. If its start ends with an error, that event is lost and another one starts it. If its
  start cannot be written, no event starts it until one of those that wait has given up.
"""

from __future__ import annotations

import asyncio
import socket as sockets
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from openmeter_plugin.kong import codec
from tests.harness.recordings import Recorded

_LENGTH = struct.Struct("<I")
_POOL_SIZE = 256  # lua_socket_pool_size
_CLAIM_STEP, _CLAIM_STEPS = 0.1, 100
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0  # Kong's own


class Closed(ConnectionError):
    """The server ended the stream where an answer was due: Kong resends the event."""


class BrokenOff(ConnectionError):
    """Kong failed over a PDK query: it closes the connection and does not resend the event."""


class NotWritten(ConnectionError):
    """The event could not be written, or its answer was cut off: Kong gives it up."""


class NotClaimed(ConnectionError):
    """No event has started the instance: Kong gives the event up."""


@dataclass
class PluginInstance:
    """A configured plugin; `config` is what Kong passes. `instance_id` is None until it is started."""

    config: dict[str, object]
    instance_id: int | None = None
    claimed: bool = False
    """Whether an event is starting it."""

    def encoded(self) -> bytes:
        """The configuration as Kong encodes it."""
        return orjson.dumps(self.config)


class Connection:
    """A connection to the plugin server."""

    def __init__(self, connected: sockets.socket) -> None:
        self.socket = connected
        self._received = b""

    async def read(self) -> bytes:
        """Return one frame; raises Closed, or NotWritten if the connection was reset."""
        (length,) = _LENGTH.unpack(await self._exactly(4))
        return await self._exactly(length)

    async def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                try:
                    data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
                except OSError as error:
                    raise NotWritten(error.strerror) from error
            except OSError as error:
                raise NotWritten(error.strerror) from error
            if not data:
                raise Closed
            self._received += data
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    async def write(self, message: bytes) -> None:
        """Write a frame as Kong does, its length first; raises NotWritten."""
        for part in (_LENGTH.pack(len(message)), message):
            try:
                sent = self.socket.send(part)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                raise NotWritten(error.strerror) from error
            if sent < len(part):
                try:
                    await asyncio.get_running_loop().sock_sendall(self.socket, part[sent:])
                except OSError as error:
                    raise NotWritten(error.strerror) from error


@dataclass
class Tally:
    """The fates of the events; the plugin server is responsible for an acknowledged one."""

    acknowledged: list[str] = field(default_factory=list)
    resent: int = 0
    lost: list[str] = field(default_factory=list)
    refused_connections: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """The reasons why events were lost."""


class KongWorker:
    """One nginx worker of Kong: its instances and its pool of connections."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.tally = Tally()
        self.sequence = 0
        self._idle: list[Connection] = []
        self._plugins: list[PluginInstance] = []

    async def close(self) -> None:
        """Close all connections."""
        for connection in list(self._idle):
            self._drop_idle(connection)

    @property
    def idle(self) -> int:
        """How many connections are in the pool."""
        return len(self._idle)

    def _drop_idle(self, connection: Connection) -> None:
        asyncio.get_running_loop().remove_reader(connection.socket)
        self._idle.remove(connection)
        connection.socket.close()

    def _keep(self, connection: Connection) -> None:
        def readable() -> None:
            try:
                connection.socket.recv(1)
            except BlockingIOError:
                return
            except OSError:
                pass
            self._drop_idle(connection)  # the end of the stream, or unexpected bytes

        # setkeepalive looks at the socket first: one that has ended with the answer never gets into the pool.
        try:
            connection.socket.recv(1, sockets.MSG_PEEK)
        except BlockingIOError:
            pass
        except OSError:
            connection.socket.close()
            return
        else:
            connection.socket.close()
            return
        if len(self._idle) >= _POOL_SIZE:
            self._drop_idle(self._idle[0])
        self._idle.append(connection)
        asyncio.get_running_loop().add_reader(connection.socket, readable)

    async def _take(self) -> Connection:
        if self._idle:
            connection = self._idle.pop()
            asyncio.get_running_loop().remove_reader(connection.socket)
            return connection
        connected = sockets.socket(sockets.AF_UNIX)
        connected.setblocking(False)
        try:
            connecting = asyncio.get_running_loop().sock_connect(connected, str(self.socket))
            await asyncio.wait_for(connecting, CONNECT_SECONDS)
        except (ConnectionError, FileNotFoundError) as error:
            connected.close()
            self.tally.refused_connections += 1
            raise NotWritten(error.strerror) from error
        return Connection(connected)

    def _next(self) -> int:
        self.sequence += 1
        return self.sequence

    async def start(self, plugin: PluginInstance, name: str = "openmeter") -> int:
        """Start an instance and return its id; raises ConnectionError."""
        body = codec.encode_bytes(1, name.encode()) + codec.encode_bytes(2, plugin.encoded())
        plugin.claimed = True
        try:
            connection = await self._take()
        except BaseException:
            plugin.claimed = False
            raise
        # From here on a raised error leaves the claim set, as Kong's `assert` does.
        try:
            await connection.write(_call(self._next(), 33, body))
            try:
                answer = await connection.read()
            except ConnectionError:
                plugin.claimed = False
                raise
        except BaseException:
            connection.socket.close()
            raise
        self._keep(connection)
        status = dict(codec._fields(dict(codec._fields(answer))[33]))  # type: ignore[arg-type]
        plugin.instance_id, plugin.claimed = int(status[2]), False
        return plugin.instance_id

    async def close_instance(self, instance_id: int) -> None:
        """Close an instance."""
        connection = await self._take()
        try:
            await connection.write(_call(self._next(), 35, b"\x08" + codec.encode_varint(instance_id)))
            await connection.read()
        except BaseException:
            connection.socket.close()
            raise
        self._keep(connection)

    async def log(self, plugin: PluginInstance, request: Recorded, tag: str = "") -> bool:
        """Hand a request over; returns whether the plugin server acknowledged it."""
        if plugin not in self._plugins:
            self._plugins.append(plugin)
        used: list[Connection] = []  # Kong closes failed ones when it has finished the event
        try:
            while True:
                instance_id = await self._instance_id(plugin)
                try:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        await self._log_once(instance_id, request, used)
                except Closed:
                    for known in self._plugins:
                        known.instance_id = None
                    self.tally.resent += 1
                else:
                    self.tally.acknowledged.append(tag)
                    return True
        except ConnectionError as error:
            self.tally.lost.append(tag)
            self.tally.reasons[f"{type(error).__name__} {error}"] += 1
            return False
        finally:
            for connection in used:
                connection.socket.close()

    async def _instance_id(self, plugin: PluginInstance) -> int:
        waited = 0
        while plugin.claimed:
            await asyncio.sleep(_CLAIM_STEP)
            waited += 1
            if waited > _CLAIM_STEPS:
                plugin.claimed = False
                raise NotClaimed
        if plugin.instance_id is not None:
            return plugin.instance_id
        try:
            return await self.start(plugin)
        except Closed as error:
            raise NotWritten("closed over StartInstance") from error

    async def _log_once(self, instance_id: int, request: Recorded, used: list[Connection]) -> None:
        connection = await self._take()
        used.append(connection)
        event = codec.encode_bytes(2, b"log") + b"\x08" + codec.encode_varint(instance_id)
        await connection.write(_call(self._next(), 36, event))
        while method := await connection.read():
            await connection.read()
            if method == b"kong.log.serialize":
                await connection.write(codec.encode_bytes(1, request.log))
            elif method == b"kong.request.get_uri_captures":
                if request.captures is None:
                    raise BrokenOff
                await connection.write(request.captures)
            else:
                assert method == b"kong.ctx.shared.get"
                await connection.write(request.application)
        await connection.read()
        used.remove(connection)
        self._keep(connection)


def _call(sequence: int, number: int, body: bytes) -> bytes:
    return b"\x08" + codec.encode_varint(sequence) + codec.encode_bytes(number, body)


async def drive(
    worker: KongWorker,
    requests: Iterable[tuple[PluginInstance, Recorded, str]],
    concurrency: int,
) -> None:
    """Hand the requests over, `concurrency` at a time; each has a tag for the tally."""
    pending = iter(requests)

    async def lane() -> None:
        for plugin, request, tag in pending:
            await worker.log(plugin, request, tag)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(lane())
