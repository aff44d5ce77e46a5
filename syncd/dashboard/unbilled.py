"""The page of unbilled usage, a work list: preview, assign or ignore, each one click away.

`insights` returns what the kept usage says of the subjects: last seen, trend, and what they are worth by the
prices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from syncd.core.errors import ConfigError, QueueFullError
from syncd.core.unbilled import WINDOW, ignored_on
from syncd.customers.directory import Directory
from syncd.dashboard import views
from syncd.dashboard.actions import TRIGGER
from syncd.dashboard.assigning import Instruction, append_row, instruction
from syncd.dashboard.pages import page_number
from syncd.dashboard.queries import Queries
from syncd.dashboard.unbilled_view import UnbilledView
from syncd.dashboard.web import Visitor, Web, url
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER
from syncd.runs.ignored import IgnoredEntry, IgnoredSubjects
from syncd.runs.options import TABLE, RunOptions
from syncd.usage.days import Days
from syncd.usage.estimates import Labels, Prices, prices_of
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
            append_row(how.row, path)
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


_WEEK: Final = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Insight:
    """What is known of one subject; `estimate` is None without prices, or if nothing of it has a price."""

    last_seen: date | None = None
    this_week: float = 0
    """Requests of the last seven days, today included, or tokens where it has no requests."""
    week_before: float = 0
    estimate: Decimal | None = None

    @property
    def trend(self) -> str:
        """Return the last seven days against the seven before, in words."""
        if not self.week_before:
            return "new" if self.this_week else ""
        change = round(100 * (self.this_week - self.week_before) / self.week_before)
        return f"{change:+,} %" if change else "steady"


@dataclass(frozen=True, slots=True)
class Insights:
    """What is known of several subjects; `currency` is empty without prices."""

    of: Mapping[str, Insight] = field(default_factory=dict)
    currency: str = ""

    def estimate(self, subjects: Iterable[str]) -> Decimal | None:
        """Return what the usage of these subjects is worth, None if nothing of it has a price."""
        known = (self.of[key].estimate for key in subjects if key in self.of)
        found = [amount for amount in known if amount is not None]
        return sum(found, Decimal(0)) if found else None

    def of_subject(self, key: str) -> Insight:
        """Return what is known of a subject."""
        return self.of.get(key, Insight())


def insights(
    store: UsageStore,
    prices: Prices | None,
    subjects: Collection[str],
    today: date,
    shown: Collection[str] | None = None,
) -> Insights:
    """Return what the kept usage says of these subjects; raises StateError.

    Of those that are not among `shown`, only what they are worth.
    """
    if not subjects:
        return Insights({}, prices.currency if prices else "")
    tomorrow = today + timedelta(days=1)
    this_week, before = Days(tomorrow - _WEEK, tomorrow), Days(tomorrow - 2 * _WEEK, tomorrow - _WEEK)
    seen: dict[str, date] = {}
    now: dict[str, float] = {}
    then: dict[str, float] = {}
    shown = subjects if shown is None else shown
    for meter in (TOKENS_METER, REQUESTS_METER):
        for key, last in store.last_days(meter, shown).items():
            seen[key] = max(last, seen.get(key, last))
        recent, earlier = (store.by_subject(meter, days, shown) for days in (this_week, before))
        for key in recent.keys() | earlier.keys():
            now[key], then[key] = recent.get(key, 0), earlier.get(key, 0)
    worth = _worth(store, prices, subjects, Days(today - WINDOW, tomorrow)) if prices else {}
    found = {
        key: Insight(seen.get(key), now.get(key, 0), then.get(key, 0), worth.get(key)) for key in subjects
    }
    return Insights(found, prices.currency if prices else "")


def _worth(store: UsageStore, prices: Prices, subjects: Collection[str], days: Days) -> dict[str, Decimal]:
    """Return the estimate of each subject that has usage with a price, as if it were a customer of its own.

    Each month counts by itself, because the tiers of a price start again each month.
    """
    worth: defaultdict[str, Decimal] = defaultdict(Decimal)
    for month in days.by_month():
        used: defaultdict[str, list[tuple[str, Labels, float]]] = defaultdict(list)
        for meter in sorted(prices.meters):
            for subject, labels, value in store.by_labels(meter, month, subjects):
                if prices.rate_of(meter, labels) is not None:
                    used[subject].append((meter, labels, value))
        for subject, amounts in used.items():
            worth[subject] += prices.estimate(amounts)[0]
    return dict(worth)
