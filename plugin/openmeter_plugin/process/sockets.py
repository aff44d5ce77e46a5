"""Listening sockets of the plugin server.

Imports next to nothing: while Kong calls and nothing listens yet, events are lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
from pathlib import Path
from typing import Final, Self

BACKLOG: Final = 4096
DEFAULT_MODE: Final = "0660"

STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})


class UnixListener:
    """A Unix socket that is put in place atomically, so that no connection to its path is ever refused.

    On `kong reload` the new plugin server takes over the path while the old one is still serving. When the
    old one stops, it leaves the new one's socket alone.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
            _require_replaceable(path)
            self.socket.bind(str(temporary))
            temporary.chmod(mode)
            self.socket.listen(BACKLOG)
            status = temporary.stat()
            temporary.rename(path)
        except OSError:
            self.socket.close()
            temporary.unlink(missing_ok=True)
            raise
        self._identity = (status.st_dev, status.st_ino)
        self.owned = True

    @classmethod
    def passed(cls, listener: socket.socket, path: Path) -> Self:
        """Wrap a socket that a service manager created, holds and removes."""
        self = cls.__new__(cls)
        self.path, self.socket, self.owned = path, listener, False
        return self

    @property
    def name(self) -> str:
        """The address that it listens on."""
        return str(self.path)

    @property
    def in_place(self) -> bool:
        """Whether the path leads to this socket, which this process created; raises no error."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return self.owned and (status.st_dev, status.st_ino) == self._identity

    def remove(self) -> None:
        """Remove the socket file if this process created it and it was not replaced since."""
        if self.in_place:
            self.path.unlink(missing_ok=True)


def _require_replaceable(path: Path) -> None:
    """Raise OSError unless the path is free or holds a socket: anything else belongs to another program."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(
                errno.EEXIST, "there is a file that is not a socket; move it, or choose another path"
            )


class TcpListener:
    """A TCP socket that shares its port with the plugin server that it replaces, as on `kong reload`."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._use(socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True))
        self.owned = True

    @classmethod
    def passed(cls, listener: socket.socket) -> Self:
        """Wrap a socket that a service manager created and holds."""
        self = cls.__new__(cls)
        self._use(listener)
        self.owned = False
        return self

    def _use(self, listener: socket.socket) -> None:
        self.socket = listener
        self.address: str = listener.getsockname()[0]
        self.port: int = listener.getsockname()[1]

    @property
    def name(self) -> str:
        """The address that it listens on."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def remove(self) -> None:
        """Close the socket if this process created it, so that pending connections are refused, not stuck."""
        if self.owned:
            self.socket.close()


Listener = UnixListener | TcpListener


def listen_on(address: str, mode: int) -> Listener:
    """Listen on `host:port`, `[v6]:port` or `unix:/path`; raises ValueError for other texts, and OSError."""
    scheme, _, path = address.partition(":")
    if scheme == "unix" and path:
        return UnixListener(Path(path), mode)
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host[:1] + host[-1:] == "[]" else "" if ":" in host else host
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 0xFFFF:
        raise ValueError(f"{address} is neither host:port, such as 127.0.0.1:8095, nor unix:/path")
    return TcpListener(host, int(port))


def loopback_hosts(listener: socket.socket) -> frozenset[str] | None:
    """Return the host names that clients of a loopback socket may use; None (any) for another socket.

    Against DNS rebinding: a web page can make a browser call a loopback address by another name.
    """
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    import ipaddress

    address = str(listener.getsockname()[0])
    if not ipaddress.ip_address(address).is_loopback:
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", address})


def host_of(header: str) -> str:
    """Return the host name or address in a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class Listeners:
    """The open listening sockets: for Kong's plugin protocol, http-log, the operations API and the gate.

    At least one of the first two is open when serving begins.
    """

    def __init__(self) -> None:
        self.plugin: UnixListener | None = None
        self.http_log: Listener | None = None
        self.api: Listener | None = None
        self.gate: UnixListener | None = None
        self.unreachable: list[UnixListener] = []
        """Passed sockets whose files are gone, so that nothing can connect to them."""

    @property
    def opened(self) -> list[Listener]:
        """All that are open."""
        return [listener for listener in self._all if listener is not None]

    @property
    def _all(self) -> tuple[Listener | None, ...]:
        return self.plugin, self.http_log, self.api, self.gate

    @property
    def names(self) -> list[str]:
        """Their addresses."""
        return [listener.name for listener in self.opened]

    @property
    def passed(self) -> list[str]:
        """The addresses of those that a service manager passed to this process."""
        return [listener.name for listener in self.opened if not listener.owned]

    def close(self) -> None:
        """Close them in a process that does not serve."""
        for listener in self.opened:
            listener.socket.close()

    def remove(self) -> None:
        """Stop listening on those that this process created."""
        for listener in self.opened:
            listener.remove()


def listen_early(arguments: list[str], listeners: Listeners) -> None:
    """Open the sockets that a `serve` command line asks for, before it is parsed properly.

    Parsing takes four times as long as everything up to here, and Kong's requests do not wait. Skips whatever
    is unclear or fails: the command line tries again and reports the error.
    """
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--socket", "--socket-mode", "--http-log"):
            options[name] = value if equals else next(words, "")
    # From here on a stop has something to clean up, so its signal waits for the supervisor.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with contextlib.suppress(KeyError, ValueError, OSError):
        mode = int(options.get("--socket-mode", DEFAULT_MODE), 8)
        if "--socket" in options and listeners.plugin is None:
            listeners.plugin = UnixListener(Path(options["--socket"]), mode)
        if listeners.http_log is None:
            listeners.http_log = listen_on(options["--http-log"], mode)
