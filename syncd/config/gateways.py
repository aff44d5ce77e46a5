"""Settings of the gateways whose books `syncd audit` and the dashboard read."""

from __future__ import annotations

from datetime import timedelta
from pathlib import PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, TypeAdapter

from syncd.config.types import ConnectionConfig, Duration, HttpUrl, Token

_UNIX = "unix:"
_HTTP_URL: TypeAdapter[str] = TypeAdapter(HttpUrl)


def _gateway_url(value: str) -> str:
    if not value.startswith(_UNIX):
        return _HTTP_URL.validate_python(value)
    if not PurePosixPath(value.removeprefix(_UNIX)).is_absolute():
        raise ValueError("a Unix socket needs an absolute path, such as unix:/run/openmeter/api")
    return value


def _not_empty(value: SecretStr) -> SecretStr:
    if not value.get_secret_value():
        raise ValueError("must not be empty")
    return value


def _host_and_port(value: str) -> str:
    parts = urlsplit(f"//{value}")
    try:
        valid = parts.hostname is not None and parts.port != 0 and not (parts.path or parts.username)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError("must be a host, or host:port, such as openmeter:8888")
    return value.lower()


GatewayUrl = Annotated[str, AfterValidator(_gateway_url)]
Host = Annotated[str, AfterValidator(_host_and_port)]


class GatewayConfig(ConnectionConfig):
    """A gateway: address and token of its plugin's API (`openmeter-plugin serve --api`)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Unique name for messages."""
    url: GatewayUrl
    """URL of the plugin's API (`serve --api`): `http(s)://host:port`, or `unix:/path` on this machine."""
    token: Annotated[Token, AfterValidator(_not_empty)] | None = None
    """The token in `--api-token-file` or `OPENMETER_PLUGIN_ADMIN_TOKEN` on the gateway."""
    timeout: Duration = timedelta(seconds=10)
    """Limit for each step of a request: connect, send, each read. The whole request may take three times as
    long."""
    metering_hosts: tuple[Host, ...] = ()
    """Other hosts (host, or host:port) through which this gateway's events reach `metering.url`."""


def check_unique(gateways: tuple[GatewayConfig, ...]) -> tuple[GatewayConfig, ...]:
    """Return the gateways; raises ValueError if two have the same name or the same URL."""
    names = [gateway.name for gateway in gateways]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two gateways are called {', '.join(duplicates)}; give each its own name")
    urls = [gateway.url for gateway in gateways]
    if duplicates := sorted({url for url in urls if urls.count(url) > 1}):
        raise ValueError(f"{', '.join(duplicates)} is listed twice, so its events would be counted twice")
    return gateways
