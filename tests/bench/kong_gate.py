"""`make bench KONG=1 ARGS="--only gate"`: what the gate costs a real Kong, against a Kong without it.

One Kong of one nginx worker has a route for each way: no gate, the plugin, post-function, and a plugin and a
post-function that do nothing, which are the limit of what Lua in Kong can reach. The gate is the real
process beside the sandbox, its customer has a limit, and the answers have its headers. The ways are driven in
turn, in an order that rotates, a second at a time, with 8 and with 32 connections; each is compared with no
gate in the same turn, and the median counts. Each round has a new Kong (see gateway.py), DB-less or, with
`--postgres`, on a PostgreSQL. Needs `kong` and `wrk` in the PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table

from openmeter_plugin.config.gate_lua import FOLDER, NAME, gate_files, post_function
from syncd.sandbox.testing import running_sandbox
from tests.bench.gateway import Spread
from tests.bench.goals import Goal
from tests.bench.kong import KEY, database, on_cores, process, started
from tests.bench.processes import cpu_seconds
from tests.demo.real_kong import KongMissing
from tests.harness.process import eventually
from tests.plugin.gate.test_process import Node

NONE: Final = "no gate"
PLUGIN: Final = "openmeter-gate"
POST: Final = "post-function"
EMPTY: Final = "empty plugin"
EMPTY_POST: Final = "empty post-function"

_CONSUMER: Final = "5f1e3c1e-6a37-4c8e-9d0b-1f1f3f6f7a10"
_MANY: Final = 1_000_000_000
_CONCURRENCY: Final = (8, 32)
_TURNS: Final = 3
_LEAST_RATE: Final = 0.95
_MAX_CPU: Final = 5.0
_DOES_NOTHING: Final = "bench-empty"
_HANDLER: Final = (
    "local Empty = { PRIORITY = 915, VERSION = '1' }\nfunction Empty:access() end\nreturn Empty\n"
)
_SCHEMA: Final = 'return { name = "bench-empty", fields = { { config = { type = "record", fields = {} } } } }'


@dataclass
class Measured:
    """The turns of one way at one concurrency: requests a second, and Kong's CPU of a request in us."""

    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


Results = dict[tuple[int, str], Measured]


def _plugins(socket: Path) -> dict[str, list[dict[str, Any]]]:
    def post(text: str) -> list[dict[str, Any]]:
        return [{"name": "post-function", "config": {"access": [text]}}]

    return {
        NONE: [],
        EMPTY: [{"name": _DOES_NOTHING}],
        PLUGIN: [{"name": NAME, "config": {"socket": str(socket)}}],
        EMPTY_POST: post("return function() end"),
        POST: post(post_function(str(socket))),
    }


def _path(way: str) -> str:
    return "/" + way.replace(" ", "-")


