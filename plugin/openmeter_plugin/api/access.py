"""Access control of the HTTP API: decides from a request's head, before its body is read."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.process.sockets import Listener, TcpListener, host_of, loopback_hosts

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

TOKEN_VARIABLE: Final = "OPENMETER_PLUGIN_ADMIN_TOKEN"  # noqa: S105 - a name
MIN_TOKEN_LENGTH: Final = 16
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""For probes, which send no token; the answers contain no secrets."""

_MAX_BODY: Final = 1024 * 1024
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class AccessError(ValueError):
    """The API cannot be served with these options."""


@dataclass(frozen=True, slots=True)
class Access:
    """The token, and the host names that clients may use."""

    file: Path | None = None
    text: str = field(default="", repr=False)
    hosts: frozenset[str] | None = None
    """None: any."""

    @property
    def needs_token(self) -> bool:
        """Whether requests need a token."""
        return self.file is not None or bool(self.text)

    def token(self) -> str:
        """Return the current token; the file may be replaced at any time. Raises AccessError, OSError."""
        token = self.file.read_text().strip() if self.file is not None else self.text
        if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable():
            raise AccessError(f"the token must have at least {MIN_TOKEN_LENGTH} printable ASCII characters")
        return token


def load_access(listener: Listener, file: Path | None, environment: Mapping[str, str] = os.environ) -> Access:
    """Return the access rules for a listening socket; raises AccessError, OSError."""
    text = "" if file is not None else environment.get(TOKEN_VARIABLE, "").strip()
    found = Access(file, text, loopback_hosts(listener.socket))
    if found.needs_token:
        found.token()
    elif TOKEN_VARIABLE in environment:
        # An empty variable is a token that was lost on the way; it must not open the API to everyone.
        raise AccessError(f"{TOKEN_VARIABLE} is empty")
    elif isinstance(listener, TcpListener):
        raise AccessError(
            f"over TCP a token is required, by --api-token-file or {TOKEN_VARIABLE}; a Unix socket needs none"
        )
    return found


class AccessMiddleware:
    """Passes permitted requests to the API and refuses the others."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._limit = RateLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(head_as_get(scope), receive, send)
            return
        from openmeter_plugin.api.problems import problem

        status, detail, headers = refusal
        if self._limit.passes():
            get_logger().warning("api_refused", status=status, reason=detail)
        await problem(status, detail, headers)(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str, dict[str, str]] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._access.hosts is not None and host_of(headers.get("host", "")) not in self._access.hosts:
            return 421, "use localhost or the IP address in the URL; other host names are not allowed", {}
        if scope["path"] not in OPEN_PATHS and self._access.needs_token:
            refusal = self._token_refusal(headers.get("authorization", ""))
            if refusal is not None:
                return refusal
        unread = body_refusal(scope["method"], headers)
        return None if unread is None else (*unread, _CLOSE)

    def _token_refusal(self, authorization: str) -> tuple[int, str, dict[str, str]] | None:
        try:
            token = self._access.token()
        except (OSError, ValueError):
            return 503, "this API's token file is currently unusable", _CLOSE
        scheme, _, given = authorization.partition(" ")
        # In constant time, so that the response time does not reveal how much of a guess was right.
        matches = hmac.compare_digest(given.strip().encode(), token.encode())
        if scheme.lower() == "bearer" and matches:
            return None
        return (
            401,
            "send this API's token in the header Authorization: Bearer",
            _CLOSE | {"www-authenticate": "Bearer"},
        )


_CLOSE: Final = {"connection": "close"}
"""Closes the connection: an unread body would be parsed as the next request."""


def head_as_get(scope: Scope) -> Scope:
    """Return the scope with GET for HEAD, which FastAPI's routes do not know. uvicorn leaves out the body."""
    if scope["type"] == "http" and scope["method"] == "HEAD":
        return {**scope, "method": "GET"}
    return scope


def body_refusal(method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Return status and detail for a body that must not be read: of unknown length, or too long.

    `headers` by lower-case name. Close the connection afterwards: the body is still on its way. syncd's API
    has the same rule.
    """
    if method not in _WITH_BODY:
        return None
    # RFC 9112, section 6.3: with neither header there is no body.
    length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
    if not (length.isascii() and length.isdecimal()):
        return 411, "a Content-Length header is required"
    if int(length[:12]) > _MAX_BODY:
        return 413, f"a body may have at most {_MAX_BODY} bytes"
    return None
