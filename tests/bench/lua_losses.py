"""What failures cost a real Kong with the Lua plugin: requests that were answered, events that arrived.

    python -m tests.bench.lua_losses [--how kills --how reload ...] [--rate 2000] [--workers 2]

The ids that Kong gave the clients are compared with those of all events that arrived. Needs `kong` in the
PATH; `full` mounts a small tmpfs and needs root. A plugin in the same Kong, the witness, knows which requests
had a response, but had not come through their log phase.

- kills: `kill -9` of a worker of nginx, 60 times;
- reload: `kong reload`, three times;
- away: the plugin server is away for `--away` seconds (60);
- reader: `kill -9` of the process that reads the segments, ten times;
- hung: that process is stopped for `--away` seconds, and replaced because it is silent;
- stop, quit: `kong stop` and `kong quit` with a backlog, while the plugin server is away;
- master: `kill -9` of nginx's master under traffic, then of its workers;
- full: no plugin server, and a folder of 512 KiB; what did not fit is counted exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table

from tests.bench.kong import KEY, Lua, kong, process
from tests.bench.processes import end_cleanly, tree
from tests.bench.restarts import Load, Result
from tests.demo.real_kong import KongMissing
from tests.harness.books import total_counts
from tests.harness.process import eventually
from tests.harness.service_manager import ServiceManager

_SETTLE: Final = 30.0
_WITNESS: Final = Path(__file__).parent / "witness"


@dataclass
class Scene:
    """A Kong with the Lua plugin, a plugin server that reads its segments, and where events arrive."""

    folder: Path
    lua: Lua
    sink: str
    server: ServiceManager
    away: float
    master: int = 0

    def serve(self) -> None:
        """Start the plugin server."""
        serving = len(self.server.events("delivery_started"))
        self.server.start()
        eventually(lambda: len(self.server.events("delivery_started")) > serving, seconds=60, what="serving")

    def workers(self) -> list[int]:
        """Return the workers of nginx."""
        return [
            pid
            for pid in tree(self.master)[1:]
            if b"worker process" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def reader(self) -> int:
        """Return the process that reads the segments."""
        started = [entry for entry in self.server.events("serving") if entry["process"] == "segments"]
        return int(str(started[-1]["pid"]))

    def command(self, *words: str) -> None:
        """Run kong with its prefix."""
        prefix = ["-p", str(self.folder / "kong/prefix")]
        subprocess.run(["kong", *words, *prefix], check=True, capture_output=True)


def _kills(scene: Scene) -> None:
    for _ in range(60):
        time.sleep(0.35)
        with contextlib.suppress(ProcessLookupError):
            os.kill(random.choice(scene.workers()), signal.SIGKILL)


def _reload(scene: Scene) -> None:
    for _ in range(3):
        time.sleep(3)
        scene.command("reload", "-c", str(scene.folder / "kong/kong.conf"))
    time.sleep(3)


def _away(scene: Scene) -> None:
    scene.server.end(signal.SIGTERM)
    time.sleep(scene.away)
    scene.serve()
    time.sleep(2)


def _reader(scene: Scene) -> None:
    for _ in range(10):
        time.sleep(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(scene.reader(), signal.SIGKILL)


def _hung(scene: Scene) -> None:
    time.sleep(2)
    os.kill(scene.reader(), signal.SIGSTOP)
    time.sleep(scene.away)


def _ends_with(scene: Scene, word: str) -> None:
    scene.server.end(signal.SIGTERM)
    time.sleep(4)
    scene.command(word)


def _master(scene: Scene) -> None:
    workers = scene.workers()
    time.sleep(2)
    os.kill(scene.master, signal.SIGKILL)
    time.sleep(3)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def _full(scene: Scene) -> None:
    scene.server.end(signal.SIGTERM)
    time.sleep(5)


HOW: Final[dict[str, Callable[[Scene], None]]] = {
    "kills": _kills,
    "reload": _reload,
    "away": _away,
    "reader": _reader,
    "hung": _hung,
    "stop": partial(_ends_with, word="stop"),
    "quit": partial(_ends_with, word="quit"),
    "master": _master,
    "full": _full,
}
_ENDS_KONG: Final = ("stop", "quit", "master")


async def _drive(load: Load, act: Callable[[], None], *, ends_kong: bool) -> None:
    async def acting() -> None:
        await asyncio.sleep(1)
        await asyncio.to_thread(act)
        load.done = True

    with contextlib.suppress(*([ExceptionGroup] if ends_kong else [])):  # no one answers any more
        async with asyncio.TaskGroup() as group:
            group.create_task(acting())
            while not load.done:
                with contextlib.suppress(ExceptionGroup):  # a worker that was killed
                    await load.run()
                await asyncio.sleep(0.05)


def _unlogged(url: str) -> set[str]:
    """Return the ids of requests that had a response, but did not come through their log phase."""
    answer = httpx.get(f"{url}/witness", headers={"apikey": KEY}, trust_env=False, timeout=60)
    return set(answer.raise_for_status().text.split())


def _counted(spool: Path) -> Counter[str]:
    """Return the lost requests in the books, by cause: those of Kong's workers, and the reader's."""
    return Counter({cause: n for (name, cause), n in total_counts(spool).items() if name == "lost"})


def run(how: str, rate: float, workers: int, away: float) -> tuple[Result, Counter[str], int | None]:
    """Return what became of the requests, and the lost ones that the books have counted.

    Last, how many of the lost requests had not come through their log phase; None if no Kong is left to ask.
    """
    result = Result(how, 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        folder.chmod(0o755)
        upstream, _ = stack.enter_context(process("tests.bench.upstream"))
        sink, _ = stack.enter_context(process("tests.bench.sink", "--ids"))
        segments = folder / "segments"
        if how == "full":
            segments.mkdir()
            stack.enter_context(_small(segments))
        lua = Lua(folder / "lua", segments)
        lua.write()
        shutil.copytree(_WITNESS, lua.folder / "kong/plugins/witness")
        server = ServiceManager(folder, {}, ("--segments", str(segments)))
        stack.callback(server.end)
        scene = Scene(folder, lua, sink, server, away)
        scene.serve()
        plugin: dict[str, Any] = {"name": lua.name, "config": {"ingest_endpoint": f"{sink}/api/v1/events"}}
        routes = {"/": [plugin, {"name": "witness"}]}
        directives = ["nginx_http_lua_shared_dict = witness 16m"]
        gateway = kong(folder / "kong", upstream, routes, {}, workers=workers, lua=lua, directives=directives)
        url, scene.master = stack.enter_context(gateway)
        load = Load(url, rate, result)
        asyncio.run(_drive(load, partial(HOW[how], scene), ends_kong=how in _ENDS_KONG))
        if how in ("stop", "quit", "full"):
            scene.serve()
        answered = set(result.answered)

        def arrived() -> list[str]:
            return httpx.get(f"{sink}/ids", trust_env=False, timeout=60).text.split()

        spool = folder / "spool"
        with contextlib.suppress(AssertionError):
            done = lambda: len(answered - set(arrived())) <= _counted(spool).total()  # noqa: E731
            eventually(done, seconds=_SETTLE, what="the arrival")
        time.sleep(2)
        counted = _counted(spool)
        events = arrived()
        lost = answered - set(events)
        result.lost, result.twice = len(lost), len(events) - len(set(events))
        unlogged = None if how in _ENDS_KONG else len(lost & _unlogged(url))
    return result, counted, unlogged


@contextmanager
def _small(folder: Path) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    """Run it; the exit status is 1 if Kong is missing."""
    options = argparse.ArgumentParser(prog="python -m tests.bench.lua_losses")
    options.add_argument("--how", action="append", choices=list(HOW), help="default: all")
    options.add_argument("--rate", type=float, default=2000)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--away", type=float, default=60)
    arguments = options.parse_args()
    end_cleanly()
    console = Console()
    table = Table(title="Failures under traffic, the Lua plugin", title_justify="left")
    for name in ("how", "requests", "lost", "counted", "not logged", "sent twice", "worst ms"):
        table.add_column(name, justify="right")
    for how in arguments.how or HOW:
        try:
            result, counted, unlogged = run(how, arguments.rate, arguments.workers, arguments.away)
        except KongMissing as error:
            console.print(f"[red]{error}")
            return 1
        figures = (len(result.answered), result.lost, counted.total(), unlogged, result.twice)
        shown = ("" if figure is None else f"{figure:,}" for figure in figures)
        table.add_row(how, *shown, f"{result.worst_ms:.0f}")
        console.print(f"{how}: requests, lost, counted, not logged, twice: {figures} {dict(counted)}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
