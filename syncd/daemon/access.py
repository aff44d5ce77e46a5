"""Host and Origin checks of the daemon, against requests forged by web pages.

A web page can make its visitor's browser send requests to this daemon from inside the network, and, once its
name resolves to a loopback address (DNS rebinding), even as if it were the daemon's own page. Therefore
without a token only loopback names are answered, and requests from another origin never change anything.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

PROBE_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""Health probes, answered under any host name; their answers hold no secrets."""

_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OWN_SITE: Final = frozenset({"same-origin", "none"})


class AccessMiddleware:
    """ASGI middleware that rejects forged requests. `public_url` is the setting daemon.public_url."""

    def __init__(
        self, app: ASGIApp, has_token: Callable[[], bool], public_url: Callable[[], str | None]
    ) -> None:
        self._app = app
        self._has_token = has_token
        self._public_url = public_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        status, detail = refusal
        # The body was not read, so the connection cannot be reused.
        response = JSONResponse({"detail": detail}, status, {"Connection": "close"})
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        path = scope["path"]
        if path not in PROBE_PATHS and not self._has_token() and not is_loopback(headers.get("host", "")):
            return 421, "use localhost or 127.0.0.1 for this address; other host names need daemon.token"
        if scope["method"] not in _SAFE_METHODS and is_cross_origin(headers, self._public_url()):
            return 403, (
                "the request comes from a page of another origin. Behind a reverse proxy that changes Host,"
                " set daemon.public_url"
            )
        return None


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
