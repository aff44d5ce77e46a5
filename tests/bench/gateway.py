"""`make bench KONG=1`: what metering costs a real Kong, in pairs run one after the other.

Gateways with the same service behind key-auth are driven in turn: without any logging, with Kong's own
http-log, with the plugin, with http-log posting to the plugin's way in, and with a plugin server that does
nothing, to show what of the plugin's price is Kong's own. The machine's speed drifts by
more than the differences, so each round gives a ratio, and the median of the ratios counts. Each run has a
Kong of its own: what LuaJIT happens to compile makes one Kong twice as fast as another with the same
configuration, for as long as it lives. Kong has a core of its own where there are two: what else runs would
slow one gateway down more than another. Needs `kong` and `wrk` in the PATH.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.bench.processes import Sink, cpu_seconds, sink
from tests.demo.real_kong import KongMissing
from tests.harness.ports import free_port
from tests.harness.process import PluginServer, eventually, plugin_server

NONE, HTTP_LOG, PLUGIN, WAY_IN = "no logging", "http-log", "openmeter", "http-log to openmeter"
EMPTY = "an empty plugin server"
KEY = "bench-key"
_SECRET = "bench-secret-of-some-length"


@dataclass
class Gateway:
    """A Kong to be started, with the process that takes its logs, if there is one."""

    name: str
    start: Callable[[], AbstractContextManager[tuple[str, int]]]
    events: Callable[[], int] | None
    server: PluginServer | None = None
    sent: int = 0
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    server_us: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)


def run(
    rounds: int, seconds: int, concurrency: int, tell: Callable[[str], None]
) -> tuple[dict[str, Gateway], list[str]]:
    """Return the gateways with what was measured, and what is missing where; raises KongMissing."""
    for program in ("kong", "wrk"):
        if shutil.which(program) is None:
            raise KongMissing(f"there is no `{program}` in the PATH; make bench without KONG=1 needs none")
    kongs, *others = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.enter_context(_on({*others} or {kongs}))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        gateways = _start(stack, folder, {kongs})
        for number in range(rounds):
            for gateway in gateways.values():
                tell(f"round {number + 1} of {rounds}: {gateway.name}")
                _measure(gateway, seconds, concurrency)
        for gateway in gateways.values():
            tell(f"latency at a fixed rate: {gateway.name}")
            with gateway.start() as (url, _):
                _load(gateway, url, 1, concurrency)
                gateway.p99_ms.append(asyncio.run(_p99(gateway, url, rate=300, seconds=10)))
                _settle(gateway)
        return gateways, [text for g in gateways.values() if (text := _missing(g))]


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    """Run on these cores, and start what is started meanwhile there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _start(stack: ExitStack, folder: Path, cores: set[int]) -> dict[str, Gateway]:
    upstream = stack.enter_context(process("tests.bench.upstream"))
    logs, events = stack.enter_context(sink()), stack.enter_context(sink())
    way_in_events = stack.enter_context(sink())
    port = free_port()
    plugin_folder, way_in_folder = folder / "plugin", folder / "way-in"
    for directory in (plugin_folder, way_in_folder):
        directory.mkdir()
    server = stack.enter_context(plugin_server(plugin_folder))
    settings = way_in_folder / "openmeter-plugin.yaml"
    settings.write_text(
        yaml.safe_dump({"ingest_endpoint": way_in_events.endpoint, "http_log": {"secret": _SECRET}})
    )
    way_in = stack.enter_context(
        plugin_server(way_in_folder, "--http-log", f"127.0.0.1:{port}", "--http-log-config", str(settings))
    )
    openmeter = {"name": "openmeter", "config": {"ingest_endpoint": events.endpoint}}
    plugins: dict[str, list[dict[str, Any]]] = {
        NONE: [],
        HTTP_LOG: [_http_log(f"{logs.url}/logs")],
        PLUGIN: [openmeter],
        WAY_IN: [_http_log(f"http://127.0.0.1:{port}", {"x-metering-key": _SECRET})],
        EMPTY: [openmeter],
    }
    received: dict[str, tuple[Sink | None, PluginServer | None]] = {
        NONE: (None, None),
        HTTP_LOG: (logs, None),
        PLUGIN: (events, server),
        WAY_IN: (way_in_events, way_in),
        EMPTY: (None, None),
    }
    empty = folder / "empty.socket"
    stack.enter_context(process("tests.bench.empty_server", str(empty)))
    gateways = {}
    for name, listed in plugins.items():
        counter, taking = received[name]
        directory = folder / name.replace(" ", "-")
        socket = empty if name == EMPTY else server.socket
        start = partial(kong, directory, upstream, listed, socket, cores=cores)
        gateways[name] = Gateway(name, start, counter.received if counter else None, taking)
    return gateways


