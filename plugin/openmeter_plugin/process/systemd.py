"""Listening sockets that a service manager holds and passes on, as systemd does for its socket units.

They outlive us: while we are stopped and started again, connections wait in them for the next process. The
protocol is that of sd_listen_fds(3): the sockets are the descriptors from 3 on, `LISTEN_FDS` tells how many,
`LISTEN_FDNAMES` their names, and `LISTEN_PID` for which process they are. Imports next to nothing, as
`listening`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

from openmeter_plugin.process.sockets import HttpLogSocket, Listeners, ListeningSocket, TcpListeningSocket

PLUGIN: Final = "plugin"
HTTP_LOG: Final = "http-log"
VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

_FIRST_DESCRIPTOR: Final = 3
_REMEDY: Final = f"set FileDescriptorName= of its socket unit to {PLUGIN} or {HTTP_LOG}"


class ActivationError(ValueError):
    """What was passed cannot be used; the message says why and what to do."""


def take_passed(listeners: Listeners, environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the sockets that were passed to this process; raises ActivationError.

    They are gone from the environment then. A Unix socket whose file is gone is of use to nobody.
    """
    passed = _passed(environment)
    for name, descriptor in passed.items():
        listener = _listener(name, descriptor)
        if isinstance(listener, ListeningSocket) and not _has_place(listener.path):
            listeners.unreachable.append(listener)
        elif isinstance(listener, ListeningSocket) and name == PLUGIN:
            listeners.plugin = listener
        else:
            listeners.http_log = listener
    if is_for_us(environment):
        forget(environment)
        for descriptor in passed.values():
            os.close(descriptor)


def forget(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove the variables from the environment: they are not for our children."""
    for variable in VARIABLES:
        environment.pop(variable, None)


def is_for_us(environment: Mapping[str, str]) -> bool:
    """Tell whether sockets are passed to this very process."""
    return environment.get("LISTEN_PID") == str(os.getpid())


def _passed(environment: Mapping[str, str]) -> dict[str, int]:
    """Return the descriptors by their names."""
    if not is_for_us(environment):
        return {}
    count = environment.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdecimal()):
        raise ActivationError("LISTEN_FDS is not a number")
    names = environment.get("LISTEN_FDNAMES", "").split(":") if "LISTEN_FDNAMES" in environment else []
    passed: dict[str, int] = {}
    for number in range(int(count)):
        name = names[number] if number < len(names) else ""
        if name not in (PLUGIN, HTTP_LOG):
            raise ActivationError(f"a socket named {name!r} was passed; {_REMEDY}")
        if name in passed:
            raise ActivationError(f"two sockets named {name!r} were passed, one is served")
        passed[name] = _FIRST_DESCRIPTOR + number
    return passed


def _has_place(path: Path) -> bool:
    try:
        return path.is_socket()
    except OSError:  # it is not for us to see
        return True


def _listener(name: str, descriptor: int) -> HttpLogSocket:
    try:
        # A copy is not inheritable, and where it is of no use the original is there for another look.
        passed = socket.socket(fileno=os.dup(descriptor))
    except OSError as error:
        raise ActivationError(f"what was passed as {name!r} is not a socket: {error.strerror}") from None
    try:
        _check(name, passed)
        if passed.family == socket.AF_UNIX:
            return ListeningSocket.passed(passed, Path(os.fsdecode(passed.getsockname())))
        return TcpListeningSocket.passed(passed)
    except ActivationError:
        passed.close()
        raise


def _check(name: str, passed: socket.socket) -> None:
    """Raise ActivationError unless connections for this way in can be accepted from the socket."""
    if passed.type != socket.SOCK_STREAM or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ActivationError(
            f"the socket {name!r} that was passed does not listen for connections; its socket unit needs "
            "ListenStream= and Accept=no"
        )
    if passed.family != socket.AF_UNIX and (
        name == PLUGIN or passed.family not in (socket.AF_INET, socket.AF_INET6)
    ):
        raise ActivationError(f"the socket {name!r} that was passed is of a kind that cannot be served")
