"""A real Kong around a node with a gate: the plugin on one route, post-function on another, and http-log."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from openmeter_plugin.config.gate_lua import FOLDER, NAME, gate_files, post_function
from tests.bench.kong import process, started
from tests.plugin.gate.test_process import Node, eventually

PATHS: Final = {"plugin": "/plugin", "post-function": "/post"}
"""The route of each shell."""
_PAUSE: Final = 0.01
_LONGEST: Final = 10.0


def consumer_id(name: str) -> str:
    """Return the id of a consumer in Kong, which is made of its name."""
    return f"{name.encode().hex()[:8]:0<8}-0000-4000-8000-{name.encode().hex()[8:20]:0<12}"


def document(socket: Path, upstream: str, http_log: str, consumers: Sequence[str]) -> dict[str, Any]:
    """Return Kong's declarative configuration."""
    shells = {
        "plugin": {"name": NAME, "config": {"socket": str(socket)}},
        "post-function": {"name": "post-function", "config": {"access": [post_function(str(socket))]}},
    }
    queue = {"max_batch_size": 500, "max_coalescing_delay": 0.1}
    return {
        "_format_version": "3.0",
        "services": [
            {
                "name": "api",
                "url": upstream,
                "routes": [
                    {"name": shell, "paths": [path], "plugins": [shells[shell]]}
                    for shell, path in PATHS.items()
                ],
            }
        ],
        "consumers": [
            {"username": name, "id": consumer_id(name), "keyauth_credentials": [{"key": name}]}
            for name in consumers
        ],
        "plugins": [
            {"name": "key-auth"},
            {"name": "http-log", "config": {"http_endpoint": http_log, "queue": queue}},
        ],
    }


@dataclass
class Kong:
    """A running Kong."""

    url: str
    folder: Path

    def get(self, name: str, shell: str = "plugin") -> httpx.Response:
        """Send a request of a consumer."""
        url = self.url + PATHS[shell]
        return httpx.get(url, headers={"apikey": name}, timeout=30, trust_env=False)

    def command(self, *words: str) -> None:
        """Run a command of Kong's."""
        where = ["-p", str(self.folder / "prefix")]
        if "stop" not in words:
            where += ["-c", str(self.folder / "kong.conf")]
        subprocess.run(["kong", *words, *where], check=True, capture_output=True)

    def restart(self) -> None:
        """Start Kong anew: its shared dict is empty then."""
        self.command("stop")
        self.command("start")
        eventually(self.answers)

    def answers(self) -> bool:
        """Return whether Kong has its configuration; the request reaches no gate."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + "/plugin", trust_env=False).status_code == httpx.codes.UNAUTHORIZED
        return False

    def workers(self) -> list[int]:
        """Return the pids of nginx's workers."""
        master = int((self.folder / "prefix/pids/nginx.pid").read_text())
        return [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()]


@contextmanager
def kong(node: Node, consumers: Sequence[str], workers: int = 2) -> Iterator[Kong]:
    """Run a Kong whose gate and http-log input are those of a node."""
    files = node.folder / "lua" / FOLDER
    files.mkdir(parents=True, exist_ok=True)
    for name, text in gate_files().items():
        (files / name).write_text(text)
    folder = node.folder / "kong"
    settings = [
        f"lua_package_path = {node.folder}/lua/?.lua;;",
        "nginx_http_lua_shared_dict = openmeter_gate 10m",
        f"nginx_worker_processes = {workers}",
    ]
    names = ["key-auth", "http-log", "post-function", NAME]
    with process("tests.bench.upstream") as (upstream, _):
        configuration = document(node.socket, upstream, f"http://127.0.0.1:{node.port}/", consumers)
        with started(folder, configuration, names, settings) as port:
            made = Kong(f"http://127.0.0.1:{port}", folder)
            eventually(made.answers)
            yield made


@dataclass
class Lane:
    """Requests of one consumer on one route, one after the other on a kept connection."""

    shell: str
    consumer: str
    statuses: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each of these answers was there, by the monotonic clock."""
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)
    closed: int = 0
    """Kept connections that Kong closed between two requests, as an nginx worker that is replaced does."""


class Traffic:
    """Requests of several consumers through both shells, until stopped."""

    def __init__(self, kong: Kong, consumers: Sequence[str], pause: float = _PAUSE) -> None:
        self._pause = pause
        self.lanes = [Lane(shell, consumer) for shell in PATHS for consumer in consumers]
        self._host, self._port = kong.url.removeprefix("http://").split(":")
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send no more requests, and wait for the answers of those under way."""
        self._done.set()
        self._thread.join()

    def statuses(self, consumer: str, since: int = 0) -> dict[str, set[int]]:
        """Return the statuses that a consumer got by shell, without so many of the first."""
        return {lane.shell: set(lane.statuses[since:]) for lane in self.lanes if lane.consumer == consumer}

    def failures(self) -> list[str]:
        """Return what failed."""
        return [failure for lane in self.lanes for failure in lane.failures]

    def closed(self) -> int:
        """Return how many kept connections Kong closed."""
        return sum(lane.closed for lane in self.lanes)

    def slowest(self) -> float:
        """Return the seconds of the slowest answer."""
        return max(lane.slowest for lane in self.lanes)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for lane in self.lanes:
                group.create_task(self._drive(lane))

    async def _drive(self, lane: Lane) -> None:
        path = PATHS[lane.shell]
        request = f"GET {path} HTTP/1.1\r\nhost: api\r\napikey: {lane.consumer}\r\n\r\n".encode()
        while not self._done.is_set():
            reader, writer = await asyncio.open_connection(self._host, int(self._port))
            before = len(lane.statuses)
            try:
                await self._requests(lane, request, reader, writer)
            except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
                partial = isinstance(error, TimeoutError) or bool(getattr(error, "partial", b""))
                if partial or len(lane.statuses) == before:
                    lane.failures.append(f"{lane.shell}: {error!r}")
                else:
                    lane.closed += 1
            finally:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    async def _requests(
        self, lane: Lane, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while not self._done.is_set():
            began = time.monotonic()
            writer.write(request)
            async with asyncio.timeout(_LONGEST):
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = re.search(r"content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
            lane.slowest = max(lane.slowest, time.monotonic() - began)
            lane.times.append(time.monotonic())
            lane.statuses.append(int(head.split(" ", 2)[1]))
            if "connection: close" in head:
                return
            await asyncio.sleep(self._pause)
