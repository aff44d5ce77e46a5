"""What a restart of the plugin server costs a real Kong under traffic: requests answered, events arrived.

    python -m tests.bench.restarts [--how held --how replaced ...] [--restarts 5] [--rate 300] [--busy]

Every request that Kong answered is known by the id that Kong gave it, and so is every event, so that each
one that is missing or comes twice is seen. Needs `kong` in the PATH. How the server is restarted:

- held: stopped and started again, while a service manager holds its socket (as a systemd socket unit does);
- replaced: the next one is started on the same socket and spool, and serves, before the first is stopped;
- killed: `kill -9` of the supervisor, started again behind a held socket;
- worker, delivery: `kill -9` of that process, which the supervisor replaces;
- receiver: the same for the process that receives http-log's posts, with http-log in the plugin's place;
- reload: `kong reload`; the plugin server goes on.

`--rate 0` sends as much as is answered, more than can be metered while nobody serves; `--busy` keeps the
cores busy beside, so that everybody is late.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import yaml
from rich.console import Console
from rich.table import Table

from tests.bench.kong import KEY, External, kong, process
from tests.bench.processes import end_cleanly
from tests.demo.real_kong import KongMissing
from tests.harness.ports import free_port
from tests.harness.process import eventually
from tests.harness.service_manager import ServiceManager, unix_listener

_LANES: Final = 32
_BURNERS: Final = 4
_SETTLE_SECONDS: Final = 15.0
_SECRET: Final = "bench-secret-of-some-length"
_ERRORS: Final = {
    "broken pipe": "broken pipe",
    "reset": "connection reset by peer",
    "no timer": "timers are not enough",
    "claim": "could not claim instance_id",
    "start failed": "starting instance",
    "refused": "trying to connect",
    "retried": "[warn]",
}
"""What Kong's error log is searched for. It sends an event again where it warns."""


@dataclass
class Result:
    """What became of the requests; `seconds` are those that each stop and start took."""

    how: str
    restarts: int
    answered: list[str] = field(default_factory=list)
    lost: int = 0
    twice: int = 0
    worst_ms: float = 0.0
    stops: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)


