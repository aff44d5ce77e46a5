"""A server of Kong's plugin protocol in the test's own process, with Kong's ends of its connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.instances.worker_sync import WorkerSync
from openmeter_plugin.kong import codec
from openmeter_plugin.kong.connections import Connections, Link
from openmeter_plugin.kong.server import MAX_INCOMPLETE, Connection, Server
from openmeter_plugin.spool.writer import SpoolWriter
from tests.bench.driver import ProtoBuf
from tests.plugin.spools import running_writer


class Serving:
    """A server in this process, with connections that a test holds the other ends of."""

    def __init__(
        self, spool: Path, writer: SpoolWriter, worker_sync: WorkerSync | None, max_incomplete: int
    ) -> None:
        self.loop = asyncio.get_running_loop()
        instances = Instances(InstanceIds(spool), writer)
        self.server = Server(instances, writer, self.loop, worker_sync, max_incomplete=max_incomplete)
        self.connections = Connections(self.loop, self.server.flush)
        self.instance = self.server.instances.start(b'{"ingest_endpoint": "http://127.0.0.1:9/events"}')
        self.protocol = ProtoBuf()
        self.handlers: list[Connection] = []
        call = codec.encode_bytes(2, b"log") + b"\x08" + codec.encode_varint(self.instance.id)
        self.event = b"\x08\x07" + codec.encode_bytes(36, call)

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)

        def handler(link: Link) -> Connection:
            self.handlers.append(self.server.connection(link))
            return self.handlers[-1]

        self.connections.add(ours, handler)
        return theirs

    async def expect(self, peer: socket.socket, size: int) -> bytes:
        data = b""
        while len(data) < size and (part := await self.loop.sock_recv(peer, size - len(data))):
            data += part
        return data

    async def begin(self, peer: socket.socket) -> None:
        peer.send(codec.frame(self.event))
        assert await self.expect(peer, len(codec.QUERY_LOG)) == codec.QUERY_LOG

    async def finish(self, peer: socket.socket) -> None:
        peer.send(codec.frame(codec.encode_bytes(1, self.protocol.log(1))))
        end = codec.END_OF_EVENT + codec.encode_return(7)
        assert await self.expect(peer, len(end)) == end


def serve(
    tmp_path: Path,
    test: Callable[[Serving], Awaitable[None]],
    *,
    worker_sync: WorkerSync | None = None,
    max_incomplete: int = MAX_INCOMPLETE,
) -> None:
    """Run a test on an event loop of its own, beside the threads of a writer."""

    async def body(writer: SpoolWriter) -> None:
        serving = Serving(tmp_path, writer, worker_sync, max_incomplete)
        try:
            await asyncio.wait_for(test(serving), 20)
        finally:
            serving.connections.close()

    def committed(tokens: list[Any]) -> None:
        loop.call_soon_threadsafe(Server.committed, tokens)

    with running_writer(tmp_path, committed) as writer:
        loop = uvloop.new_event_loop()
        loop.run_until_complete(body(writer))
        loop.close()
