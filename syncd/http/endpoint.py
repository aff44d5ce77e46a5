"""Where an API is and how to connect to it: URL, token, certificates, proxy, limits of time."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import httpx

from openmeter_plugin.network.proxies import Proxy, chosen_proxy, environment_proxy
from openmeter_plugin.network.tls import Tls, TlsError
from syncd import __version__
from syncd.core.errors import ConfigError

Api = Literal["metering", "kong-admin", "konnect", "plugin", "daemon"]
"""An API by the identifier that the metrics label it with."""

_NAMES: dict[Api, str] = {
    "metering": "metering API",
    "kong-admin": "Kong's Admin API",
    "konnect": "Konnect",
    "plugin": "the plugin's API",
    "daemon": "the daemon",
}
"""How messages call each API."""


def variable_of(setting: str) -> str:
    """Return the environment variable of a setting such as ``sources[0].token``."""
    return "SYNCD_" + re.sub(r"\[(\d+)\]", r"__\1", setting).replace(".", "__").upper()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an API is, and the token for it.

    `token_setting` is the name of the setting that holds the token, and `rights` are the permissions that
    the token needs; both are for the message of a 401 or 403. With `unix_socket`, a path, the requests go
    there. `proxy` is a URL; without it, the environment's proxy is used (`openmeter_plugin.network.proxies`).
    """

    api: Api
    url: str
    token_setting: str
    rights: str
    token_header: str = "Authorization"  # noqa: S105 - a header's name
    token: str | None = None
    timeout: float = 10.0
    unix_socket: str | None = None
    tls: Tls = field(default_factory=Tls)
    proxy: str | None = None
    max_answer_bytes: int = 256 * 1024 * 1024
    """Limit for an answer after unpacking; a list of a million subject entities has half of that."""

    @property
    def location(self) -> str:
        """Return name and address of the API, for messages."""
        return f"{_NAMES[self.api]} at {f'unix:{self.unix_socket}' if self.unix_socket else self.url}"

    @property
    def section(self) -> str:
        """Return the section of the configuration that describes it, such as ``sources[0]``."""
        return self.token_setting.rpartition(".")[0]

    def headers(self) -> dict[str, str]:
        """Return the headers of every request; raises ConfigError for a token that no header can hold."""
        headers = {"User-Agent": f"kong-openmeter-syncd/{__version__}", "Accept": "application/json"}
        if self.token:
            if not self.token.isascii() or not self.token.isprintable() or self.token != self.token.strip():
                raise ConfigError(
                    f"{self.token_setting} (environment: {variable_of(self.token_setting)}): no HTTP header"
                    " can hold this token: it has a line break, a space at an end, or a character that is not"
                    " printable ASCII. Was it copied with its line's end?"
                )
            bearer = self.token_header == "Authorization"  # noqa: S105 - a header's name
            headers[self.token_header] = f"Bearer {self.token}" if bearer else self.token
        return headers

    def parsed_url(self) -> httpx.URL:
        """Return the URL in its parts; raises ConfigError."""
        try:
            return httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self.section}.url is not a URL: {error}") from None

    def resolved_proxy(self) -> Proxy | None:
        """Return the proxy for its requests, None if they go directly; raises ConfigError."""
        if self.unix_socket:
            return None
        url = self.parsed_url()
        try:
            if self.proxy:
                return chosen_proxy(self.proxy, f"{self.section}.proxy", url.host)
            return environment_proxy(url.scheme, url.host, url.port)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def tls_context(self) -> ssl.SSLContext:
        """Return the settings for TLS; raises ConfigError."""
        try:
            return self.tls.context()
        except TlsError as error:
            names = ", ".join(f"{self.section}.{name}" for name in error.settings)
            raise ConfigError(f"{names}: {error}" if names else str(error)) from None

    def secrets(self) -> tuple[str, ...]:
        """Return what no message may show."""
        return (self.token,) if self.token else ()


def check_endpoint(endpoint: Endpoint) -> None:
    """Check all that can be checked without a request; raises ConfigError, which names the setting."""
    url, tls = endpoint.parsed_url(), endpoint.tls
    named = [name for name in ("ca_file", "client_cert", "client_key") if getattr(tls, name)]
    if named and (url.scheme != "https" or endpoint.unix_socket):
        raise ConfigError(
            f"{endpoint.section}.{named[0]} needs TLS, but {endpoint.section}.url does not start with https://"
        )
    if tls.client_key and not tls.client_cert:
        raise ConfigError(f"{endpoint.section}.client_key needs {endpoint.section}.client_cert")
    if named:
        endpoint.tls_context()
    endpoint.resolved_proxy()
    endpoint.headers()


@cache
def no_tls() -> ssl.SSLContext:
    """Return TLS settings for plain HTTP: they trust no certificate, should one ever be needed."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