class Running:
    """A plugin server, and the ways to restart it; each returns the seconds of the stop and of the start."""

    def __init__(self, directory: Path, endpoint: str) -> None:
        self._directory = directory
        self.socket = directory / "s"
        self._endpoint = endpoint
        self._server: ServiceManager | None = None
        self.kong = directory / "kong"

    @property
    def plugin(self) -> dict[str, Any]:
        """The plugin as Kong's configuration names it."""
        return {"name": "openmeter", "config": {"ingest_endpoint": self._endpoint}}

    def start(self, *, held: bool) -> None:
        """Start it, with a socket that is held for it or one of its own."""
        sockets = {"plugin": unix_listener(self.socket)} if held else {}
        self._server = ServiceManager(self._directory, sockets, ("--socket", str(self.socket)))
        self._start(self._server)

    def start_receiver(self) -> dict[str, Any]:
        """Start it with a receiver of http-log's posts beside; returns the plugin for Kong."""
        settings, address = self._directory / "openmeter-plugin.yaml", f"127.0.0.1:{free_port()}"
        http_log = {"secret": _SECRET}
        settings.write_text(yaml.safe_dump({"ingest_endpoint": self._endpoint, "http_log": http_log}))
        receiver = ("--http-log", address, "--http-log-config", str(settings))
        self._server = ServiceManager(self._directory, {}, ("--socket", str(self.socket), *receiver))
        self._start(self._server)
        queue = {"max_batch_size": 500, "max_entries": 1_000_000}
        config = {
            "http_endpoint": f"http://{address}",
            "headers": {"x-metering-key": _SECRET},
            "queue": queue,
        }
        return {"name": "http-log", "config": config}

    def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.end()
            for held in self._server.sockets.values():
                held.close()

    def _start(self, server: ServiceManager) -> float:
        serving, began = len(server.events("serving")), time.monotonic()
        server.start()
        eventually(lambda: len(server.events("serving")) > serving, seconds=60, what="serving")
        return time.monotonic() - began

    def _stop(self, server: ServiceManager, number: int) -> float:
        began = time.monotonic()
        server.end(number)
        return time.monotonic() - began

    def held(self, number: int = signal.SIGTERM) -> tuple[float, float]:
        """Stop it, and start it again behind the socket that is held."""
        assert self._server
        return self._stop(self._server, number), self._start(self._server)

    def killed(self) -> tuple[float, float]:
        """Kill it, and start it again behind the socket that is held."""
        return self.held(signal.SIGKILL)

    def replaced(self) -> tuple[float, float]:
        """Start the next one, and stop the first when that serves."""
        assert self._server
        first = self._server
        self._server = ServiceManager(self._directory, {}, first.arguments)
        started = self._start(self._server)
        return self._stop(first, signal.SIGTERM), started

    def worker(self) -> tuple[float, float]:
        """Kill the worker, which its supervisor replaces."""
        return self._killed("worker", "serving")

    def delivery(self) -> tuple[float, float]:
        """Kill the delivery process, which the supervisor replaces."""
        return self._killed("delivery", "delivery_started")

    def receiver(self) -> tuple[float, float]:
        """Kill the process that receives http-log's posts, which the supervisor replaces."""
        return self._killed("http-log", "serving")

    def _killed(self, process: str, started: str) -> tuple[float, float]:
        server = self._server
        assert server

        def starts() -> list[dict[str, object]]:
            return [entry for entry in server.events(started) if entry["process"] == process]

        before, began = starts(), time.monotonic()
        pid = before[-1]["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: len(starts()) > len(before), seconds=60, what=f"the next {process}")
        return 0.0, time.monotonic() - began

    def reload(self) -> tuple[float, float]:
        """Have Kong replace its nginx workers."""
        began = time.monotonic()
        command = ["kong", "reload", "-p", str(self.kong / "prefix"), "-c", str(self.kong / "kong.conf")]
        subprocess.run(command, check=True, capture_output=True)
        return 0.0, time.monotonic() - began


WAYS: Final[dict[str, Callable[[Running], tuple[float, float]]]] = {
    "held": Running.held,
    "replaced": Running.replaced,
    "killed": Running.killed,
    "worker": Running.worker,
    "delivery": Running.delivery,
    "receiver": Running.receiver,
    "reload": Running.reload,
}


class Load:
    """Requests on kept connections, at a rate or as many as are answered; notes the id of each."""

    def __init__(self, url: str, rate: float, result: Result) -> None:
        self._host, self._port = url.removeprefix("http://").split(":")
        self._rate, self._result = rate, result
        self._began = time.perf_counter()
        self._sent = 0
        self.done = False

    async def run(self) -> None:
        """Send until `done`."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_LANES if self._rate else 2 * _LANES):
                group.create_task(self._lane())

    async def _lane(self) -> None:
        while not self.done:
            reader, writer = await asyncio.open_connection(self._host, int(self._port))
            # An nginx worker that is replaced closes its kept connections.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._requests(reader, writer)
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = f"GET / HTTP/1.1\r\nhost: bench\r\napikey: {KEY}\r\n\r\n".encode()
        while not self.done:
            if self._rate:
                due = self._began + self._sent / self._rate
                self._sent += 1
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            began = time.perf_counter()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = re.search(r"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            self._result.worst_ms = max(self._result.worst_ms, (time.perf_counter() - began) * 1000)
            number = re.search(r"x-kong-request-id: ([0-9a-f]{32})", head)
            assert " 200 " in head, head
            assert number, head
            self._result.answered.append(number[1])


async def _drive(running: Running, load: Load, result: Result, pause: float) -> None:
    async def restarts() -> None:
        await asyncio.sleep(pause)
        for _ in range(result.restarts):
            stopped, started = await asyncio.to_thread(WAYS[result.how], running)
            result.stops.append(stopped)
            result.starts.append(started)
            await asyncio.sleep(pause)
        load.done = True

    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        group.create_task(restarts())


def run(how: str, restarts: int, rate: float, workers: int, pause: float, *, busy: bool) -> Result:
    """Restart a plugin server so many times while a Kong of its own meters with it; raises KongMissing."""
    if shutil.which("kong") is None:
        raise KongMissing("there is no `kong` in the PATH")
    result = Result(how, restarts)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        upstream, _ = stack.enter_context(process("tests.bench.upstream"))
        sink, _ = stack.enter_context(process("tests.bench.sink", "--ids"))
        running = Running(folder, f"{sink}/api/v1/events")
        stack.callback(running.close)
        plugin = running.plugin
        if how == "receiver":
            plugin = running.start_receiver()
        else:
            running.start(held=how != "replaced")
        servers = {"openmeter": External(running.socket)}
        routes = {"/": [plugin]}
        gateway = kong(running.kong, upstream, routes, servers, workers=workers, log_level="warn")
        url, _ = stack.enter_context(gateway)
        with _burning(_BURNERS if busy else 0):
            load = Load(url, rate, result)
            asyncio.run(_drive(running, load, result, pause))
        _count(result, sink, running.kong / "prefix" / "logs" / "error.log")
    return result


def _count(result: Result, sink: str, error_log: Path) -> None:
    answered = set(result.answered)

    def arrived() -> list[str]:
        return httpx.get(f"{sink}/ids", trust_env=False, timeout=60).text.split()

    with contextlib.suppress(AssertionError):
        eventually(lambda: answered <= set(arrived()), seconds=_SETTLE_SECONDS, what="the arrival")
    events = arrived()
    result.lost = len(answered - set(events))
    result.twice = len(events) - len(set(events))
    for line in error_log.read_text(errors="replace").lower().splitlines():
        result.errors.update(name for name, text in _ERRORS.items() if text in line)


@contextmanager
def _burning(processes: int) -> Iterator[None]:
    """Keep the cores busy, so that everybody is late."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def table(results: list[Result]) -> Table:
    """Return the results as a table."""
    shown = Table(title="Restarts under traffic", title_justify="left")
    for name in ("how", "restarts", "requests", "lost", "sent twice", "stop s", "start s", "worst ms"):
        shown.add_column(name, justify="right")
    shown.add_column("in Kong's log")
    for result in results:
        figures = (result.restarts, len(result.answered), result.lost, result.twice)
        shown.add_row(
            result.how,
            *(f"{figure:,}" for figure in figures),
            *(f"{min(part):.2f} - {max(part):.2f}" for part in (result.stops, result.starts)),
            f"{result.worst_ms:.0f}",
            ", ".join(f"{name} {count:,}" for name, count in sorted(result.errors.items())),
        )
    return shown


def main() -> int:
    """Measure and print; the exit status is 1 where something was lost."""
    options = argparse.ArgumentParser(prog="python -m tests.bench.restarts")
    options.add_argument("--how", action="append", choices=tuple(WAYS), help="(default: all, one by one)")
    options.add_argument("--restarts", type=int, default=5)
    options.add_argument("--rate", type=float, default=300.0, help="requests a second")
    options.add_argument("--busy", action="store_true", help="with other work for the cores")
    options.add_argument("--workers", type=int, default=2, help="nginx workers of Kong")
    options.add_argument("--pause", type=float, default=2.0, help="seconds between two restarts")
    options.add_argument("--json", action="store_true", help="print the figures as JSON lines")
    given = options.parse_args()
    end_cleanly()
    console = Console()
    results = []
    for how in given.how or tuple(WAYS):
        try:
            result = run(how, given.restarts, given.rate, given.workers, given.pause, busy=given.busy)
        except KongMissing as missing:
            console.print(f"error: {missing}")
            return 2
        results.append(result)
        if given.json:
            sys.stdout.write(json.dumps(vars(result) | {"answered": len(result.answered)}) + "\n")
    console.print(table(results))
    return int(any(result.lost for result in results))


if __name__ == "__main__":
    sys.exit(main())
