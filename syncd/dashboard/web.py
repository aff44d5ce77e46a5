"""Request handling shared by all pages: visitors, form checks, templates, error pages."""

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

from openmeter_plugin.units import number, plural
from syncd import __version__
from syncd.config.settings import Config
from syncd.core.errors import QueueFullError, SyncdError
from syncd.dashboard import text
from syncd.dashboard.customer_table import reference
from syncd.dashboard.session import (
    FormError,
    LoginLimit,
    Sessions,
    new_id,
    read_form,
    set_visitor_id,
    visitor_id,
)
from syncd.usage.estimates import money

_log = structlog.get_logger("syncd.dashboard")

ROOT: Final = "/dashboard"
FORM_TOKEN: Final = "form_token"  # noqa: S105 - the name of a field
_STATIC: Final = {"dashboard.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class Visitor:
    """The visitor of a request. Each form contains `form_token`; without a login `logged_in` is False."""

    id: str
    form_token: str
    logged_in: bool
    is_new: bool = False


Page = Callable[[Request, Visitor], Response]
Action = Callable[[Request, Visitor, dict[str, str]], Response]
Endpoint = Callable[[Request], Awaitable[Response]]


class Web:
    """Wraps pages and actions: sends visitors without a session to the login, and rejects forged forms."""

    def __init__(
        self,
        token: Callable[[], str | None],
        config: Callable[[], Config],
        schedule: Callable[[], dict[str, object]],
        limit: LoginLimit,
        sessions: Sessions,
    ) -> None:
        self.token = token
        self.config = config
        self.schedule = schedule
        self.sessions = sessions
        self.limit = limit
        self._static = {name: (files(__package__) / "static" / name).read_bytes() for name in _STATIC}
        self._templates = environment(self._static)

    @property
    def secure(self) -> bool:
        """Return whether the dashboard is reached over https only."""
        return (self.config().daemon.public_url or "").startswith("https:")

    def page(self, handler: Page) -> Endpoint:
        """Return an endpoint that shows a page to logged-in visitors."""

        async def endpoint(request: Request) -> Response:
            if (redirect := self.cross_site_redirect(request)) is not None:
                return redirect
            visitor = self.visitor(request)
            if visitor is None:
                return RedirectResponse(login_url(_path_and_query(request)), 303)
            response = await run_in_threadpool(self._run_handler, handler, request, visitor)
            if visitor.is_new:
                set_visitor_id(response, visitor.id, secure=self.secure)
            return response

        return endpoint

    def action(self, handler: Action, *, needs_login: bool = True) -> Endpoint:
        """Return an endpoint that accepts only forms issued to the same visitor."""

        async def endpoint(request: Request) -> Response:
            visitor = self.visitor(request) if needs_login else self.anonymous(request)
            if visitor is None:
                return RedirectResponse(login_url(), 303)
            try:
                form = await read_form(request)
            except FormError as error:
                return self.error(400, "Invalid form", str(error))
            if visitor.is_new or not self.sessions.owns_form(visitor.id, form.get(FORM_TOKEN, "")):
                _log.warning("form_refused", path=request.url.path)
                return self.error(
                    403,
                    "Form not accepted",
                    "It belongs to another session or was forged. Nothing was changed. Go back, reload the"
                    " page and send it again.",
                )
            return await run_in_threadpool(
                self._run_handler, lambda received, sender: handler(received, sender, form), request, visitor
            )

        return endpoint

    def visitor(self, request: Request) -> Visitor | None:
        """Return the visitor, or None if a login is needed first."""
        token = self.token()
        if token is None:
            return self.anonymous(request)
        identity = visitor_id(request, secure=self.secure)
        if identity is None or not self.sessions.is_open(identity, token):
            return None
        return Visitor(identity, self.sessions.form_token(identity), logged_in=True)

    def anonymous(self, request: Request) -> Visitor:
        """Return the visitor as not logged in, with a new id if there is no valid cookie."""
        identity = visitor_id(request, secure=self.secure)
        fresh = identity or new_id()
        return Visitor(fresh, self.sessions.form_token(fresh), logged_in=False, is_new=identity is None)

    def render(
        self, visitor: Visitor, template: str, *, status: int = 200, **context: object
    ) -> HTMLResponse:
        """Return a page inside the common layout."""
        frame = {
            "visitor": visitor,
            "now": datetime.now(UTC),
            "refused": self.schedule().get("configuration_refused"),
            "owner": self.config().owner_id,
        }
        return self._html(status, template, **(frame | context))

    def error(self, status: int, title: str, detail: str, **context: object) -> HTMLResponse:
        """Return an error page."""
        return self._html(status, "error.html", title=title, detail=detail, **context)

    def no_such_gateway(self) -> HTMLResponse:
        """Return the error page for a name that no gateway of the configuration has."""
        return self.error(404, "No such gateway", "No gateway with this name is configured.")

    async def static(self, request: Request) -> Response:
        """Serve the style sheet and the icon; their URLs change with their content."""
        name = request.path_params["name"]
        if name not in self._static:
            return self.error(404, "Not found", "No such file.")
        caching = {"Cache-Control": "public, max-age=31536000, immutable"}
        return Response(self._static[name], media_type=_STATIC[name], headers=caching)

    def _run_handler(self, handler: Page, request: Request, visitor: Visitor) -> Response:
        try:
            return handler(request, visitor)
        except QueueFullError as error:
            return self.error(429, "Too many queued runs", str(error))
        except SyncdError as error:
            return self.error(503, "This page cannot be shown", str(error))

    def cross_site_redirect(self, request: Request) -> HTMLResponse | None:
        """Return a page that requests the same URL again, for visitors who followed a link from another site.

        For such a link browsers withhold a SameSite=Strict cookie, even if the visitor has one.
        """
        if request.headers.get("sec-fetch-site") != "cross-site":
            return None
        if visitor_id(request, secure=self.secure) is not None:
            return None
        return self._html(200, "redirect.html", path=_path_and_query(request), refresh=0)

    def _html(self, status: int, template: str, **context: object) -> HTMLResponse:
        body = self._templates.get_template(template).render(**context)
        return HTMLResponse(body, status)


def environment(static: dict[str, bytes]) -> jinja2.Environment:
    """Return the environment of all templates, with the static files of the pages."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("syncd.dashboard"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=text.visible,
        lstrip_blocks=True,
    )
    made.filters |= {
        "ago": text.ago,
        "clock": text.clock,
        "duration": text.duration,
        "number": number,
        "size": text.size,
        "plural": plural,
        "reference": reference,
        "moment": text.moment,
        "money": money,
    }
    versions = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in static.items()}
    made.globals |= {
        "root": ROOT,
        "version": __version__,
        "static": lambda name: f"{ROOT}/static/{name}?v={versions[name]}",
        "url": url,
        "refresh": None,
    }
    return made


def url(*parts: str, **query: object) -> str:
    """Return the URL of a page; query parameters that are None are left out."""
    path = "/".join([ROOT, *(quote(part, safe="") for part in parts)]) if parts else f"{ROOT}/"
    given = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def login_url(next_path: str | None = None) -> str:
    """Return the URL of the login, which continues to `next_path`."""
    return url("login", next=next_path if next_path not in (None, f"{ROOT}/") else None)


def is_dashboard_path(path: str) -> bool:
    """Return whether this is a path of the dashboard, so that a login may redirect to it."""
    return path.startswith(f"{ROOT}/") and path.isascii() and path.isprintable() and "\\" not in path


def _path_and_query(request: Request) -> str:
    path = request.url.path
    return f"{path}?{request.url.query}" if request.url.query else path
