"""The settings of each gateway whose plugin is asked for its books: `syncd audit`, the dashboard."""

from __future__ import annotations

from datetime import timedelta
from pathlib import PurePosixPath
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, TypeAdapter

from syncd.config.types import Duration, HttpUrl, Section

_UNIX = "unix:"
_HTTP_URL: TypeAdapter[str] = TypeAdapter(HttpUrl)


def _gateway_url(value: str) -> str:
    if not value.startswith(_UNIX):
        return _HTTP_URL.validate_python(value)
    if not PurePosixPath(value.removeprefix(_UNIX)).is_absolute():
        raise ValueError("a Unix socket is written as unix:/run/openmeter/api, with its whole path")
    return value


def _sendable(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if not text or not text.isascii() or not text.isprintable():
        raise ValueError("must be printable ASCII characters, as the plugin asks for")
    return value


def _host_and_port(value: str) -> str:
    parts = urlsplit(f"//{value}")
    try:
        right = parts.hostname is not None and parts.port != 0 and not (parts.path or parts.username)
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment:
        raise ValueError("must be a host, or host:port, such as openmeter:8888")
    return value.lower()


GatewayUrl = Annotated[str, AfterValidator(_gateway_url)]
Host = Annotated[str, AfterValidator(_host_and_port)]


class GatewayConfig(Section):
    """A gateway: where its plugin's API is (`openmeter-plugin serve --api`), and the token for it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """For messages; unique."""
    url: GatewayUrl
    """Of the plugin's API (`serve --api`): `http(s)://host:port`, or `unix:/path` on this machine."""
    token: Annotated[SecretStr, AfterValidator(_sendable)] | None = None
    """That of `--api-token-file` or `OPENMETER_PLUGIN_ADMIN_TOKEN` there."""
    timeout: Duration = timedelta(seconds=10)
    """For each request."""
    metering_hosts: tuple[Host, ...] = ()
    """Other names (host, or host:port) by which this gateway's events reach `metering.url`."""


def named_apart(gateways: tuple[GatewayConfig, ...]) -> tuple[GatewayConfig, ...]:
    """Return the gateways; raises ValueError where two have one name, or one API is listed twice."""
    names = [gateway.name for gateway in gateways]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two gateways are called {', '.join(twice)}; give each a name of its own")
    urls = [gateway.url for gateway in gateways]
    if twice := sorted({url for url in urls if urls.count(url) > 1}):
        raise ValueError(f"{', '.join(twice)} is listed twice: its events would be expected twice")
    return gateways
