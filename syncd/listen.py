"""The address that the daemon listens on."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from syncd.errors import DaemonError

# "Every address of this machine" is one to listen on, not one to connect to.
_UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


@dataclass(frozen=True, slots=True)
class Listen:
    """Host and port; port 0 takes any free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, value: object) -> object:
        """Return the address written as ``host:port`` or ``[v6]:port``; raises ValueError."""
        if isinstance(value, cls) or not isinstance(value, str):
            return value
        host, _, port = value.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError("must be host:port, such as 127.0.0.1:8890")
        return cls(host, int(port))

    def __str__(self) -> str:
        """Return it as it is written in the configuration."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """Return the base URL for a client on this machine."""
        host = _UNSPECIFIED.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}"


@contextmanager
def listening(address: Listen) -> Iterator[socket.socket]:
    """Listen on an address; raises DaemonError."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        raise DaemonError(
            f"cannot listen on {address.host}:{address.port} (daemon.listen): {error.strerror or error}"
        ) from None
    with listener:
        yield listener
