"""The sockets that Kong connects to. Imports next to nothing: requests before they listen lose events."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Final, Self

BACKLOG: Final = 4096
DEFAULT_MODE: Final = "0660"

STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})


class ListeningSocket:
    """A Unix socket that takes its place in one step: nobody who connects to the path is ever refused.

    On `kong reload` the new generation takes the path over from the old one, which is still serving; when
    the old one stops, it must leave the new one's socket alone.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
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
        self.is_ours = True

    @classmethod
    def passed(cls, listener: socket.socket, path: Path) -> Self:
        """Return a socket that somebody else made, holds, and removes."""
        self = cls.__new__(cls)
        self.path, self.socket, self.is_ours = path, listener, False
        return self

    @property
    def name(self) -> str:
        """Where it listens."""
        return str(self.path)

    def remove(self) -> None:
        """Remove the socket from its path if we made it and it is still this one."""
        if not self.is_ours:
            return
        with contextlib.suppress(FileNotFoundError):
            status = self.path.stat()
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()


class TcpListeningSocket:
    """A TCP socket, shared with the generation that is there already, as on `kong reload`."""

    def __init__(self, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._use(socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True))
        self.is_ours = True

    @classmethod
    def passed(cls, listener: socket.socket) -> Self:
        """Return a socket that somebody else made and holds."""
        self = cls.__new__(cls)
        self._use(listener)
        self.is_ours = False
        return self

    def _use(self, listener: socket.socket) -> None:
        self.socket = listener
        self.address: str = listener.getsockname()[0]
        self.port: int = listener.getsockname()[1]

    @property
    def name(self) -> str:
        """Where it listens."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def remove(self) -> None:
        """Listen no more where we made the socket: connections that wait here would wait for nobody."""
        if self.is_ours:
            self.socket.close()


HttpLogSocket = ListeningSocket | TcpListeningSocket


def listen_for_http_log(address: str, mode: int) -> HttpLogSocket:
    """Listen on `host:port`, `[v6]:port` or `unix:/path`; raises ValueError for another text, and OSError."""
    scheme, _, path = address.partition(":")
    if scheme == "unix" and path:
        return ListeningSocket(Path(path), mode)
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host[:1] + host[-1:] == "[]" else "" if ":" in host else host
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 0xFFFF:
        raise ValueError(f"{address} is neither host:port, such as 127.0.0.1:8095, nor unix:/path")
    return TcpListeningSocket(host, int(port))


class Listeners:
    """The ways in; at least one of them is there when serving begins."""

    def __init__(self) -> None:
        self.plugin: ListeningSocket | None = None
        self.http_log: HttpLogSocket | None = None
        self.api: HttpLogSocket | None = None
        self.unreachable: list[ListeningSocket] = []
        """What was passed to us and has no place any more where anybody could connect to it."""

    @property
    def there(self) -> list[HttpLogSocket]:
        """Those that are there."""
        return [listener for listener in (self.plugin, self.http_log, self.api) if listener is not None]

    @property
    def names(self) -> list[str]:
        """Where they listen."""
        return [listener.name for listener in self.there]

    @property
    def passed(self) -> list[str]:
        """Where those listen that a service manager passed to us."""
        return [listener.name for listener in self.there if not listener.is_ours]

    def close(self) -> None:
        """Close them in this process, which does not serve."""
        for listener in self.there:
            listener.socket.close()

    def remove(self) -> None:
        """Take them away from their places."""
        for listener in self.there:
            listener.remove()


def listen_early(arguments: list[str], listeners: Listeners) -> None:
    """Open the sockets that a `serve` command line asks for, before that is parsed properly.

    Parsing it takes four times as long as everything up to here, and Kong's requests do not wait. Whatever
    is unclear or fails is left out: the command line finds it again, and has the words for it.
    """
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--socket", "--socket-mode", "--http-log"):
            options[name] = value if equals else next(words, "")
    # From here on a stop has something to clean up; it waits until somebody is there to do so.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with contextlib.suppress(KeyError, ValueError, OSError):
        mode = int(options.get("--socket-mode", DEFAULT_MODE), 8)
        if "--socket" in options and listeners.plugin is None:
            listeners.plugin = ListeningSocket(Path(options["--socket"]), mode)
        if listeners.http_log is None:
            listeners.http_log = listen_for_http_log(options["--http-log"], mode)
