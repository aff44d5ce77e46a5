"""How long the plugin's RPC takes while the same worker receives the largest posts of http-log.

One connection hands over a request each 2 ms, as a gateway of 500 requests a second does, while another
process posts bodies of 14 MB without a pause: thousands of logs, a single log with one enormous text, a
single log with a text full of escapes, and a single log with a million small values in it.

    make bench ARGS="--only beside --seconds 10"
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console
from rich.table import Table

from tests.bench.driver import ProtoBuf, connect
from tests.bench.goals import Goal
from tests.bench.processes import sink
from tests.harness.ports import free_port
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import serialized

SIZE = 14_000_000
_BOUND_MS = 20.0
EVERY = 0.002
"""Seconds from one request to the next."""

_POSTER = """
import socket, sys
port, body = int(sys.argv[1]), open(sys.argv[2], "rb").read()
head = b"POST / HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n"
head += b"Content-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n"
with socket.create_connection(("127.0.0.1", port)) as connection:
    while True:
        connection.sendall(head % len(body) + body)
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        print(".", flush=True)
"""


def ordinary() -> bytes:
    """Return thousands of logs of consumers, each with an id of its own."""
    protocol = ProtoBuf()
    count = SIZE // (protocol.log_size + 1)
    return b"[" + b",".join(protocol.log(number) for number in range(count)) + b"]"


def with_field(value: object) -> bytes:
    """Return one log with an enormous field, as a custom field or an AI payload is."""
    log = orjson.loads(serialized("authenticated").log)
    return orjson.dumps([log | {"payload": value}])


BODIES: dict[str, Callable[[], bytes]] = {
    "thousands of ordinary logs": ordinary,
    "one log, one plain text": lambda: with_field("x" * SIZE),
    "one log, JSON in a text": lambda: with_field('{"role": "user"}, ' * (SIZE * 7 // 10 // 16)),
    "one log, small values": lambda: with_field([{"n": n} for n in range(SIZE // 14)]),
}


@dataclass
class Beside:
    """Milliseconds that each request took, and how many posts were answered meanwhile."""

    waits: list[float]
    posts: int = 0

    def quantile(self, part: float) -> float:
        """Return what so large a part of the requests stayed under."""
        return sorted(self.waits)[min(len(self.waits) - 1, int(len(self.waits) * part))]


def rpc(path: Path, endpoint: str, seconds: float) -> list[float]:
    """Hand requests over, one each EVERY seconds, and return the milliseconds that each took."""
    protocol = ProtoBuf()
    waits: list[float] = []
    with connect(path) as connection:
        protocol.start(connection, {"ingest_endpoint": endpoint, "__plugin_id": "beside"})
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            hand_over(connection, protocol, len(waits))
            waits.append((time.perf_counter() - started) * 1000)
            time.sleep(max(0.0, started + EVERY - time.perf_counter()))
    return waits


def hand_over(connection: socket.socket, protocol: ProtoBuf, number: int) -> None:
    """Hand one request over and wait for its answer."""
    connection.sendall(protocol.event(number))
    received = b""
    while (answer := protocol.answer(received, number)) != b"":
        if answer is not None:
            connection.sendall(answer)
            received = b""
        received += connection.recv(65536)


@contextmanager
def posting(port: int, body: bytes) -> Iterator[Callable[[], int]]:
    """Post a body again and again in a process of its own; yields what tells how often so far."""
    with tempfile.NamedTemporaryFile() as file, tempfile.TemporaryFile() as answers:
        file.write(body)
        file.flush()
        process = subprocess.Popen([sys.executable, "-c", _POSTER, str(port), file.name], stdout=answers)
        try:
            yield lambda: answers.seek(0, 2) // 2
        finally:
            assert process.poll() is None, "the posts were not answered"
            process.kill()
            process.wait()


@contextmanager
def serving(endpoint: str) -> Iterator[tuple[PluginServer, int]]:
    """Run a plugin server with both ways in and one worker."""
    with tempfile.TemporaryDirectory() as directory:
        port, config = free_port(), Path(directory) / "openmeter-plugin.yaml"
        config.write_text(f"ingest_endpoint: {endpoint}\n")
        ways = ("--http-log", f"127.0.0.1:{port}", "--http-log-config", str(config))
        with plugin_server(Path(directory), *ways) as server:
            eventually(lambda: '"serving"' in server.log_text(), what="serving")
            yield server, port


def measure(seconds: float, tell: Callable[[str], None]) -> dict[str, Beside]:
    """Return the waits without any post, and beside each kind of body."""
    results: dict[str, Beside] = {}
    with sink() as endpoint:
        with serving(endpoint.endpoint) as (server, _):
            tell("no post")
            results["no post"] = Beside(rpc(server.socket, endpoint.endpoint, seconds))
        for name, body in BODIES.items():
            tell(name)
            with serving(endpoint.endpoint) as (server, port), posting(port, body()) as posts:
                eventually(lambda: posts() >= 1, seconds=60, what="the first answer")
                before = posts()
                waits = rpc(server.socket, endpoint.endpoint, seconds)
                results[name] = Beside(waits, posts() - before)
    return results


def table(results: dict[str, Beside]) -> Table:
    """Return the results as a table."""
    shown = Table(title=f"RPC beside posts of {SIZE / 1e6:.0f} MB", title_justify="left")
    shown.add_column("beside")
    for name in ("posts", "requests", "p50 ms", "p99 ms", "max ms"):
        shown.add_column(name, justify="right")
    for name, beside in results.items():
        waits = beside.waits
        figures = (statistics.median(waits), beside.quantile(0.99), max(waits))
        shown.add_row(name, str(beside.posts), f"{len(waits):,}", *(f"{ms:.1f}" for ms in figures))
    return shown


def run(seconds: float, console: Console, tell: Callable[[str], None]) -> Goal:
    """Measure, print the table, and return the goal."""
    results = measure(seconds, tell)
    console.print(table(results))
    worst = max(beside.quantile(0.99) for beside in results.values())
    what = f"p99 of the plugin's calls beside http-log posts of {SIZE / 1e6:.0f} MB"
    return Goal(what, f"{_BOUND_MS:.0f} ms or less", f"{worst:.1f} ms", worst <= _BOUND_MS)