def _document(upstream: str, plugins: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    routes = [
        {"name": _path(way)[1:], "paths": [_path(way)], "plugins": each} for way, each in plugins.items()
    ]
    key = {"key": KEY}
    return {
        "_format_version": "3.0",
        "services": [{"name": "s", "url": upstream, "routes": routes}],
        "consumers": [{"id": _CONSUMER, "username": "c", "keyauth_credentials": [key]}],
        "plugins": [{"name": "key-auth"}],
    }


def _write_lua(folder: Path) -> None:
    for place, texts in (
        (FOLDER, gate_files()),
        (f"kong/plugins/{_DOES_NOTHING}", {"handler.lua": _HANDLER, "schema.lua": _SCHEMA}),
    ):
        (folder / place).mkdir(parents=True)
        for name, text in texts.items():
            (folder / place / name).write_text(text)


def run(rounds: int, tell: Callable[[str], None], *, postgres: bool = False) -> Results:
    """Return what was measured; raises KongMissing."""
    for program in ("kong", "wrk"):
        if shutil.which(program) is None:
            raise KongMissing(f"there is no `{program}` in the PATH")
    first, *others = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        stack.enter_context(on_cores({*others} or {first}))
        if postgres:
            stack.enter_context(database())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        upstream, _ = stack.enter_context(process("tests.bench.upstream"))
        node = Node(folder, stack.enter_context(running_sandbox()), socket_mode="0666")
        stack.callback(node.close)
        node.customer(_MANY, f"consumer:{_CONSUMER}", "c")
        stack.enter_context(node.running())
        _write_lua(folder / "lua")
        plugins = _plugins(node.socket)
        document = _document(upstream, plugins)
        names = ["key-auth", "post-function", NAME, _DOES_NOTHING]
        settings = [
            f"lua_package_path = {folder}/lua/?.lua;;",
            "nginx_http_lua_shared_dict = openmeter_gate 10m",
            "nginx_worker_processes = 1",
            "log_level = error",
        ]
        results = {(each, way): Measured() for each in _CONCURRENCY for way in plugins}
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            with started(
                folder / "kong", document, names, settings, cores={first}, postgres=postgres
            ) as port:
                pid = int((folder / "kong/prefix/pids/nginx.pid").read_text())
                _round(results, f"http://127.0.0.1:{port}", pid, list(plugins), number)
        return results


def _round(results: Results, url: str, pid: int, ways: list[str], number: int) -> None:
    for way in ways:
        eventually(lambda: _ready(url, way), what=f"an answer of {way}")  # noqa: B023
    for way in ways:
        _load(url, way, max(_CONCURRENCY))  # LuaJIT has compiled what it will then
    for turn in range(_TURNS):
        for concurrency in _CONCURRENCY:
            for way in _rotated(ways, number + turn):
                before = cpu_seconds(pid)
                requests, seconds = _load(url, way, concurrency)
                measured = results[concurrency, way]
                measured.rates.append(requests / seconds)
                measured.cpu_us.append((cpu_seconds(pid) - before) / requests * 1e6)


def _rotated(ways: Sequence[str], by: int) -> list[str]:
    by %= len(ways)
    return [*ways[by:], *ways[:by]]


def _ready(url: str, way: str) -> bool:
    """Return whether a route answers, and one with a gate with what is left."""
    try:
        answer = httpx.get(url + _path(way), headers={"apikey": KEY}, trust_env=False)
    except httpx.TransportError:
        return False
    return answer.is_success and ("ratelimit" in answer.headers or way not in (PLUGIN, POST))


def _load(url: str, way: str, concurrency: int) -> tuple[int, float]:
    """Drive a route at full speed for a second; returns the requests, and the seconds."""
    command = ["wrk", "-t1", f"-c{concurrency}", "-d1", "-H", f"apikey: {KEY}", url + _path(way)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    done = re.search(r"(\d+) requests in ([\d.]+)s", output)
    if done is None or "Non-2xx" in output:
        raise KongMissing(f"wrk did not reach {_path(way)}: {output}")
    return int(done[1]), float(done[2])


def report(results: Results, console: Console) -> list[Goal]:
    """Print what was measured and return the goals."""
    turns = len(results[_CONCURRENCY[0], NONE].rates)
    table = Table(title=f"Medians of {turns} interleaved runs", title_justify="left")
    for name in ("connections", "way", "req/s", "of no gate", "Kong us", "more us"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    goals: list[Goal] = []
    for (concurrency, way), measured in results.items():
        none = results[concurrency, NONE]
        rate = Spread.of(measured.rates, none.rates)
        more = [one - other for one, other in zip(measured.cpu_us, none.cpu_us, strict=True)]
        cpu = statistics.median(more)
        table.add_row(
            str(concurrency),
            way,
            f"{statistics.median(measured.rates):,.0f}",
            rate.text(),
            f"{statistics.median(measured.cpu_us):.1f}",
            f"{cpu:+.1f}",
        )
        if way == PLUGIN:
            what = f"with the gate, {concurrency} connections"
            goals += [
                Goal(f"requests/s {what}", f"{_LEAST_RATE} or more", rate.text(), rate.median >= _LEAST_RATE),
                Goal(f"Kong's CPU {what}", f"{_MAX_CPU:.0f} us or less", f"{cpu:+.1f} us", cpu <= _MAX_CPU),
            ]
    console.print(table)
    console.print("us: Kong's CPU of a request; the empty ones are the limit of any plugin in Lua")
    return goals
