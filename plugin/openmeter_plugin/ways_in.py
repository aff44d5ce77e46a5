"""Opening the ways in that a command line asks for, or ending with a sentence that names the option."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

from openmeter_plugin.command_line import fail
from openmeter_plugin.listening import HttpLogSocket, Listeners, TcpListeningSocket, listen_for_http_log

if TYPE_CHECKING:
    from openmeter_plugin.http_log_config import HttpLogConfig
    from openmeter_plugin.operations.access import Access

API_MODE: Final = 0o600  # of a Unix socket: without a token, its owner may use the API


def own_socket(listener: HttpLogSocket | None) -> socket.socket | None:
    """Return a socket object of this process for the listening socket that it inherited."""
    return None if listener is None else socket.socket(fileno=os.dup(listener.socket.fileno()))


def http_log_socket(address: str, mode: int) -> HttpLogSocket:
    """Listen for http-log's posts."""
    try:
        return listen_for_http_log(address, mode)
    except ValueError as error:
        fail(f"--http-log: {error}", os.EX_USAGE)
    except OSError as error:
        fail(f"--http-log: cannot listen on {address}: {error.strerror or error}")


def http_log_settings(listener: HttpLogSocket | None, path: Path) -> HttpLogConfig | None:
    """Return the settings for what listens, checked, before anything is received."""
    if listener is None:
        return None
    import ipaddress

    from openmeter_plugin import http_log_config
    from openmeter_plugin.config import ConfigError

    try:
        config = http_log_config.load(path)
    except ConfigError as error:
        fail(f"--http-log-config: {error}")
    if (
        not config.settings.secret
        and isinstance(listener, TcpListeningSocket)
        and not ipaddress.ip_address(listener.address).is_loopback
    ):
        fail(f"http_log.secret: is required in {path} to listen on {listener.name}, which is not loopback")
    return config


def listen_for_api(listeners: Listeners, address: str | None, token_file: Path | None) -> Access | None:
    """Listen for the HTTP API where one is wanted, and return who may use it."""
    if address is None:
        return None
    from openmeter_plugin.operations import access

    try:
        listeners.api = listen_for_http_log(address, API_MODE)
        return access.access(listeners.api, token_file)
    except ValueError as error:  # AccessError among them
        fail(f"--api: {error}", os.EX_USAGE)
    except OSError as error:
        fail(f"--api: {error.filename or address}: {error.strerror or error}")


def octal(text: str, option: str) -> int:
    """Return the mode that an option names."""
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        fail(f"{option}: {text} is not an octal mode such as 0660", os.EX_USAGE)
    return mode
