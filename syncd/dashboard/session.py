"""Who is logged in, and which form is ours: random session ids, kept in memory, gone with the process.

The cookie holds a random id and nothing else. A visitor who is not logged in has an id too, so that the
login form, and all forms where the daemon has no token, can be told from forged ones.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LIFETIME: Final = 12 * 3600.0  # seconds, whatever happens
IDLE: Final = 3600.0  # seconds without a request

_MAX_SESSIONS: Final = 200
_MAX_ADDRESSES: Final = 1000
_ID: Final = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(slots=True)
class _Session:
    token: bytes
    begun: float
    seen: float


class Sessions:
    """Sessions of this process; safe to use from any thread.

    A session ends by logout, after `LIFETIME`, after `IDLE` without a request, and when the daemon's
    token is another than the one it was opened with.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Session] = OrderedDict()

    def begin(self, token: str) -> str:
        """Open a session and return its id; the oldest ends where there are too many."""
        identity, now = new_id(), self._clock()
        with self._lock:
            self._open[identity] = _Session(self._digest(token), now, now)
            while len(self._open) > _MAX_SESSIONS:
                self._open.popitem(last=False)
        return identity

    def is_open(self, identity: str, token: str) -> bool:
        """Tell whether this is the id of a session that was opened with the token of now."""
        now = self._clock()
        with self._lock:
            session = self._open.get(identity)
            if session is None:
                return False
            lives = now - session.begun < LIFETIME and now - session.seen < IDLE
            if not lives or not hmac.compare_digest(session.token, self._digest(token)):
                del self._open[identity]
                return False
            session.seen = now
            return True

    def end(self, identity: str) -> None:
        """Close a session."""
        with self._lock:
            self._open.pop(identity, None)

    def form_token(self, identity: str) -> str:
        """Return what a form of this visitor carries; only this process can make it."""
        return hmac.new(self._key, b"form " + identity.encode(), hashlib.sha256).hexdigest()

    def owns_form(self, identity: str, given: str) -> bool:
        """Tell whether a form was made for this visitor."""
        return hmac.compare_digest(self.form_token(identity).encode(), given.encode())

    def _digest(self, token: str) -> bytes:
        return hmac.new(self._key, b"token " + token.encode(), hashlib.sha256).digest()


def new_id() -> str:
    """Return an id that nobody can guess: 256 bits."""
    return secrets.token_urlsafe(32)


def is_id(text: str) -> bool:
    """Tell whether this could be an id of ours."""
    return _ID.fullmatch(text) is not None


class LoginLimit:
    """How often a token may be tried, right or wrong: by address, and by all addresses together.

    Behind a reverse proxy all come from one address. What is right is forgiven.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        by_address: int = 5,
        by_all: int = 50,
        seconds: float = 60.0,
    ) -> None:
        self._clock = clock
        self._by_address = by_address
        self._by_all = by_all
        self._seconds = seconds
        self._lock = threading.Lock()
        self._tried: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque()

    def admit(self, address: str) -> float:
        """Count an attempt and return 0, or the seconds until the next one may be made."""
        now = self._clock()
        with self._lock:
            tried = self._tried.setdefault(address, deque())
            self._tried.move_to_end(address)
            while len(self._tried) > _MAX_ADDRESSES:
                self._tried.popitem(last=False)
            for times, most in ((tried, self._by_address), (self._all, self._by_all)):
                while times and now - times[0] >= self._seconds:
                    times.popleft()
                if len(times) >= most:
                    return self._seconds - (now - times[0])
            tried.append(now)
            self._all.append(now)
            return 0.0

    def forgive(self, address: str) -> None:
        """Forget the attempts of an address whose token was right."""
        with self._lock:
            mine = self._tried.pop(address, deque())
            for when in mine:
                if when in self._all:
                    self._all.remove(when)


# MERGED: What every answer of the dashboard carries, and how its cookie and its forms are read.

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
_MAX_FIELDS: Final = 30
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
        fields = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
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
