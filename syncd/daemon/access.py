"""Access control of the daemon: decides from a request's head, before its body is read.

The HTTP API takes the token with each request; the dashboard has its own login and sessions. Both count
wrong tokens together. A body needs a length that is not too long, as in the plugin's API.

A web page can make its visitor's browser send requests to this daemon from inside the network, and, once its
name resolves to a loopback address (DNS rebinding), even as if it were the daemon's own page. Therefore
without a token only loopback names are answered, and requests from another origin never change anything.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from openmeter_plugin.api.access import body_refusal, head_as_get
from syncd.dashboard.session import LoginLimit, is_token
from syncd.dashboard.web import ROOT

PROBE_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""Health probes, answered without a token and under any host name; their answers hold no secrets."""
DASHBOARD_PATHS: Final = frozenset({"/", ROOT})
"""With everything below `ROOT`: they have a login of their own."""

_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITE: Final = frozenset({"same-origin", "none"})


_log = structlog.get_logger("syncd.daemon.access")

_Refusal = tuple[int, str, dict[str, str]]


class AccessMiddleware:
    """ASGI middleware that refuses forged requests, requests without the token, and bodies too long.

    `public_url` is the setting daemon.public_url.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: Callable[[], str | None],
        public_url: Callable[[], str | None],
        limit: LoginLimit,
    ) -> None:
        self._app = app
        self._token = token
        self._public_url = public_url
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(head_as_get(scope), receive, send)
            return
        status, detail, headers = refusal
        # The body was not read, so the connection cannot be reused.
        response = JSONResponse({"detail": detail}, status, {"Connection": "close", **headers})
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> _Refusal | None:
        headers = Headers(scope=scope)
        path, token = scope["path"], self._token()
        if path not in PROBE_PATHS and token is None and not is_loopback(headers.get("host", "")):
            return 421, "use localhost or 127.0.0.1 for this address; other host names need daemon.token", {}
        if scope["method"] not in _SAFE_METHODS and is_cross_origin(headers, self._public_url()):
            detail = (
                "the request comes from a page of another origin. Behind a reverse proxy that changes Host,"
                " set daemon.public_url"
            )
            return 403, detail, {}
        if token is not None and not _has_own_check(path):
            address = scope["client"][0] if scope.get("client") else ""
            if (refusal := self._token_refusal(headers.get("authorization", ""), token, address)) is not None:
                return refusal
        unread = body_refusal(scope["method"], headers)
        return None if unread is None else (*unread, {})

    def _token_refusal(self, authorization: str, token: str, address: str) -> _Refusal | None:
        """Refuse a wrong token; the right one always passes, so that a stranger locks nobody out."""
        scheme, _, given = authorization.partition(" ")
        if is_token(given, token) and scheme.lower() == "bearer":
            return None
        if given.strip():
            if wait := self._limit.admit(address):
                return 429, f"too many wrong tokens; try again in {math.ceil(wait)} s", {}
            _log.warning("token_refused", address=address)  # the limit bounds the log as well
        detail = "send the value of daemon.token as Authorization: Bearer"
        return 401, detail, {"WWW-Authenticate": "Bearer"}


def _has_own_check(path: str) -> bool:
    return path in PROBE_PATHS or path in DASHBOARD_PATHS or path.startswith(f"{ROOT}/")


def is_loopback(host_header: str) -> bool:
    """Return whether a Host header names a loopback address."""
    try:
        host = urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_cross_origin(headers: Mapping[str, str], public_url: str | None = None) -> bool:
    """Return whether a browser sent this for a page of another origin.

    Sec-Fetch-Site is the browser's own verdict, sent over https and to loopback. Origin is the older header;
    programs send neither. ``Origin: null`` (a sandboxed page) is another origin.
    """
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in _OWN_SITE
    if (origin := headers.get("origin")) is None:
        return False
    own = {headers.get("host", "").lower()}
    if public_url:
        own.add(urlsplit(public_url).netloc.lower())
    return urlsplit(origin).netloc.lower() not in own - {""}
