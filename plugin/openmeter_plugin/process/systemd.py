"""What a service manager such as systemd passes to this process, and what it wants to hear.

Socket activation: listening sockets that it holds and passes, as systemd's socket units do. They outlive the
plugin server: during a restart, connections wait in them for the next process. The protocol is that of
sd_listen_fds(3): the sockets are the descriptors from 3 on, `LISTEN_FDS` is their number, `LISTEN_FDNAMES`
their names, and `LISTEN_PID` the process that they are meant for.

Notifications, by the protocol of sd_notify(3) and sd_watchdog_enabled(3): one datagram for each, to the
socket that `NOTIFY_SOCKET` names. Imports next to nothing, like `sockets`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Final

from openmeter_plugin.process.sockets import Listener, Listeners, TcpListener, UnixListener

PLUGIN: Final = "plugin"
HTTP_LOG: Final = "http-log"
VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

_FIRST_DESCRIPTOR: Final = 3
_REMEDY: Final = f"set FileDescriptorName= of its socket unit to {PLUGIN} or {HTTP_LOG}"


_WATCHDOG_DIVISOR: Final = 3  # heartbeats in the time after which the service manager would restart us


class Notifier:
    """Tells the service manager that started this process about its state, if it wants to know. Never raises.

    The environment is cleared of its variables, so that child processes do not speak for this one.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        own_pid = str(os.getpid())
        address = environment.pop("NOTIFY_SOCKET", "")
        # Where a service manager started Kong and Kong this process, the notifications would be Kong's.
        if environment.get("SYSTEMD_EXEC_PID", own_pid) != own_pid:
            address = ""
        self._address = "\0" + address[1:] if address.startswith("@") else address  # an abstract socket
        watchdog = environment.pop("WATCHDOG_USEC", "")
        if environment.pop("WATCHDOG_PID", own_pid) != own_pid or not watchdog.isdecimal():
            watchdog = "0"
        self._interval = int(watchdog) / 1e6 / _WATCHDOG_DIVISOR
        self._next_sign = 0.0
        self.is_ready = False

    def ready(self) -> None:
        """Report that this process does its work."""
        self.is_ready = True
        self._send("READY=1")

    def reloading(self) -> None:
        """Report that the configuration is read again; `ready` follows."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Report that this process is stopping."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Report to the watchdog, if there is one, that this process runs; call it often."""
        now = time.monotonic()
        if self._interval and now >= self._next_sign:
            self._next_sign = now + self._interval
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.setblocking(False)
            notifier.sendto(message.encode(), self._address)


class ActivationError(ValueError):
    """The passed sockets cannot be used; the message says why and what to do."""


def use_passed_sockets(
    listeners: Listeners,
    environment: MutableMapping[str, str] = os.environ,
    *,
    first_descriptor: int = _FIRST_DESCRIPTOR,
) -> None:
    """Add the sockets that were passed to this process, and clear the environment of them.

    Raises ActivationError. A Unix socket whose file is gone counts as unreachable.
    """
    passed = _passed(environment, first_descriptor)
    for name, descriptor in passed.items():
        listener = _listener(name, descriptor)
        if isinstance(listener, UnixListener) and not _has_file(listener.path):
            listeners.unreachable.append(listener)
        elif isinstance(listener, UnixListener) and name == PLUGIN:
            listeners.plugin = listener
        else:
            listeners.http_log = listener
    if _is_for_this_process(environment):
        clear_environment(environment)
        for descriptor in passed.values():
            os.close(descriptor)


def clear_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Remove the variables from the environment, so that child processes do not see them."""
    for variable in VARIABLES:
        environment.pop(variable, None)


def _is_for_this_process(environment: Mapping[str, str]) -> bool:
    """Return whether the sockets are passed to this very process."""
    return environment.get("LISTEN_PID") == str(os.getpid())


def _passed(environment: Mapping[str, str], first_descriptor: int) -> dict[str, int]:
    """Return the descriptors by their names."""
    if not _is_for_this_process(environment):
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
            raise ActivationError(f"two sockets named {name!r} were passed, but only one can be served")
        passed[name] = first_descriptor + number
    return passed


def _has_file(path: Path) -> bool:
    try:
        return path.is_socket()
    except OSError:  # no permission to look
        return True


def _listener(name: str, descriptor: int) -> Listener:
    try:
        # A duplicate is not inherited, and if it is unusable the original is left for the next attempt.
        passed = socket.socket(fileno=os.dup(descriptor))
    except OSError as error:
        raise ActivationError(
            f"the descriptor passed as {name!r} is not a socket: {error.strerror}"
        ) from None
    try:
        _check(name, passed)
        if passed.family == socket.AF_UNIX:
            return UnixListener.passed(passed, Path(os.fsdecode(passed.getsockname())))
        return TcpListener.passed(passed)
    except ActivationError:
        passed.close()
        raise


def _check(name: str, passed: socket.socket) -> None:
    """Raise ActivationError unless the socket accepts connections that this input can serve."""
    if passed.type != socket.SOCK_STREAM or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ActivationError(
            f"the passed socket {name!r} does not listen for connections; its socket unit needs "
            "ListenStream= and Accept=no"
        )
    if passed.family != socket.AF_UNIX and (
        name == PLUGIN or passed.family not in (socket.AF_INET, socket.AF_INET6)
    ):
        raise ActivationError(f"the passed socket {name!r} is of a kind that cannot be served")
