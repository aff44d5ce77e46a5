"""The frame of all pages: who asks, templates, and what becomes of errors."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Final
from urllib.parse import quote, urlencode

import jinja2
import structlog
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from syncd import __version__
from syncd.config.settings import Config
from syncd.core.errors import QueueFullError, SyncdError
from syncd.dashboard import text
from syncd.dashboard.session import (
    FormError,
    LoginLimit,
    Sessions,
    new_id,
    read_form,
    set_visitor_id,
    visitor_id,
)

_log = structlog.get_logger("syncd.dashboard")

ROOT: Final = "/dashboard"
FORM_TOKEN: Final = "form_token"  # noqa: S105 - the name of a field
_STATIC: Final = {"dashboard.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks. `form_token` goes into each form; `logged_in` is False also where no login is needed."""

    id: str
    form_token: str
    logged_in: bool
    is_new: bool = False


Page = Callable[[Request, Visitor], Response]
Action = Callable[[Request, Visitor, dict[str, str]], Response]
Endpoint = Callable[[Request], Awaitable[Response]]


class Web:
    """Wraps pages and actions: who has no session goes to the login, a form that is not ours nowhere."""

    def __init__(
        self,
        token: Callable[[], str | None],
        config: Callable[[], Config],
        schedule: Callable[[], dict[str, object]],
    ) -> None:
        self.token = token
        self.config = config
        self.schedule = schedule
        self.sessions = Sessions()
        self.limit = LoginLimit()
        self._static = {name: (files(__package__) / "static" / name).read_bytes() for name in _STATIC}
        self._templates = _environment(self._static)

    @property
    def secure(self) -> bool:
        """Tell whether people come over https only."""
        return (self.config().daemon.public_url or "").startswith("https:")

    def page(self, handler: Page) -> Endpoint:
        """Return the endpoint of a page for visitors who may see it."""

        async def endpoint(request: Request) -> Response:
            if (hop := self.hop(request)) is not None:
                return hop
            visitor = self.visitor(request)
            if visitor is None:
                return RedirectResponse(login_url(_place(request)), 303)
            response = await run_in_threadpool(self._safely, handler, request, visitor)
            if visitor.is_new:
                set_visitor_id(response, visitor.id, secure=self.secure)
            return response

        return endpoint

    def action(self, handler: Action, *, needs_login: bool = True) -> Endpoint:
        """Return the endpoint of a form that was made for this very visitor."""

        async def endpoint(request: Request) -> Response:
            visitor = self.visitor(request) if needs_login else self.anybody(request)
            if visitor is None:
                return RedirectResponse(login_url(), 303)
            try:
                form = await read_form(request)
            except FormError as error:
                return self.error(400, "This is not a form of this dashboard", str(error))
            if visitor.is_new or not self.sessions.owns_form(visitor.id, form.get(FORM_TOKEN, "")):
                _log.warning("form_refused", path=request.url.path)
                return self.error(
                    403,
                    "This form was not made for you",
                    "It is from another session, or was forged. Nothing was done. Go back, reload the page"
                    " and send it again.",
                )
            return await run_in_threadpool(
                self._safely, lambda asked, who: handler(asked, who, form), request, visitor
            )

        return endpoint

    def visitor(self, request: Request) -> Visitor | None:
        """Return who asks, None where a login is needed first."""
        token = self.token()
        if token is None:
            return self.anybody(request)
        identity = visitor_id(request, secure=self.secure)
        if identity is None or not self.sessions.is_open(identity, token):
            return None
        return Visitor(identity, self.sessions.form_token(identity), logged_in=True)

    def anybody(self, request: Request) -> Visitor:
        """Return who asks, logged in or not; without a cookie of ours they get a new id."""
        identity = visitor_id(request, secure=self.secure)
        fresh = identity or new_id()
        return Visitor(fresh, self.sessions.form_token(fresh), logged_in=False, is_new=identity is None)

    def render(
        self, visitor: Visitor, template: str, *, status: int = 200, **context: object
    ) -> HTMLResponse:
        """Return a page with the frame around it."""
        frame = {
            "visitor": visitor,
            "now": datetime.now(UTC),
            "refused": self.schedule().get("configuration_refused"),
            "owner": self.config().owner_id,
        }
        return self._html(status, template, **(frame | context))

    def error(self, status: int, title: str, detail: str, **context: object) -> HTMLResponse:
        """Return a page that says what went wrong."""
        return self._html(status, "error.html", title=title, detail=detail, **context)

    async def static(self, request: Request) -> Response:
        """Serve the style sheet and the icon; their addresses change with their content."""
        name = request.path_params["name"]
        if name not in self._static:
            return self.error(404, "Not found", "There is no such file.")
        keep = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(self._static[name], media_type=_STATIC[name], headers=keep)

    def _safely(self, handler: Page, request: Request, visitor: Visitor) -> Response:
        try:
            return handler(request, visitor)
        except QueueFullError as error:
            return self.error(429, "Too many runs wait", str(error))
        except SyncdError as error:
            return self.error(503, "This cannot be shown", str(error))

    def hop(self, request: Request) -> HTMLResponse | None:
        """Return a page that asks for the same again, for whoever follows a link from another site.

        With such a link browsers do not send a SameSite=Strict cookie, though there may well be one.
        """
        if request.headers.get("sec-fetch-site") != "cross-site":
            return None
        if visitor_id(request, secure=self.secure) is not None:
            return None
        return self._html(200, "hop.html", place=_place(request), refresh=0)

    def _html(self, status: int, template: str, **context: object) -> HTMLResponse:
        body = self._templates.get_template(template).render(**context)
        return HTMLResponse(body, status)


def _environment(static: dict[str, bytes]) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("syncd.dashboard"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=text.visible,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ago": text.ago,
        "clock": text.clock,
        "duration": text.duration,
        "number": text.number,
        "size": text.size,
        "plural": text.plural,
        "moment": text.moment,
    }
    versions = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in static.items()}
    environment.globals |= {
        "root": ROOT,
        "version": __version__,
        "static": lambda name: f"{ROOT}/static/{name}?v={versions[name]}",
        "url": url,
        "refresh": None,
    }
    return environment


def url(*parts: str, **query: object) -> str:
    """Return the address of a page; what is None is left out of its query."""
    path = "/".join([ROOT, *(quote(part, safe="") for part in parts)]) if parts else f"{ROOT}/"
    given = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def login_url(place: str | None = None) -> str:
    """Return the address of the login that leads on to a page."""
    return url("login", next=place if place not in (None, f"{ROOT}/") else None)


def is_own_page(place: str) -> bool:
    """Tell whether this is the path of a page of ours, so that a login may lead on to it."""
    return place.startswith(f"{ROOT}/") and place.isascii() and place.isprintable() and "\\" not in place


def _place(request: Request) -> str:
    path = request.url.path
    return f"{path}?{request.url.query}" if request.url.query else path
