"""Kong's side of the ProtoBuf:1 protocol, as a real Kong 3.9.1 behaves (tests/data/kong-wire).

What matters of it: connections are kept and each event uses one; an instance is started at its first
event; an event whose connection was closed resets the instance and is sent again on another connection;
one that could not be written ("broken pipe", "connection reset") is not.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from openmeter_plugin import wire
from tests.harness.recordings import Recorded

_LENGTH = struct.Struct("<I")
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0  # Kong's own


class Closed(ConnectionError):
    """The server closed the connection where an answer was due: Kong sends the event again."""


class BrokenOff(ConnectionError):
    """Kong failed over a question: it closes the connection, and the event is done with for it."""


class NotWritten(ConnectionError):
    """The event could not be written: Kong gives it up."""


@dataclass
class PluginInstance:
    """A configured plugin; `config` is what Kong passes. `instance_id` is None until it is started."""

    config: dict[str, object]
    instance_id: int | None = None

    def encoded(self) -> bytes:
        """The configuration as Kong encodes it."""
        return orjson.dumps(self.config)


@dataclass
class Connection:
    """A kept connection to the plugin server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def read(self) -> bytes:
        """Return one frame; raises Closed, or NotWritten where the connection broke under what we wrote."""
        try:
            (length,) = _LENGTH.unpack(await self.reader.readexactly(4))
            return await self.reader.readexactly(length) if length else b""
        except asyncio.IncompleteReadError as error:
            raise Closed from error
        except ConnectionError as error:
            raise NotWritten from error

    def write(self, *messages: bytes) -> None:
        """Write frames; raises NotWritten."""
        if self.writer.is_closing():
            raise NotWritten
        self.writer.write(b"".join(wire.frame(m) for m in messages))


@dataclass
class Tally:
    """What became of the events: an acknowledged one is the plugin server's from then on."""

    acknowledged: list[str] = field(default_factory=list)
    resent: int = 0
    lost: list[str] = field(default_factory=list)
    refused_connections: int = 0


class KongWorker:
    """One nginx worker of Kong: its instances and its pool of connections."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.tally = Tally()
        self.sequence = 0
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    async def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.writer.close()
        self._idle = []

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        connection = self._idle.pop() if self._idle else await self._connect()
        try:
            yield connection
        except BaseException:
            connection.writer.close()
            raise
        self._idle.append(connection)

    async def _connect(self) -> Connection:
        try:
            opened = asyncio.open_unix_connection(str(self.socket), limit=2**26)
            reader, writer = await asyncio.wait_for(opened, CONNECT_SECONDS)
        except (ConnectionError, FileNotFoundError):
            self.tally.refused_connections += 1
            raise
        return Connection(reader, writer)

    def _next(self) -> int:
        self.sequence += 1
        return self.sequence

    async def start(self, plugin: PluginInstance, name: str = "openmeter") -> int:
        """Start an instance and return its id."""
        body = wire.encode_bytes(1, name.encode()) + wire.encode_bytes(2, plugin.encoded())
        async with self._connection() as connection:
            connection.write(_call(self._next(), 33, body))
            answer = await connection.read()
        status = dict(wire._fields(dict(wire._fields(answer))[33]))  # type: ignore[arg-type]
        plugin.instance_id = int(status[2])
        return plugin.instance_id

    async def close_instance(self, instance_id: int) -> None:
        """Close an instance."""
        async with self._connection() as connection:
            connection.write(_call(self._next(), 35, b"\x08" + wire.encode_varint(instance_id)))
            await connection.read()

    async def log(self, plugin: PluginInstance, request: Recorded, tag: str = "") -> bool:
        """Hand a request over; returns whether the plugin server acknowledged it."""
        while True:
            try:
                if plugin.instance_id is None:
                    await self.start(plugin)
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._log_once(plugin, request)
            except Closed:
                # Kong resets the instance and sends the event again.
                plugin.instance_id = None
                self.tally.resent += 1
            except (NotWritten, ConnectionError):
                self.tally.lost.append(tag)
                return False
            else:
                self.tally.acknowledged.append(tag)
                return True

    async def _log_once(self, plugin: PluginInstance, request: Recorded) -> None:
        assert plugin.instance_id is not None
        async with self._connection() as connection:
            event = wire.encode_bytes(2, b"log") + b"\x08" + wire.encode_varint(plugin.instance_id)
            connection.write(_call(self._next(), 36, event))
            while method := await connection.read():
                await connection.read()
                if method == b"kong.log.serialize":
                    connection.write(wire.encode_bytes(1, request.log))
                elif method == b"kong.request.get_uri_captures":
                    if request.captures is None:
                        raise BrokenOff
                    connection.write(request.captures)
                else:
                    assert method == b"kong.ctx.shared.get"
                    connection.write(request.application)
            await connection.read()


def _call(sequence: int, number: int, body: bytes) -> bytes:
    return b"\x08" + wire.encode_varint(sequence) + wire.encode_bytes(number, body)


async def drive(
    worker: KongWorker,
    requests: Iterable[tuple[PluginInstance, Recorded, str]],
    concurrency: int,
) -> None:
    """Hand the requests over, so many at a time; each comes with a tag for the tally."""
    pending = iter(requests)

    async def lane() -> None:
        for plugin, request, tag in pending:
            await worker.log(plugin, request, tag)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(lane())
