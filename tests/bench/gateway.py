"""`make bench KONG=1`: what metering costs a real Kong, against the floor of any external plugin.

One Kong per round has a route for each way to meter: none, a plugin server that is only called, one that also
asks for the serialized log and drops it (the yardstick: every metering plugin has to ask for it), the plugin,
the plugin in Lua with a reader of its segments, Kong's own http-log, and http-log posting to the plugin's
receiver. The ways are driven in turn, in an order that rotates, a second or so at a time; each is divided by
the yardstick of the same round (the Lua plugin by no metering), and the median of these ratios counts.

The reader of the segments is stopped while requests run, and reads in the pause after them; its CPU counts.
On two cores it would take what wrk and the upstream need to keep Kong busy, and the requests/s would be
theirs.

They share a Kong because what LuaJIT happens to compile makes one Kong up to twice as fast as another with
the same configuration, for as long as it lives; each round has a new one, so that this is drawn again. Kong
has a core of its own where there are two: what else runs would slow one way down more than another. Needs
`kong` and `wrk` in the PATH.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import yaml
from rich.console import Console
from rich.table import Table

from tests.bench import empty_server
from tests.bench.goals import Goal
from tests.bench.kong import KEY, External, Lua, database, kong, on_cores, process
from tests.bench.plugin import CONCURRENCY
from tests.bench.processes import cpu_seconds, sink, tree
from tests.demo.real_kong import KongMissing
from tests.harness.ports import free_port
from tests.harness.process import eventually, plugin_server

NONE: Final = "no metering"
CALL: Final = "empty, call only"
YARDSTICK: Final = "empty, call and log"
PLUGIN: Final = "openmeter"
HTTP_LOG: Final = "http-log"
RECEIVER: Final = "http-log to openmeter"
LUA: Final = "openmeter in Lua"

_SECRET = "bench-secret-of-some-length"
_WARM_UP: Final = 1  # seconds
_LEAST_RATE: Final = 0.97
_MAX_CPU: Final = 1.03
_LUA_RATE: Final = 0.85
_LUA_CPU: Final = 10
_READER_CPU: Final = 25


@dataclass
class Way:
    """One way to meter: its route, who counts what arrives, and what was measured."""

    path: str
    plugins: list[dict[str, Any]]
    events: Callable[[], int] | None = None
    server: int | None = None
    reads_behind: bool = False
    sent: int = 0
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    server_us: list[float] = field(default_factory=list)
    p99_ms: float = 0.0
    concurrency: int = CONCURRENCY

    def missing(self) -> int:
        """Return how many did not arrive; more may, of requests that wrk left under way at its end."""
        return max(0, self.sent - self.events()) if self.events else 0


@dataclass
class Used:
    """What one way took in one round: requests, seconds, and CPU seconds in Kong and in its server."""

    requests: int = 0
    elapsed: float = 0.0
    kong: float = 0.0
    server: float = 0.0


def run(
    rounds: int,
    seconds: int,
    tell: Callable[[str], None],
    concurrency: int = CONCURRENCY,
    workers: int = 1,
    *,
    only_lua: bool = False,
    one_core: bool = False,
    postgres: bool = False,
) -> tuple[dict[str, Way], dict[str, int]]:
    """Return the ways with what was measured, and how many events are missing where; raises KongMissing.

    With `only_lua` Kong has only the routes that the Lua plugin is compared with, and no plugin server; no
    latency is measured. With `one_core` Kong, clients and upstream share a core: Kong's CPU time is then
    without what it costs to wake a process on another core, which on a virtual machine exceeds the plugin.
    """
    for program in ("kong", "wrk"):
        if shutil.which(program) is None:
            raise KongMissing(f"there is no `{program}` in the PATH; make bench without KONG=1 needs none")
    kongs, *others = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        cores = {kongs}
        if one_core:
            others = []
        if workers == 1 or one_core:
            stack.enter_context(on_cores({*others} or {kongs}))
        else:
            cores |= {*others}
        if postgres:
            stack.enter_context(database())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        ways, start = _start(stack, folder, cores, workers, only_lua=only_lua, postgres=postgres)
        for way in ways.values():
            way.concurrency = concurrency
        for number in range(rounds):
            with start() as (url, pid):
                tell(f"round {number + 1} of {rounds}")
                _round(ways, url, pid, seconds, number)
        if not only_lua:
            with start() as (url, _):
                _latencies(ways, url, tell)
        return ways, {name: missing for name, way in ways.items() if (missing := way.missing())}


def _latencies(ways: dict[str, Way], url: str, tell: Callable[[str], None]) -> None:
    for name, way in ways.items():
        tell(f"latency at a fixed rate: {name}")
        _load(way, url, _WARM_UP)
        way.p99_ms = asyncio.run(_p99(way, url, rate=300, seconds=10))
        _settle(way)


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _start(
    stack: ExitStack, folder: Path, cores: set[int], workers: int, *, only_lua: bool, postgres: bool
) -> tuple[dict[str, Way], Callable[[], AbstractContextManager[tuple[str, int]]]]:
    """Start all but Kong; returns the ways and what starts a Kong for them."""
    upstream, _ = stack.enter_context(process("tests.bench.upstream"))
    logs, events, posted, read = (stack.enter_context(sink()) for _ in range(4))
    port = free_port()
    plugin_folder, receiver_folder, lua_folder = (folder / name for name in ("plugin", "receiver", "lua"))
    for directory in (plugin_folder, receiver_folder, lua_folder):
        directory.mkdir()
    server = stack.enter_context(plugin_server(plugin_folder))
    settings = receiver_folder / "openmeter-plugin.yaml"
    settings.write_text(yaml.safe_dump({"ingest_endpoint": posted.endpoint, "http_log": {"secret": _SECRET}}))
    receiver = stack.enter_context(
        plugin_server(receiver_folder, "--http-log", f"127.0.0.1:{port}", "--http-log-config", str(settings))
    )
    memory = Path("/dev/shm")
    place = stack.enter_context(tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None))
    lua = Lua(lua_folder / "files", Path(place) / "segments")
    lua.write()
    reader = stack.enter_context(plugin_server(lua_folder, "--segments", str(lua.segments)))
    openmeter = {"name": "openmeter", "config": {"ingest_endpoint": events.endpoint}}
    to_receiver = _http_log(f"http://127.0.0.1:{port}", {"x-metering-key": _SECRET})
    ways = {NONE: Way("/none", [])}
    empties: dict[str, External] = {}
    for name, plugin in ((CALL, empty_server.CALL), (YARDSTICK, empty_server.LOG)):
        empties[plugin], ways[name] = _empty(stack, folder, plugin)
    in_lua = {"name": lua.name, "config": {"ingest_endpoint": read.endpoint}}
    ways |= {
        LUA: Way("/lua", [in_lua], read.received, reader.process.pid, reads_behind=True),
        PLUGIN: Way("/openmeter", [openmeter], events.received, server.process.pid),
        HTTP_LOG: Way("/http-log", [_http_log(f"{logs.url}/logs")], logs.received),
        RECEIVER: Way("/receiver", [to_receiver], posted.received, receiver.process.pid),
    }
    if only_lua:
        ways = {name: ways[name] for name in (NONE, LUA, HTTP_LOG)}
    routes = {way.path: way.plugins for way in ways.values()}
    servers = {name.replace("-", "_"): external for name, external in empties.items()}
    servers["openmeter"] = External(server.socket)
    if only_lua:  # `kong config db_import` fails with a plugin server (Kong 3.9.1)
        servers = {}
    return ways, partial(
        kong,
        folder / "kong",
        upstream,
        routes,
        servers,
        cores=cores,
        workers=workers,
        lua=lua,
        postgres=postgres,
    )


def _empty(stack: ExitStack, folder: Path, plugin: str) -> tuple[External, Way]:
    """Run an empty server for this plugin."""
    socket, count, info = (folder / f"{plugin}.{suffix}" for suffix in ("socket", "count", "json"))
    _, pid = stack.enter_context(process("tests.bench.empty_server", str(socket), str(count)))
    info.write_text(empty_server.info(plugin))
    way = Way(f"/{plugin}", [{"name": plugin}], partial(empty_server.counted, count), pid)
    return External(socket, f"cat {shlex.quote(str(info))}"), way


def _http_log(url: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    queue = {"max_batch_size": 500, "max_entries": 1_000_000}
    config: dict[str, Any] = {"http_endpoint": url, "queue": queue}
    return {"name": "http-log", "config": config | ({"headers": headers} if headers else {})}


def _load(way: Way, url: str, seconds: int) -> int:
    """Drive a way at full speed and return how many requests were answered."""
    command = ["wrk", "-t1", f"-c{way.concurrency}", f"-d{seconds}", "-H", f"apikey: {KEY}", url + way.path]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    done = re.search(r"(\d+) requests in", output)
    if done is None or "Non-2xx" in output:
        raise KongMissing(f"wrk did not reach {way.path}: {output}")
    way.sent += int(done[1])
    return int(done[1])


def _round(ways: dict[str, Way], url: str, pid: int, seconds: int, number: int) -> None:
    """Measure each way in one Kong, in slices that take turns."""
    for way in ways.values():
        _load(way, url, _WARM_UP)
        _settle(way)
    used = {name: Used() for name in ways}
    for turn in range(seconds):
        for name in _rotated(list(ways), number + turn):
            _slice(ways[name], url, pid, used[name])
    for name, way in ways.items():
        total = used[name]
        way.rates.append(total.requests / total.elapsed)
        way.cpu_us.append(total.kong / total.requests * 1e6)
        way.server_us.append(total.server / total.requests * 1e6)


def _slice(way: Way, url: str, pid: int, used: Used) -> None:
    kong_cpu, server_cpu = cpu_seconds(pid), _server_cpu(way)
    with _stopped(way.server if way.reads_behind else None):
        started = time.perf_counter()
        used.requests += _load(way, url, 1)
        used.elapsed += time.perf_counter() - started
        answered = cpu_seconds(pid)
    _settle(way)
    # What Kong still had queued belongs to this way; the pause of the reader does not.
    used.kong += (answered if way.reads_behind else cpu_seconds(pid)) - kong_cpu
    used.server += _server_cpu(way) - server_cpu


@contextlib.contextmanager
def _stopped(pid: int | None) -> Iterator[None]:
    """Stop a process tree meanwhile."""
    pids = tree(pid) if pid else []
    for each in pids:
        os.kill(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in pids:
            os.kill(each, signal.SIGCONT)


def _settle(way: Way) -> None:
    """Wait until everything sent has arrived, or for long enough to know that it will not."""
    with contextlib.suppress(AssertionError):
        eventually(lambda: not way.missing(), seconds=10, what="the arrival")


def _server_cpu(way: Way) -> float:
    return cpu_seconds(way.server) if way.server else 0.0


async def _p99(way: Way, url: str, rate: int, seconds: int) -> float:
    """Return the 99th percentile of the latency in milliseconds; requests are due whatever comes back."""
    host, port = url.removeprefix("http://").split(":")
    request = f"GET {way.path} HTTP/1.1\r\nhost: bench\r\napikey: {KEY}\r\n\r\n".encode()
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
    way.sent += len(latencies)
    return statistics.quantiles(latencies, n=100)[98] * 1000


def report(ways: dict[str, Way], missing: dict[str, int], console: Console) -> list[Goal]:
    """Print what was measured and return the goals."""
    yardstick = YARDSTICK if YARDSTICK in ways else NONE
    rounds = len(ways[yardstick].rates)
    table = Table(
        title=f"Medians of {rounds} interleaved runs, concurrency {ways[NONE].concurrency}",
        title_justify="left",
    )
    columns = ("req/s", "ratio", "Kong us", "ratio", "own us", "p99 ms")
    for name in ("plugin server", *columns):
        table.add_column(name, justify="left" if name == "plugin server" else "right", no_wrap=True)
    for name, way in ways.items():
        table.add_row(
            name,
            f"{statistics.median(way.rates):,.0f}",
            f"{Spread.of(way.rates, ways[yardstick].rates).median:.2f}",
            f"{statistics.median(way.cpu_us):.0f}",
            f"{Spread.of(way.cpu_us, ways[yardstick].cpu_us).median:.2f}",
            f"{statistics.median(way.server_us):.0f}",
            f"{way.p99_ms:.1f}" if way.p99_ms else "",
        )
    console.print(table)
    console.print(f"us: CPU per request; p99: at 300 req/s; ratio: to '{yardstick}' in the same round")
    lost = "; ".join(f"{name}: {count:,} of {ways[name].sent:,}" for name, count in missing.items())
    return [
        *(_goals_of_plugin(ways) if PLUGIN in ways else ()),
        *_goals_of_lua(ways),
        Goal("events that did not arrive", "none", lost or "none", not missing),
    ]


def _goals_of_plugin(ways: dict[str, Way]) -> list[Goal]:
    rate = Spread.of(ways[PLUGIN].rates, ways[YARDSTICK].rates)
    cpu = Spread.of(ways[PLUGIN].cpu_us, ways[YARDSTICK].cpu_us)
    met = rate.median >= _LEAST_RATE
    return [
        Goal("requests/s, openmeter / empty", f"{_LEAST_RATE} or more", rate.text(), met),
        Goal("Kong's CPU, openmeter / empty", f"{_MAX_CPU} or less", cpu.text(), cpu.median <= _MAX_CPU),
    ]


def _goals_of_lua(ways: dict[str, Way]) -> list[Goal]:
    """Return the goals of the Lua plugin: it is compared with no metering, not with a plugin server."""
    lua, none = ways[LUA], ways[NONE]
    rate, posts = Spread.of(lua.rates, none.rates), Spread.of(lua.rates, ways[HTTP_LOG].rates)
    cpu = statistics.median(one - other for one, other in zip(lua.cpu_us, none.cpu_us, strict=True))
    own = statistics.median(lua.server_us)
    return [
        Goal(
            "requests/s, in Lua / no metering", f"{_LUA_RATE} or more", rate.text(), rate.median >= _LUA_RATE
        ),
        Goal("requests/s, in Lua / http-log", "2 or more", posts.text(), posts.median >= 2),
        Goal("Kong's CPU, in Lua - no metering", f"{_LUA_CPU} us or less", f"{cpu:.1f} us", cpu <= _LUA_CPU),
        Goal("the reader's CPU per event", f"{_READER_CPU} us or less", f"{own:.1f} us", own <= _READER_CPU),
    ]


@dataclass(frozen=True)
class Spread:
    """The ratios of one way to another over the rounds: median, and the middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ones: list[float], others: list[float]) -> Spread:
        """Divide round by round."""
        found = sorted(one / other for one, other in zip(ones, others, strict=True))
        return cls(statistics.median(found), found[len(found) // 4], found[-1 - len(found) // 4])

    def text(self) -> str:
        """Return them as shown."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"
