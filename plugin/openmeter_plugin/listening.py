"""The socket that Kong connects to. Imports next to nothing: requests before it listens lose their events."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Final

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

    def remove(self) -> None:
        """Remove the socket from its path if it is still this one."""
        with contextlib.suppress(FileNotFoundError):
            status = self.path.stat()
            if (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()


def listen_early(arguments: list[str]) -> ListeningSocket | None:
    """Return the socket that a `serve` command line asks for, before that is parsed properly.

    Parsing it takes four times as long as everything up to here, and Kong's requests do not wait. Whatever
    is unclear or fails gives None: the command line finds it again, and has the words for it.
    """
    options: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--socket", "--socket-mode"):
            options[name] = value if equals else next(words, "")
    # From here on a stop has something to clean up; it waits until somebody is there to do so.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        mode = int(options.get("--socket-mode", DEFAULT_MODE), 8)
        return ListeningSocket(Path(options["--socket"]), mode)
    except (KeyError, ValueError, OSError):
        return None
