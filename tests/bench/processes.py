"""The processes that are measured: CPU and memory of whole process trees, from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.harness.process import eventually, plugin_server, takes_connections

MIB = 1024 * 1024
BASELINE = Path(__file__).parent / "pdk_baseline"
_TICKS = os.sysconf("SC_CLK_TCK")


def end_cleanly() -> None:
    """Have SIGTERM end this process as Ctrl-C does: what it has started, a Kong too, is ended with it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def tree(pid: int) -> list[int]:
    """Return a process and everything below it."""
    pids = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # kong-pdk's threads come and go
            for child in (task / "children").read_text().split():
                pids += tree(int(child))
    return pids


def cpu_seconds(pid: int) -> float:
    """Return the CPU time, user and system, of a process tree and its ended children."""
    total = 0
    for process in tree(pid):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += sum(int(field) for field in fields[11:15])
    return total / _TICKS


def pss_bytes(pid: int) -> int:
    """Return the proportional set size of a process tree: shared pages counted once."""
    total = 0
    for process in tree(pid):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


@dataclass
class Sink:
    """A running events endpoint."""

    url: str
    process: subprocess.Popen[str]

    @property
    def endpoint(self) -> str:
        """The URL for events."""
        return f"{self.url}/api/v1/events"

    def received(self) -> int:
        """How many events came."""
        return int(httpx.get(f"{self.url}/count", trust_env=False).text)


@contextmanager
def sink() -> Iterator[Sink]:
    """Run an events endpoint."""
    command = [sys.executable, "-m", "tests.bench.sink"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        yield Sink(process.stdout.readline().strip(), process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@dataclass
class Server:
    """A plugin server to measure."""

    pid: int
    socket: Path
    spool: Path


@contextmanager
def ours(directory: Path, *arguments: str) -> Iterator[Server]:
    """Run `openmeter-plugin serve`."""
    with plugin_server(directory, *arguments) as server:
        eventually(lambda: '"delivery_started"' in server.log_text(), what="the delivery's start")
        yield Server(server.process.pid, server.socket, server.spool)


def reading_segments(directory: Path) -> AbstractContextManager[Server]:
    """Run `openmeter-plugin serve --segments`."""
    return ours(directory, "--segments", str(directory / "segments"))


@contextmanager
def bare(directory: Path) -> Iterator[Server]:
    """Run a server that takes the log of each event and drops it."""
    socket = directory / "s"
    command = [sys.executable, "-m", "tests.bench.empty_server", str(socket), str(directory / "count")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        process.stdout.readline()
        yield Server(process.pid, socket, directory)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def kong_pdk(directory: Path, *mode: str) -> Iterator[Server]:
    """Run stock kong-pdk with a plugin that parses the log and does nothing else."""
    program = Path(sys.executable).with_name("kong-python-pluginserver")
    command = [str(program), *mode, "-d", str(BASELINE), "-p", str(directory), "--socket-name", "s"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    socket = directory / "s"
    try:
        # Stock kong-pdk has its socket in place before it listens.
        eventually(lambda: takes_connections(socket), what="listening")
        yield Server(process.pid, socket, directory)
    finally:
        process.kill()
        process.wait()
