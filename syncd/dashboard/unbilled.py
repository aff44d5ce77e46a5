"""The page of unbilled usage, a work list: preview, assign or ignore, each one click away."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from syncd.core.errors import ConfigError, QueueFullError
from syncd.core.unbilled import ignored_on
from syncd.customers.directory import Directory
from syncd.dashboard import views
from syncd.dashboard.actions import TRIGGER
from syncd.dashboard.assigning import Instruction, instruction
from syncd.dashboard.pages import page_number
from syncd.dashboard.queries import Queries
from syncd.dashboard.unbilled_usage import insights
from syncd.dashboard.unbilled_view import UnbilledView
from syncd.dashboard.web import Visitor, Web, url
from syncd.runs import mapping_rows
from syncd.runs.options import TABLE, RunOptions
from syncd.runs.unbilled import IgnoredEntry, IgnoredSubjects
from syncd.usage.estimates import prices_of
from syncd.usage.store import UsageStore

_log = structlog.get_logger("syncd.dashboard")

_SUBJECTS_PER_PAGE: Final = 100
_LABELS: Final = {name: entry.label.split(";")[0] for name, entry in TABLE.items() if entry.label}
"""What each option of a run allows."""
_LONGEST: Final = 256


@dataclass(frozen=True, slots=True)
class _Fields:
    """What the forms of a subject's page hold, and what is wrong with it."""

    customer: str = ""
    reason: str = ""
    by: str = ""
    until: str = ""
    problem: str | None = None


class UnbilledPages:
    """Renders the pages and handles their forms."""

    def __init__(
        self, web: Web, queries: Queries, ignored: IgnoredSubjects, directory: Directory, usage: UsageStore
    ) -> None:
        self._web = web
        self._queries = queries
        self._ignored = ignored
        self._directory = directory
        self._usage = usage

    def show(self, request: Request, visitor: Visitor) -> Response:
        """Show unbilled usage by cause, with what to do about each."""
        noted = self._ignored.active()
        found = self._view(noted)
        pages = views.page_of(len(found.subjects) if found else 0, page_number(request), _SUBJECTS_PER_PAGE)
        rows = pages.cut(found.by_cause) if found else ()
        keys = frozenset(one.key for one in found.subjects) if found else frozenset()
        prices = prices_of(self._queries.config().prices)
        return self._web.render(
            visitor,
            "unbilled.html",
            known=insights(self._usage, prices, keys, _today(), [one.key for one in rows]),
            unbilled=found,
            groups=found.groups(rows) if found else (),
            pages=pages,
            allowances=_LABELS,
            noted={one.subject: one for one in noted},
            today=_today(),
        )

    def subject(self, request: Request, visitor: Visitor) -> Response:
        """Show one subject: assign it to a customer, or ignore it."""
        customer = request.query_params.get("customer", "").strip()[:_LONGEST]
        return self._subject(visitor, request.query_params.get("key", ""), _Fields(customer=customer))

    def ignore(self, _request: Request, visitor: Visitor, form: dict[str, str]) -> Response:
        """Ignore a subject from now on."""
        given = {name: form.get(name, "").strip() for name in ("reason", "by", "until")}
        key = form.get("key", "")
        until, problem = _checked(**given)
        if problem:
            return self._subject(visitor, key, _Fields(**given, problem=problem), status=400)
        self._ignored.ignore(key, given["reason"], given["by"], until, datetime.now(UTC))
        _log.info("subject_ignored", subject=key, by=given["by"], reason=given["reason"], until=str(until))
        return self._planned_again()

    def stop_ignoring(self, _request: Request, _visitor: Visitor, form: dict[str, str]) -> Response:
        """Count a subject again."""
        number = form.get("number", "")
        if number.isascii() and number.isdecimal() and len(number) < 19:
            ended = self._ignored.end(int(number), form.get("by", "").strip()[:_LONGEST], datetime.now(UTC))
            if ended is not None:
                _log.info("subject_ignoring_ended", subject=ended.subject)
        return self._planned_again()

    def assign(self, _request: Request, visitor: Visitor, form: dict[str, str]) -> Response:
        """Append the row that assigns a subject to the mapping file, where that is allowed."""
        key, customer = form.get("key", ""), form.get("customer", "").strip()
        how = self._how(key, customer) if _is_key(customer) else None
        path = self._queries.config().mapping.file
        if how is None or how.row is None or path is None:
            fields = _Fields(
                customer=customer, problem="The dashboard cannot write this row. Paste it by hand."
            )
            return self._subject(visitor, key, fields, status=409)
        try:
            mapping_rows.append(how.row, path)
        except ConfigError as error:
            return self._subject(visitor, key, _Fields(customer=customer, problem=str(error)), status=409)
        _log.info("mapping_row_added", subject=key, customer=customer, file=str(path))
        run = self._queries.runs.request(TRIGGER, RunOptions(dry_run=True))
        return RedirectResponse(url("runs", run.id), 303)

    def _subject(self, visitor: Visitor, key: str, fields: _Fields, *, status: int = 200) -> Response:
        found = self._view(())
        row = next((one for one in found.subjects if one.key == key), None) if found else None
        noted = next((one for one in self._ignored.active() if one.subject == key), None)
        if row is None and noted is None:
            text = "The latest plan has no unbilled usage of it. It may have got a customer since."
            return self._web.error(404, "No such subject", text)
        customer = fields.customer or (row.customer if row else None) or ""
        return self._web.render(
            visitor,
            "unbilled_subject.html",
            status=status,
            key=key,
            row=row,
            noted=noted,
            fields=fields,
            customer=customer,
            how=self._how(key, customer) if _is_key(customer) else None,
            there=self._directory.customer(customer) if _is_key(customer) else None,
            read=self._directory.edition() is not None,
            today=_today(),
        )

    def _how(self, key: str, customer: str) -> Instruction:
        found = self._view(())
        row = next((one for one in found.subjects if one.key == key), None) if found else None
        return instruction(
            self._queries.config(), key, customer, known=row is not None and row.status != "unknown"
        )

    def _view(self, noted: tuple[IgnoredEntry, ...]) -> UnbilledView | None:
        """Return the latest plan's figures; a subject that was ignored since is among the ignored ones."""
        _, found = self._queries.drift_and_unbilled()
        ignored = ignored_on(_today(), self._queries.config().ignore, noted)
        return found.with_ignored(ignored) if found else None

    def _planned_again(self) -> Response:
        """Plan again, so that metrics and exit statuses follow at once; a full queue plans soon anyway."""
        with suppress(QueueFullError):
            self._queries.runs.request(TRIGGER, RunOptions(dry_run=True))
        return RedirectResponse(url("unbilled"), 303)


def _checked(reason: str, by: str, until: str) -> tuple[date | None, str | None]:
    """Return the last day, and what is wrong with these fields."""
    if not (0 < len(reason) <= _LONGEST and 0 < len(by) <= _LONGEST):
        return None, f"Say why, and who decided it, in at most {_LONGEST} characters each."
    if not until:
        return None, None
    try:
        last = date.fromisoformat(until)
    except ValueError:
        return None, "The last day must be a day, such as 2026-12-31."
    return last, "The last day is over." if last < _today() else None


def _is_key(text: str) -> bool:
    return 0 < len(text) <= _LONGEST and text.isprintable()


def _today() -> date:
    return datetime.now(UTC).date()
