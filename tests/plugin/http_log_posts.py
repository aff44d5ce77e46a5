"""Helpers for tests of the http-log input: posts of Kong's http-log plugin, and a running receiver."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import uvloop

from openmeter_plugin.http_log.config import CREDENTIAL, load
from openmeter_plugin.http_log.process import notifying
from openmeter_plugin.http_log.receiver import HttpLogServer
from openmeter_plugin.spool.destination import destination_id
from openmeter_plugin.spool.segment import Record
from openmeter_plugin.spool.writer import SpoolWriter
from tests.harness.recordings import WIRE
from tests.plugin.spools import items

TOKEN = "token-of-this-test"
SECRET = "shared-secret-of-the-recording"
ENDPOINT = "http://127.0.0.1:9/api/v1/events"  # nothing listens there
QUEUE = destination_id(ENDPOINT, CREDENTIAL)
HEADERS = {"x-metering-key": SECRET, "content-type": "application/json"}

ALICE = "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"


def recorded_posts() -> list[bytes]:
    """Return the two recorded requests, byte for byte."""
    lines = (WIRE / "http-log-posts.jsonl").read_text().splitlines()
    return [(p["request_head"] + p["body"]).encode() for p in map(json.loads, lines)]


def recorded_logs() -> list[dict[str, Any]]:
    """Return the logs of the first recorded post: a consumer's, an application's and a language model's."""
    logs: list[dict[str, Any]] = json.loads(recorded_posts()[0].partition(b"\r\n\r\n")[2])
    return logs


def log_of(request_id: str) -> bytes:
    """Return a consumer's log with another request id."""
    log = recorded_logs()[0]
    log["request"]["id"] = request_id
    return json.dumps(log, separators=(",", ":")).encode()


def batch(*request_ids: str) -> bytes:
    """Return the body that http-log posts for requests with these ids."""
    template, middle, end = log_of("REQUEST").partition(b"REQUEST")
    assert middle
    return b"[" + b",".join(template + request_id.encode() + end for request_id in request_ids) + b"]"


def configuration(
    endpoint: str = ENDPOINT, *, plugin: str = "", http_log: str = "", secret: str = SECRET
) -> str:
    secrets = f"secret: {secret}" if secret else "max_connections: 256"
    return f"""
ingest_endpoint: {endpoint}
api_token: {TOKEN}
queue:
  max_coalescing_delay: 0.05
{plugin}
http_log:
  {secrets}
{http_log}
"""


@dataclass
class Receiving:
    """A running receiver."""

    port: int
    spool: Path
    client: httpx.AsyncClient

    async def post(self, body: bytes | AsyncIterator[bytes], **headers: str) -> httpx.Response:
        """Post a body as http-log does."""
        all_headers = HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/ingest", content=body, headers=all_headers)

    def records(self) -> list[Record]:
        """The records in the spool."""
        return [item for item in items(self.spool, QUEUE) if isinstance(item, Record)]

    def ids(self) -> list[str]:
        """The ids of the events in the spool, in their order."""
        events = b",".join(record.events for record in self.records() if record.kind == b"E")
        return [event["id"] for event in orjson.loads(b"[" + events + b"]")]


@asynccontextmanager
async def receiving(
    directory: Path, *, http_log: str = "", plugin: str = "", secret: str = SECRET
) -> AsyncIterator[Receiving]:
    """Run a receiver with its spool below a directory."""
    file = directory / "openmeter-plugin.yaml"
    file.write_text(configuration(http_log=http_log, plugin=plugin, secret=secret))
    file.chmod(0o600)
    spool = directory / "spool"
    spool.mkdir()
    loop = asyncio.get_running_loop()
    writer = SpoolWriter(spool, notifying(loop))
    writer.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        receiver = HttpLogServer(socket.socket(fileno=os.dup(listener.fileno())), load(file, {}), writer)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                yield Receiving(port, spool, client)
        finally:
            await receiver.stop()
            await asyncio.to_thread(writer.close, 5)


def run(test: Any) -> None:
    """Run an async test on the worker's kind of event loop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test)


def post(port: int, body: bytes, *, seconds: float = 10.0) -> int:
    """Post a body and return the status, 0 if there was no answer."""
    try:
        url = f"http://127.0.0.1:{port}/"
        return httpx.post(url, content=body, headers=HEADERS, timeout=seconds, verify=False).status_code
    except httpx.ConnectError:
        raise
    except httpx.HTTPError:
        return 0
