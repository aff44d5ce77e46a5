"""What every answer of the dashboard carries, and how its cookie and its forms are read."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from syncd.dashboard.session import is_id

HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none';"
        " base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: that would have browsers send our own forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_LARGEST_FORM: Final = 16 * 1024
_MOST_FIELDS: Final = 30
_FORM_SECONDS: Final = 10.0


class FormError(Exception):
    """The body is no form of ours."""


class SecureHeaders:
    """Puts `HEADERS` on every answer, and forbids keeping what does not say otherwise."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers)


def cookie_name(*, secure: bool) -> str:
    """Return the cookie's name; with this prefix browsers take it over https from this very host only."""
    return "__Host-syncd-session" if secure else "syncd-session"


def visitor_id(request: Request, *, secure: bool) -> str | None:
    """Return the id in the visitor's cookie, None where there is none that could be ours."""
    given = request.cookies.get(cookie_name(secure=secure), "")
    return given if is_id(given) else None


def set_visitor_id(response: Response, identity: str, *, secure: bool) -> None:
    """Give the visitor a cookie, which ends with the browser at the latest."""
    response.set_cookie(
        cookie_name(secure=secure), identity, path="/", secure=secure, httponly=True, samesite="strict"
    )


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form; raises FormError. Of a field that comes twice the last one counts."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise FormError("send the form as application/x-www-form-urlencoded")
    try:
        async with asyncio.timeout(_FORM_SECONDS):
            body = await _body(request)
    except TimeoutError:
        raise FormError(f"the form did not come within {_FORM_SECONDS:.0f} s") from None
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError:
        raise FormError("the form cannot be read") from None
    return dict(fields)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_FORM:
            raise FormError(f"a form may have {_LARGEST_FORM} bytes")
    return bytes(body)
