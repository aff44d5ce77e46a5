"""The forms: log in and out, preview a resync, and apply exactly the previewed plan."""

from __future__ import annotations

import math
from dataclasses import replace

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from openmeter_plugin.units import plural
from syncd.dashboard.queries import Queries
from syncd.dashboard.session import is_token, set_visitor_id
from syncd.dashboard.web import Visitor, Web, is_dashboard_path, url
from syncd.runs.options import from_form
from syncd.runs.run import Run, RunState

_log = structlog.get_logger("syncd.dashboard")

TRIGGER = "dashboard"
"""The trigger, in the history, of runs requested in the dashboard."""


class Actions:
    """Handlers of the forms."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    async def login_form(self, request: Request) -> Response:
        """Show the login, or redirect a visitor who needs none."""
        if (redirect := self._web.cross_site_redirect(request)) is not None:
            return redirect
        if self._web.visitor(request) is not None:
            return RedirectResponse(_next(request.query_params.get("next")), 303)
        return self._login_page(self._web.anonymous(request), _next(request.query_params.get("next")))

    def login(self, request: Request, visitor: Visitor, form: dict[str, str]) -> Response:
        """Open a session if the token is right."""
        next_path, token = _next(form.get("next")), self._web.token()
        if token is None:
            return RedirectResponse(next_path, 303)
        address = request.client.host if request.client else ""
        if not is_token(form.get("token", ""), token):
            if wait := self._web.limit.admit(address):
                seconds = math.ceil(wait)
                _log.warning("login_limited", address=address)
                problem = f"Too many wrong tokens. Try again in {plural(seconds, 'second')}."
                response = self._login_page(visitor, next_path, problem, 429)
                response.headers["Retry-After"] = str(seconds)
                return response
            _log.warning("login_refused", address=address)
            return self._login_page(visitor, next_path, "Wrong token.", 403)
        _log.info("login", address=address)
        response = RedirectResponse(next_path, 303)
        # A new id, so that an id planted before the login is never logged in.
        set_visitor_id(response, self._web.sessions.begin(token), secure=self._web.secure)
        return response

    def logout(self, _request: Request, visitor: Visitor, _form: dict[str, str]) -> Response:
        """End the session."""
        self._web.sessions.end(visitor.id)
        return RedirectResponse(url("login"), 303)

    def preview(self, _request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """Request a dry run and redirect to it."""
        return _redirect_to(self._queries.runs.request(TRIGGER, from_form(form)))

    def apply(self, request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """Request a run that applies exactly the plan of this dry run, and redirect to it."""
        run_id = request.path_params["run_id"]
        reviewed = self._queries.reviewable(run_id)
        if reviewed is None:
            return self._web.error(
                409,
                "This cannot be applied",
                "Only the plan of a successful dry run can be applied, until it is deleted from the history."
                " Preview again.",
            )
        options = replace(reviewed, dry_run=False, force="force" in form)
        for run in self._queries.runs.recent():
            # The form was sent twice: both lead to the same run.
            if run.options.reviewed is options.reviewed and run.state is not RunState.FAILED:
                return _redirect_to(run)
        return _redirect_to(self._queries.runs.request(TRIGGER, options))

    def _login_page(
        self, visitor: Visitor, next_path: str, problem: str | None = None, status: int = 200
    ) -> Response:
        response = self._web.render(visitor, "login.html", status=status, next=next_path, problem=problem)
        if visitor.is_new:
            set_visitor_id(response, visitor.id, secure=self._web.secure)
        return response


def _next(path: str | None) -> str:
    return path if path and is_dashboard_path(path) else url()


def _redirect_to(run: Run) -> Response:
    return RedirectResponse(url("runs", run.id), 303)
