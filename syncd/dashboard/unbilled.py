"""The page of unbilled usage, a work list: what to do about each cause, one click away."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from syncd.dashboard import views
from syncd.dashboard.pages import page_number
from syncd.dashboard.queries import Queries
from syncd.dashboard.web import Visitor, Web
from syncd.runs.options import TABLE

_SUBJECTS_PER_PAGE: Final = 100
_LABELS: Final = {name: entry.label.split(";")[0] for name, entry in TABLE.items() if entry.label}
"""What each option of a run allows."""


class UnbilledPages:
    """Renders the page."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    def show(self, request: Request, visitor: Visitor) -> Response:
        """Show unbilled usage by cause, with what to do about each."""
        _, found = self._queries.drift_and_unbilled()
        pages = views.page_of(len(found.subjects) if found else 0, page_number(request), _SUBJECTS_PER_PAGE)
        groups = found.groups(pages.cut(found.by_cause)) if found else ()
        return self._web.render(
            visitor, "unbilled.html", unbilled=found, groups=groups, pages=pages, allowances=_LABELS
        )
