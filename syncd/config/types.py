"""Types that the sections of the configuration share: durations, URLs, labels, addresses."""

from __future__ import annotations

import ipaddress
import re
import socket
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema

from openmeter_plugin.network.tls import Tls
from syncd.core.errors import DaemonError
from syncd.core.ownership import RESERVED_KEYS
from syncd.http.endpoint import Endpoint, check_endpoint

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+)\s*([smhd])")


def _duration(value: object) -> object:
    if isinstance(value, timedelta):
        return value
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError("a duration is a number and a unit, such as 30s, 5m or 1h")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    if parts.username or parts.password:
        raise ValueError("must not contain a user or a password; use token")
    if parts.query or parts.fragment:
        raise ValueError("must end with the path, without ? or #")
    return value.rstrip("/")


# Wider than what the v3 API takes (`team-a-1`): ownership metadata hold a stand-in for the rest.
_LABEL = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*")


def _label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError("must be 1 to 63 letters and digits, with single dashes between them")
    return value


def _header_text(value: SecretStr) -> SecretStr:
    # Secrets that come from files end with a line break more often than not.
    text = value.get_secret_value().strip()
    if not text.isascii() or not text.isprintable():
        raise ValueError("contains characters that no HTTP header can hold; it must be printable ASCII")
    return SecretStr(text)


def _storable(value: str) -> str:
    if any(unicodedata.category(char) == "Cc" for char in value):
        raise ValueError("must not contain control characters")
    return value


def _storable_map(value: dict[str, str]) -> dict[str, str]:
    for text in (*value, *value.values()):
        _storable(text)
    return value


def _not_reserved(value: dict[str, str]) -> dict[str, str]:
    if taken := sorted(RESERVED_KEYS & value.keys()):
        raise ValueError(f"cannot set {', '.join(taken)}: reserved for syncd's own metadata")
    return value


Duration = Annotated[
    timedelta,
    BeforeValidator(_duration),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\s*[0-9]+\s*[smhd]\s*$", "examples": ["30s", "5m", "1h"]}
    ),
]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
Token = Annotated[SecretStr, AfterValidator(_header_text)]
"""A secret that is sent in a header; white space around it is dropped."""
Key = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_storable)]
Tag = Annotated[str, Field(min_length=1, pattern=r"^[^,/]+$")]
Label = Annotated[str, AfterValidator(_label)]
Metadata = Annotated[dict[str, str], AfterValidator(_not_reserved), AfterValidator(_storable_map)]


class Section(BaseModel):
    """A section of the configuration: immutable, and unknown settings are errors.

    The docstring of a field is its text in docs/syncd-settings.md (`tests.settings_reference`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


# Wildcard addresses are for listening; clients connect to loopback instead.
_UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


@dataclass(frozen=True, slots=True)
class Listen:
    """Host and port to listen on; port 0 takes any free one."""

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
        """Return the address as in the configuration."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Return whether only this machine can reach it."""
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


class ConnectionConfig(Section):
    """Settings that all HTTP APIs share. Files are relative to the configuration."""

    ca_file: Path | None = None
    """PEM file with the certificates of the authorities to trust, instead of the public ones. Needs https."""
    client_cert: Path | None = None
    """PEM file with the certificate that syncd identifies itself with; may hold its key, too."""
    client_key: Path | None = None
    """PEM file with the key of `client_cert`, without a password."""
    proxy: SecretStr | None = None
    """URL of the proxy for this API: `http://proxy:3128`. Unset: as HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and
    NO_PROXY say. Loopback and link-local addresses never pass a proxy."""

    @property
    def tls(self) -> Tls:
        """Return the files for TLS."""
        return Tls(self.ca_file, self.client_cert, self.client_key)

    @property
    def proxy_url(self) -> str | None:
        """Return the URL of the proxy, which may hold a password."""
        return self.proxy.get_secret_value() if self.proxy else None

    def check(self, section: str, url: str, token: SecretStr | None) -> None:
        """Check what can be checked without a request; raises ConfigError, which names the setting."""
        is_socket = url.startswith("unix:")
        check_endpoint(
            Endpoint(
                "metering",  # only for texts that this check does not use
                "http://localhost" if is_socket else url,
                f"{section}.token",
                "",
                token=token.get_secret_value() if token else None,
                unix_socket=url if is_socket else None,
                tls=self.tls,
                proxy=self.proxy_url,
            )
        )

    def in_folder(self, folder: Path) -> Self:
        """Return these settings with files relative to a folder."""
        files = {"ca_file": self.ca_file, "client_cert": self.client_cert, "client_key": self.client_key}
        return self.model_copy(
            update={name: folder / path.expanduser() for name, path in files.items() if path}
        )