def _http_log(url: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    queue = {"max_batch_size": 500, "max_entries": 1_000_000}
    config: dict[str, Any] = {"http_endpoint": url, "queue": queue}
    return {"name": "http-log", "config": config | ({"headers": headers} if headers else {})}


@contextmanager
def kong(
    directory: Path,
    upstream: str,
    plugins: list[dict[str, Any]],
    socket: Path,
    *,
    workers: int = 1,
    log_level: str = "error",
    cores: set[int] | None = None,
) -> Iterator[tuple[str, int]]:
    """Run a Kong with a service behind key-auth, on these cores; yields its address and its pid."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    port = free_port()
    document = {
        "_format_version": "3.0",
        "services": [{"name": "s", "url": upstream, "routes": [{"name": "r", "paths": ["/"]}]}],
        "consumers": [{"username": "c", "keyauth_credentials": [{"key": KEY}]}],
        "plugins": [{"name": "key-auth"}, *plugins],
    }
    (directory / "kong.yml").write_text(yaml.safe_dump(document))
    info = Path(sys.executable).with_name("openmeter-plugin")
    (directory / "kong.conf").write_text(
        f"""
database = off
declarative_config = {directory}/kong.yml
plugins = key-auth, http-log, openmeter
proxy_listen = 127.0.0.1:{port}
proxy_access_log = off
admin_listen = off
status_listen = off
admin_gui_listen = off
anonymous_reports = off
nginx_worker_processes = {workers}
{"nginx_user = root root" if os.geteuid() == 0 else ""}
log_level = {log_level}
pluginserver_names = openmeter
pluginserver_openmeter_socket = {socket}
pluginserver_openmeter_query_cmd = {info} info
"""
    )
    prefix = directory / "prefix"
    with _on(cores or os.sched_getaffinity(0)):
        started = subprocess.run(
            ["kong", "start", "-p", str(prefix), "-c", str(directory / "kong.conf")],
            capture_output=True,
            text=True,
        )
    if started.returncode:
        raise KongMissing(f"kong does not start: {started.stderr.strip()}")
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: _answers(url), what="Kong's configuration")
        yield url, int((prefix / "pids" / "nginx.pid").read_text())
    finally:
        subprocess.run(["kong", "stop", "-p", str(prefix)], capture_output=True)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == httpx.codes.UNAUTHORIZED
    except httpx.TransportError:
        return False


def _load(gateway: Gateway, url: str, seconds: int, concurrency: int) -> int:
    """Drive the gateway at full speed and return how many requests it answered."""
    command = ["wrk", "-t1", f"-c{concurrency}", f"-d{seconds}", "-H", f"apikey: {KEY}", f"{url}/"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    done = re.search(r"(\d+) requests in", output)
    if done is None or "Non-2xx" in output:
        raise KongMissing(f"wrk did not reach {gateway.name}: {output}")
    gateway.sent += int(done[1])
    return int(done[1])


def _measure(gateway: Gateway, seconds: int, concurrency: int) -> None:
    with gateway.start() as (url, pid):
        _load(gateway, url, 1, concurrency)  # warmed up
        _settle(gateway)
        kong, server = cpu_seconds(pid), _server_cpu(gateway)
        started = time.perf_counter()
        requests = _load(gateway, url, seconds, concurrency)
        gateway.rates.append(requests / (time.perf_counter() - started))
        _settle(gateway)  # what is still queued belongs to this run
        gateway.cpu_us.append((cpu_seconds(pid) - kong) / requests * 1e6)
        gateway.server_us.append((_server_cpu(gateway) - server) / requests * 1e6)


def _settle(gateway: Gateway) -> None:
    """Wait until everything sent has arrived, or for long enough to know that it will not."""
    events = gateway.events
    if events is not None:
        with contextlib.suppress(AssertionError):
            eventually(lambda: events() >= gateway.sent, seconds=10, what="the arrival")


def _server_cpu(gateway: Gateway) -> float:
    return cpu_seconds(gateway.server.process.pid) if gateway.server else 0.0


async def _p99(gateway: Gateway, url: str, rate: int, seconds: int) -> float:
    """Return the 99th percentile of the latency in milliseconds; requests are due whatever comes back."""
    host, port = url.removeprefix("http://").split(":")
    request = f"GET / HTTP/1.1\r\nhost: bench\r\napikey: {KEY}\r\n\r\n".encode()
    due = iter([number / rate for number in range(rate * seconds)])
    latencies: list[float] = []
    began = time.perf_counter()

    async def lane() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for at in due:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            latencies.append(time.perf_counter() - began - at)
        writer.close()

    await asyncio.gather(*(lane() for _ in range(16)))
    gateway.sent += len(latencies)
    return statistics.quantiles(latencies, n=100)[98] * 1000


def _missing(gateway: Gateway) -> str | None:
    """Return what did not arrive; more may, of requests that wrk left under way at its end."""
    if gateway.events is None or (arrived := gateway.events()) >= gateway.sent:
        return None
    return f"{gateway.name}: {gateway.sent - arrived:,} of {gateway.sent:,} did not arrive"


@contextmanager
def process(module: str, *arguments: str) -> Iterator[str]:
    """Run one of our modules beside; yields the first line that it prints."""
    started = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    assert started.stdout
    try:
        yield started.stdout.readline().strip()
    finally:
        started.kill()
        started.wait()
        started.stdout.close()
