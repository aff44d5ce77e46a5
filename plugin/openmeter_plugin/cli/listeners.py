"""Listening sockets for the options of a command line. Errors end the process and name the option."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from openmeter_plugin.cli.options import fail
from openmeter_plugin.log import get_logger
from openmeter_plugin.process.sockets import Listener, Listeners, TcpListener, UnixListener, listen_on
from openmeter_plugin.process.systemd import ActivationError, clear_environment, use_passed_sockets

if TYPE_CHECKING:
    from openmeter_plugin.api.access import Access
    from openmeter_plugin.gate.settings import Settings
    from openmeter_plugin.http_log.config import HttpLogConfig

API_MODE: Final = 0o600  # of the API's Unix socket: without a token, only its owner may use the API


def duplicate_socket(listener: Listener | None) -> socket.socket | None:
    """Return a socket object of this process for an inherited listening socket."""
    return None if listener is None else socket.socket(fileno=os.dup(listener.socket.fileno()))


def open_listeners(
    listeners: Listeners, socket_path: Path | None, http_log: str | None, mode: int, *, required: bool
) -> None:
    """Listen for Kong. Sockets passed by socket activation take precedence over new ones.

    With `required`, one of the two is the only input there can be.
    """
    _use_passed_sockets(listeners)
    if listeners.plugin is None:
        if socket_path is not None:
            listeners.plugin = _plugin_socket(socket_path, mode)
    elif socket_path is not None and socket_path.resolve() != listeners.plugin.path.resolve():
        fail(f"--socket: is {socket_path}, but the passed socket is at {listeners.plugin.path}")
    if listeners.http_log is None:
        if http_log is not None:
            listeners.http_log = _http_log_socket(http_log, mode)
    elif http_log is not None and not _is_at(listeners.http_log, http_log):
        fail(f"--http-log: is {http_log}, but the passed socket is at {listeners.http_log.name}")
    if required and listeners.plugin is None and listeners.http_log is None:
        fail("serve needs --socket, --http-log or --segments as an input for Kong's requests", os.EX_USAGE)


def _use_passed_sockets(listeners: Listeners) -> None:
    try:
        use_passed_sockets(listeners)
    except ActivationError as error:
        fail(f"socket activation: {error}")
    for listener in listeners.unreachable:
        get_logger().error(
            "passed_socket_unreachable",
            socket=listener.name,
            reason="its file is gone, so no client can connect to it; a restart will lose events",
            remedy="restart its socket unit, and keep its folder while the service is stopped",
        )
    if "LISTEN_FDS" in os.environ:
        get_logger().warning(
            "sockets_passed_to_another_process",
            consequence="they are not served",
            remedy="start openmeter-plugin with no shell or other process in between",
        )
        clear_environment()


def _plugin_socket(path: Path, mode: int) -> UnixListener:
    try:
        return UnixListener(path, mode)
    except OSError as error:
        fail(f"--socket: cannot listen on {path}: {error.strerror or error}")


def _http_log_socket(address: str, mode: int) -> Listener:
    try:
        return listen_on(address, mode)
    except ValueError as error:
        fail(f"--http-log: {error}", os.EX_USAGE)
    except OSError as error:
        fail(f"--http-log: cannot listen on {address}: {error.strerror or error}")


def _is_at(listener: Listener, address: str) -> bool:
    """Return whether a socket may match an option. Only the port is compared: a host has many names."""
    scheme, _, path = address.partition(":")
    if scheme == "unix" or isinstance(listener, UnixListener):
        return isinstance(listener, UnixListener) and listener.path.resolve() == Path(path).resolve()
    return address.endswith((f":{listener.port}", ":0"))


def http_log_settings(listener: Listener | None, path: Path) -> HttpLogConfig | None:
    """Return the validated settings for the http-log input, before it receives anything."""
    if listener is None:
        return None
    import ipaddress

    from openmeter_plugin.config.instance_config import ConfigError
    from openmeter_plugin.http_log import config as http_log_config

    try:
        config = http_log_config.load(path)
    except ConfigError as error:
        fail(f"--http-log-config: {error}")
    if (
        not config.settings.secret
        and isinstance(listener, TcpListener)
        and not ipaddress.ip_address(listener.address).is_loopback
    ):
        fail(f"http_log.secret: is required in {path}, because {listener.name} is not a loopback address")
    return config


def gate_settings(listeners: Listeners, path: Path | None) -> Settings | None:
    """Return the validated settings of the gate, and listen on its socket, if --gate is set."""
    if path is None:
        return None
    from openmeter_plugin.config.instance_config import ConfigError
    from openmeter_plugin.gate import settings as gate

    try:
        settings = gate.load(path)
    except ConfigError as error:
        fail(f"--gate: {error}")
    try:
        listeners.gate = UnixListener(settings.socket, int(settings.socket_mode, 8))
    except OSError as error:
        fail(f"--gate: {path}: socket: cannot listen on {settings.socket}: {error.strerror or error}")
    return settings


def listen_for_api(listeners: Listeners, address: str | None, token_file: Path | None) -> Access | None:
    """Listen for the HTTP API if --api is set, and return its access rules."""
    if address is None:
        return None
    from openmeter_plugin.api import access

    try:
        listeners.api = listen_on(address, API_MODE)
        return access.load_access(listeners.api, token_file)
    except ValueError as error:  # AccessError among them
        fail(f"--api: {error}", os.EX_USAGE)
    except OSError as error:
        fail(f"--api: {error.filename or address}: {error.strerror or error}")


def parse_mode(text: str, option: str) -> int:
    """Return the file mode of an option."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        fail(f"{option}: {text} is not an octal mode such as 0660", os.EX_USAGE)
    return mode
