"""The page of closed months, and their reports as files; `as_html` writes a report as a page of its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from typing import Final

import jinja2
from starlette.requests import Request
from starlette.responses import Response

from syncd.close import documents
from syncd.close.report import QUIET, Month, Report
from syncd.close.store import ClosedMonth, ClosedMonths
from syncd.dashboard.web import Visitor, Web, environment
from syncd.usage.estimates import NOTE, money

_MONTHS_SHOWN: Final = 13
_MAX_LATE: Final = 100
_MEDIA_TYPES: Final = {"html": "text/html", "csv": "text/csv", "json": "application/json"}


class ClosePages:
    """Renders the page and the files."""

    def __init__(self, web: Web, months: ClosedMonths) -> None:
        self._web = web
        self._months = months

    def show(self, _request: Request, visitor: Visitor) -> Response:
        """Show which months are closed, and what has arrived for them since."""
        found = {one.month: one for one in self._months.all()}
        months = [(month, found.get(month)) for month in months_of(datetime.now(UTC), found)]
        return self._web.render(visitor, "close.html", months=months, max_late=_MAX_LATE)

    def download(self, request: Request, _visitor: Visitor) -> Response:
        """Return the report of a closed month as a file."""
        name, _, kind = request.path_params["name"].rpartition(".")
        kept = next((one for one in self._months.all() if str(one.month) == name), None)
        if kept is None or kind not in _MEDIA_TYPES:
            return self._web.error(404, "No such report", "Only closed months have one.")
        report = self._months.report(kept)
        write = {"html": as_html, "csv": documents.as_csv, "json": documents.as_json}[kind]
        file = f'attachment; filename="close-{kept.month}-{kept.sha256[:12]}.{kind}"'
        return Response(
            write(report),
            media_type=f"{_MEDIA_TYPES[kind]}; charset=utf-8",
            headers={"Content-Disposition": file},
        )


def months_of(now: datetime, closed: dict[Month, ClosedMonth]) -> list[Month]:
    """Return the latest months that have ended, and all closed ones, the newest first."""
    ended: list[Month] = []
    end = (now.astimezone(UTC) - QUIET).replace(day=1)
    for _ in range(_MONTHS_SHOWN):
        end = (end - timedelta(days=1)).replace(day=1)
        ended.append(Month(end.year, end.month))
    return sorted({*ended, *closed}, reverse=True)


def as_html(report: Report) -> str:
    """Return a report as a self-contained HTML document; equal reports make equal documents."""
    template = _environment().get_template("close_report.html")
    return template.render(
        report=report,
        content=report.content,
        gateway_text=documents.gateway_text,
        audit_text=documents.audit_text,
        meters=documents.counted(report.content),
        currency=(currency := documents.currency_of(report.content)),
        worth=lambda amount: money(Decimal(amount), currency or "") if amount is not None else "",
        left_out=list(documents.left_out(report.content)),
        estimate_note=NOTE,
    )


@cache
def _environment() -> jinja2.Environment:
    return environment({})
