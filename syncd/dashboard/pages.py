"""The pages, one method each; all are read-only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from syncd.core.changes import ChangeKind
from syncd.dashboard import diffs, views
from syncd.dashboard.queries import Queries, RunDetail
from syncd.dashboard.web import Visitor, Web

_RUNS_PER_PAGE: Final = 50
_CHANGES_PER_PAGE: Final = 100


class Pages:
    """Renders the pages from what `Queries` returns."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    def runs(self, request: Request, visitor: Visitor) -> Response:
        """Show the runs, latest first."""
        number = page_number(request)
        found = self._queries.run_lines(_RUNS_PER_PAGE + 1, datetime.now(UTC), (number - 1) * _RUNS_PER_PAGE)
        return self._web.render(
            visitor,
            "runs.html",
            runs=found[:_RUNS_PER_PAGE],
            number=number,
            more=len(found) > _RUNS_PER_PAGE,
        )

    def run(self, request: Request, visitor: Visitor) -> Response:
        """Show one run, its plan as a diff, and the outcome of each change."""
        now = datetime.now(UTC)
        detail = self._queries.run(request.path_params["run_id"], now)
        if detail is None:
            return self._web.error(
                404, "No such run", "It does not exist or was deleted (setting daemon.keep_runs)."
            )
        live = request.query_params.get("live") != "off"
        return self._web.render(
            visitor,
            "run.html",
            line=detail.line,
            plan=detail.plan,
            done=detail.done_so_far,
            apply_form=views.apply_form(detail.line, detail.plan),
            live=live,
            refresh=_refresh(detail, now) if live and not detail.line.is_finished else None,
            shown=_changes(detail, request),
        )

    def gateways(self, _request: Request, visitor: Visitor) -> Response:
        """Show the state of each gateway's plugin: its backlog and books."""
        return self._web.render(visitor, "gateways.html", gateways=self._queries.gateways())


def _refresh(detail: RunDetail, now: datetime) -> int:
    """Return the refresh interval of a page in seconds, short at first because most runs are short."""
    requested = detail.line.requested_at or now
    return 1 if (now - requested).total_seconds() < 10 else 5


def _changes(detail: RunDetail, request: Request) -> dict[str, object]:
    """Return the requested page of the plan's changes, of one kind or all."""
    plan = detail.plan
    if plan is None:
        return {"kinds": [], "kind": None, "changes": [], "pages": views.page_of(0, 1, _CHANGES_PER_PAGE)}
    requested = request.query_params.get("kind")
    kind = next((kind for kind in ChangeKind if kind == requested), None)
    found = plan.of(kind) if kind else diffs.as_read(plan.changes)
    pages = views.page_of(len(found), page_number(request), _CHANGES_PER_PAGE)
    return {
        "kinds": diffs.kinds(plan),
        "kind": kind,
        "changes": diffs.change_views(pages.cut(found), detail.results),
        "pages": pages,
    }


def page_number(request: Request) -> int:
    """Return the requested page."""
    return max(1, integer(request.query_params.get("page"), 1))


def integer(text: str | None, default: int) -> int:
    """Return a number from a query or a form, or the default for anything else."""
    if not text or not text.isascii() or not text.isdecimal() or len(text) > 18:
        return default
    return int(text)
