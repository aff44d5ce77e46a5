"""Who may use the HTTP API: decided before anything of a request but its head is read."""

from __future__ import annotations

import hmac
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.process.sockets import Listener, TcpListener

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN_VARIABLE: Final = "OPENMETER_PLUGIN_ADMIN_TOKEN"  # noqa: S105 - a name
SHORTEST_TOKEN: Final = 16
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""For probes, which have no secrets to give; their answers hold none either."""

_LARGEST_BODY: Final = 1024 * 1024
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class AccessError(ValueError):
    """The API cannot be offered so."""


@dataclass(frozen=True, slots=True)
class Access:
    """The token, and the names by which clients may call the API."""

    file: Path | None = None
    text: str = field(default="", repr=False)
    hosts: frozenset[str] | None = None
    """None: any."""

    @property
    def needs_token(self) -> bool:
        """Whether there is a token."""
        return self.file is not None or bool(self.text)

    def token(self) -> str:
        """Return the token as it is now: it may be replaced while we run; raises AccessError, OSError."""
        token = self.file.read_text().strip() if self.file is not None else self.text
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
            raise AccessError(f"the token must have at least {SHORTEST_TOKEN} printable ASCII characters")
        return token


def access(listener: Listener, file: Path | None, environment: Mapping[str, str] = os.environ) -> Access:
    """Return who may use what is offered there; raises AccessError, OSError."""
    text = "" if file is not None else environment.get(TOKEN_VARIABLE, "").strip()
    hosts = None
    if isinstance(listener, TcpListener) and ipaddress.ip_address(listener.address).is_loopback:
        # A web page can have its visitor's browser call a loopback address, under a name of its own.
        hosts = frozenset({"localhost", "127.0.0.1", "::1", listener.address})
    found = Access(file, text, hosts)
    if found.needs_token:
        found.token()
    elif TOKEN_VARIABLE in environment:
        # Set but empty is a token that did not arrive, which must not mean that none is asked for.
        raise AccessError(f"{TOKEN_VARIABLE} is empty")
    elif isinstance(listener, TcpListener):
        raise AccessError(
            f"over TCP a token is required, by --api-token-file or {TOKEN_VARIABLE}; a Unix socket needs none"
        )
    return found


class AccessMiddleware:
    """Lets requests through to the API, or answers them."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._limit = RateLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        from openmeter_plugin.api.problems import problem

        status, detail, headers = refusal
        if self._limit.passes():
            get_logger().warning("api_refused", status=status, reason=detail)
        await problem(status, detail, headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str, dict[str, str]] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._access.hosts is not None and _host(headers.get("host", "")) not in self._access.hosts:
            return 421, "call this address by the name localhost or by its number, not by another name", {}
        if scope["path"] not in OPEN_PATHS and self._access.needs_token:
            refusal = self._token_refusal(headers.get("authorization", ""))
            if refusal is not None:
                return refusal
        if scope["method"] in _WITH_BODY:
            length = headers.get("content-length", "")
            if not (length.isascii() and length.isdecimal()):
                return 411, "the body's length is needed: send it with Content-Length", _CLOSE
            if int(length[:12]) > _LARGEST_BODY:
                return 413, f"a body may have {_LARGEST_BODY} bytes", _CLOSE
        return None

    def _token_refusal(self, authorization: str) -> tuple[int, str, dict[str, str]] | None:
        try:
            token = self._access.token()
        except (OSError, ValueError):
            return 503, "the file with this API's token cannot be used at the moment", _CLOSE
        scheme, _, given = authorization.partition(" ")
        # Compared in constant time: the time of an answer must not tell how much of a guess was right.
        fits = hmac.compare_digest(given.strip().encode(), token.encode())
        if scheme.lower() == "bearer" and fits:
            return None
        return 401, "send this API's token as Authorization: Bearer", _CLOSE | {"www-authenticate": "Bearer"}


_CLOSE: Final = {"connection": "close"}
"""A body that was not read would stand before the next request."""


def _host(header: str) -> str:
    """Return the name or number in a Host header, without the port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
