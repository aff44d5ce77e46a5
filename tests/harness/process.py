"""Real processes under test: started, waited for with a deadline, and always stopped."""

from __future__ import annotations

import json
import os
import signal
import socket as socketlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def eventually(probe: Callable[[], T], *, seconds: float = 15.0, what: str = "it") -> T:
    """Poll until the probe returns something true, and return that; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        result = probe()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s; last seen: {result!r}"
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Return the pids of a process's living children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@dataclass
class PluginServer:
    """A running `openmeter-plugin serve`."""

    process: subprocess.Popen[bytes]
    socket: Path
    spool: Path
    log_file: Path

    def log_text(self) -> str:
        """Everything that it logged."""
        return self.log_file.read_text()

    def children(self) -> list[int]:
        """The pids of its living child processes."""
        return children_of(self.process.pid)

    def child(self, name: str) -> int | None:
        """The pid of its living child of a kind (worker, delivery), as it named itself in the log."""
        alive = self.children()
        for line in self.log_text().splitlines():
            entry = json.loads(line)
            if entry.get("process") == name and entry["pid"] in alive:
                return int(entry["pid"])
        return None

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)


def takes_connections(path: Path) -> bool:
    """Return whether somebody listens on a Unix socket."""
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        return path.exists() and probe.connect_ex(str(path)) == 0


@contextmanager
def plugin_server(
    directory: Path, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[PluginServer]:
    """Run `openmeter-plugin serve` with its socket and spool below a directory."""
    socket, spool, log_file = directory / "s", directory / "spool", directory / "log"
    command = [sys.executable, "-m", "openmeter_plugin", "serve", "--socket", str(socket)]
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [*command, "--spool", str(spool), *arguments],
            stderr=log,
            env=os.environ | (environment or {}),
        )
    server = PluginServer(process, socket, spool, log_file)
    try:
        eventually(socket.exists, what="listening")
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
