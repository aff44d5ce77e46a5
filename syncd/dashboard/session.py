"""Sessions, login limit, security headers, cookies and forms of the dashboard.

Sessions live in the memory of this process. The cookie holds a random id and nothing else. A visitor who is
not logged in has an id too, so that forged login forms, and forged forms of a daemon without a token, can be
detected.
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

LIFETIME: Final = 12 * 3600.0  # seconds, even if used
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
    """Sessions of this process; thread-safe.

    A session ends by logout, after `LIFETIME`, after `idle` seconds without a request, and when the daemon's
    token changes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, idle: float = IDLE) -> None:
        self._clock = clock
        self._idle = idle
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Session] = OrderedDict()

    def begin(self, token: str) -> str:
        """Open a session and return its id; if there are too many, the oldest ends."""
        identity, now = new_id(), self._clock()
        with self._lock:
            self._open[identity] = _Session(self._digest(token), now, now)
            while len(self._open) > _MAX_SESSIONS:
                self._open.popitem(last=False)
        return identity

    def is_open(self, identity: str, token: str) -> bool:
        """Return whether this is the id of a session that was opened with the current token."""
        now = self._clock()
        with self._lock:
            session = self._open.get(identity)
            if session is None:
                return False
            alive = now - session.begun < LIFETIME and now - session.seen < self._idle
            if not alive or not hmac.compare_digest(session.token, self._digest(token)):
                del self._open[identity]
                return False
            session.seen = now
            return True

    def end(self, identity: str) -> None:
        """Close a session."""
        with self._lock:
            self._open.pop(identity, None)

    def form_token(self, identity: str) -> str:
        """Return the token for this visitor's forms; only this process can make it."""
        return hmac.new(self._key, b"form " + identity.encode(), hashlib.sha256).hexdigest()

    def owns_form(self, identity: str, given: str) -> bool:
        """Return whether a form was issued to this visitor."""
        return hmac.compare_digest(self.form_token(identity).encode(), given.encode())

    def _digest(self, token: str) -> bytes:
        return hmac.new(self._key, b"token " + token.encode(), hashlib.sha256).digest()


def new_id() -> str:
    """Return an unguessable id of 256 bits."""
    return secrets.token_urlsafe(32)


def is_token(given: str, token: str) -> bool:
    """Return whether this is the token, in a time that does not show how much of a guess was right."""
    return hmac.compare_digest(given.strip().encode(), token.encode())


def is_id(text: str) -> bool:
    """Return whether this has the form of a session id."""
    return _ID.fullmatch(text) is not None


class LoginLimit:
    """Limits wrong tokens, by all doors: per address, and for all addresses together.

    The right token is never refused: behind a reverse proxy all come from one address, so a stranger could
    otherwise lock out the operator. What keeps it from being guessed is its length; this bounds log and load.
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
        """Count a wrong token and return 0, or return the seconds until the next one is counted."""
        now = self._clock()
        with self._lock:
            tried = self._tried.setdefault(address, deque())
            self._tried.move_to_end(address)
            while len(self._tried) > _MAX_ADDRESSES:
                self._tried.popitem(last=False)
            for times, limit in ((tried, self._by_address), (self._all, self._by_all)):
                while times and now - times[0] >= self._seconds:
                    times.popleft()
                if len(times) >= limit:
                    return self._seconds - (now - times[0])
            tried.append(now)
            self._all.append(now)
            return 0.0


# Response headers, cookies and forms

HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none';"
        " base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers would then send the dashboard's own forms with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_MAX_FORM_BYTES: Final = 16 * 1024
_MAX_FIELDS: Final = 30
_FORM_TIMEOUT: Final = 10.0


class FormError(Exception):
    """The body is not a valid form."""


class SecureHeaders:
    """Puts `HEADERS` on every answer, and forbids caching unless an answer allows it."""

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
    """Return the cookie's name; the `__Host-` prefix limits it to https and to this exact host."""
    return "__Host-syncd-session" if secure else "syncd-session"


def visitor_id(request: Request, *, secure: bool) -> str | None:
    """Return the id in the visitor's cookie, or None if there is no valid one."""
    given = request.cookies.get(cookie_name(secure=secure), "")
    return given if is_id(given) else None


def set_visitor_id(response: Response, identity: str, *, secure: bool) -> None:
    """Set the visitor's cookie, which lasts at most until the browser closes."""
    response.set_cookie(
        cookie_name(secure=secure), identity, path="/", secure=secure, httponly=True, samesite="strict"
    )


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form, the last value of a repeated field; raises FormError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise FormError("send the form as application/x-www-form-urlencoded")
    try:
        async with asyncio.timeout(_FORM_TIMEOUT):
            body = await _body(request)
    except TimeoutError:
        raise FormError(f"the form did not arrive within {_FORM_TIMEOUT:.0f} s") from None
    try:
        fields = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    except ValueError:
        raise FormError("the form is malformed") from None
    return dict(fields)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise FormError(f"a form may have at most {_MAX_FORM_BYTES} bytes")
    return bytes(body)
