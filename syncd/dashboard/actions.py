"""What can be done: log in and out, preview a resync, and apply exactly what the preview has shown."""

from __future__ import annotations

import hmac
import math
from dataclasses import replace

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from syncd.dashboard.queries import Queries
from syncd.dashboard.session import set_visitor_id
from syncd.dashboard.text import plural
from syncd.dashboard.web import Visitor, Web, is_own_page, url
from syncd.planning.scope import Scope
from syncd.runs.reconciler import RunOptions
from syncd.runs.run import Run, RunState

_log = structlog.get_logger("syncd.dashboard")

TRIGGER = "dashboard"
"""What the history calls runs that were asked for here."""


class Actions:
    """The forms."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    async def login_form(self, request: Request) -> Response:
        """Show the login, or lead on whoever needs none."""
        if (hop := self._web.hop(request)) is not None:
            return hop
        if self._web.visitor(request) is not None:
            return RedirectResponse(_next(request.query_params.get("next")), 303)
        return self._login_page(self._web.anybody(request), _next(request.query_params.get("next")))

    def login(self, request: Request, visitor: Visitor, form: dict[str, str]) -> Response:
        """Open a session for whoever knows the token."""
        place, token = _next(form.get("next")), self._web.token()
        if token is None:
            return RedirectResponse(place, 303)
        address = request.client.host if request.client else ""
        if wait := self._web.limit.admit(address):
            seconds = math.ceil(wait)
            _log.warning("login_limited", address=address)
            said = f"Too many attempts. Try again in {plural(seconds, 'second')}."
            response = self._login_page(visitor, place, said, 429)
            response.headers["Retry-After"] = str(seconds)
            return response
        # Compared in constant time: the time of an answer must not tell how much of a guess was right.
        if not hmac.compare_digest(form.get("token", "").strip().encode(), token.encode()):
            _log.warning("login_refused", address=address)
            return self._login_page(visitor, place, "This is not the token of daemon.token.", 403)
        self._web.limit.forgive(address)
        _log.info("login", address=address)
        response = RedirectResponse(place, 303)
        # A new id: one that somebody may have planted before the login must not be logged in.
        set_visitor_id(response, self._web.sessions.begin(token), secure=self._web.secure)
        return response

    def logout(self, _request: Request, visitor: Visitor, _form: dict[str, str]) -> Response:
        """Close the session."""
        self._web.sessions.end(visitor.id)
        return RedirectResponse(url("login"), 303)

    def preview(self, _request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """Ask for a dry run and lead to it."""
        options = RunOptions(
            dry_run=True,
            allow_empty="allow_empty" in form,
            allow_move="allow_move" in form,
            allow_retire="allow_retire" in form,
            adopt="adopt" in form,
            scope=Scope(form.get("source") or None, form.get("principal", "").strip() or None),
        )
        return _to(self._queries.runs.request(TRIGGER, options))

    def apply(self, request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """Ask for a run that applies what this dry run has shown, or refuses; lead to it."""
        run_id = request.path_params["run_id"]
        shown = self._queries.reviewable(run_id)
        if shown is None:
            return self._web.error(
                409,
                "This cannot be applied",
                "Only the plan of a dry run that went to its end can be applied, and only while it is"
                " remembered. Preview again.",
            )
        options = replace(shown, dry_run=False, force="force" in form)
        for run in self._queries.runs.recent():
            # Sent twice: the first one serves both.
            if run.options.reviewed is options.reviewed and run.state is not RunState.FAILED:
                return _to(run)
        return _to(self._queries.runs.request(TRIGGER, options))

    def _login_page(
        self, visitor: Visitor, place: str, problem: str | None = None, status: int = 200
    ) -> Response:
        response = self._web.render(visitor, "login.html", status=status, next=place, problem=problem)
        if visitor.is_new:
            set_visitor_id(response, visitor.id, secure=self._web.secure)
        return response


def _next(place: str | None) -> str:
    return place if place and is_own_page(place) else url()


def _to(run: Run) -> Response:
    return RedirectResponse(url("runs", run.id), 303)
