"""A service manager that holds listening sockets and passes them on, as systemd's socket units do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Between fork and exec it does what systemd does: the sockets become the descriptors from 3 on.
_EXEC = """
import os, sys
count = int(sys.argv[1])
held = [os.dup(int(number)) for number in sys.argv[2 : 2 + count]]
high = [os.dup2(number, 100 + place) for place, number in enumerate(held)]
for place, number in enumerate(high):
    os.dup2(number, 3 + place)
    os.close(number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count)}
command = sys.argv[2 + count :]
os.execv(command[0], command)
"""


@dataclass
class ServiceManager:
    """Holds listening sockets and runs a server behind them, as systemd's socket and service units."""

    directory: Path
    sockets: dict[str, socket.socket]
    arguments: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def log_file(self) -> Path:
        return self.directory / "log"

    def events(self, name: str) -> list[dict[str, object]]:
        """Return the log entries of an event."""
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] == name]

    def start(self) -> None:
        """Start the server; returns at once."""
        descriptors = [held.fileno() for held in self.sockets.values()]
        command = [
            *(sys.executable, "-c", _EXEC, str(len(descriptors)), *map(str, descriptors)),
            *(sys.executable, "-m", "openmeter_plugin", "serve", "--spool", str(self.directory / "spool")),
        ]
        environment = os.environ | {"LISTEN_FDNAMES": ":".join(self.sockets)}
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments],
                stderr=log,
                env=environment,
                pass_fds=descriptors,
                cwd=self.directory,
            )

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(20)


def unix_listener(path: Path) -> socket.socket:
    """Listen as a socket unit with ListenStream= does."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(4096)
    return listener


@contextmanager
def notified(address: str) -> Iterator[socket.socket]:
    """Listen for notifications as the service manager does; `@` begins an abstract address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if address.startswith("@") else address)
        listener.settimeout(15)
        yield listener


@contextmanager
def managed(directory: Path, *arguments: str, **sockets: socket.socket) -> Iterator[ServiceManager]:
    """Run a server with these sockets passed; `http_log` is named http-log."""
    named = {name.replace("_", "-"): held for name, held in sockets.items()}
    manager = ServiceManager(directory, named, arguments)
    manager.start()
    try:
        yield manager
    finally:
        assert manager.process
        manager.process.kill()
        manager.process.wait()
        for held in sockets.values():
            held.close()
