"""The customers table, and the page of each customer.

Both show what the latest run observed (`syncd.customers.directory`) and the usage that is kept in the state
(`syncd.usage`): no view of them asks the metering API for all customers. Only what one customer has, such as
its entitlements, is read from the metering API, for its own page.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from syncd.customers.directory import Directory
from syncd.customers.known import KnownCustomer, Name
from syncd.dashboard.charts import chart, per_day
from syncd.dashboard.customer_table import (
    CustomerRow,
    gate_lines,
    past_changes,
    rows,
    subject_rows,
    subject_table,
    table,
    totals,
)
from syncd.dashboard.period import Period, period_of
from syncd.dashboard.queries import Queries
from syncd.dashboard.web import Visitor, Web
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER
from syncd.runs.history import History
from syncd.usage.days import Days
from syncd.usage.report import dimension_words
from syncd.usage.store import KeptMeter, UsageStore

_CACHED: Final = 4
"""Tables kept for the next view: with 10,000 customers, one takes 0.3 s to add up and 4 MiB to keep."""
_CONCERNS: Final = 100
"""Concerns of a customer that its page shows."""
_TITLES: Final = {REQUESTS_METER: ("requests", "Requests"), TOKENS_METER: ("tokens", "Tokens")}
_CHANGES: Final = 50
"""Changes of a customer that its page shows."""


class CustomersPages:
    """Renders the pages."""

    def __init__(
        self, web: Web, queries: Queries, directory: Directory, history: History, usage: UsageStore
    ) -> None:
        self._web = web
        self._queries = queries
        self._directory = directory
        self._history = history
        self._usage = usage
        self._lock = threading.Lock()
        self._tables: OrderedDict[Hashable, tuple[CustomerRow, ...]] = OrderedDict()

    def table(self, request: Request, visitor: Visitor) -> Response:
        """Show all customers: sorted, filtered, searched, or as CSV."""
        period = _period(request)
        meters = self._meters()
        every = self._rows(period.days, meters)
        search = request.query_params.get("q", "").strip()
        found = self._directory.search(search) if search else frozenset()
        shown = table(_heads(meters), search, found)
        view = shown.view(every, request.query_params)
        if request.query_params.get("csv"):
            return shown.csv(view, f"customers-{period.days.since}-{period.days.last}")
        return self._web.render(
            visitor,
            "customers.html",
            view=view,
            period=period,
            meters=meters,
            choices=shown.choices,
            totals=totals(view.found, len(meters)),
            every=totals(every, len(meters)),
            used=sum(row.is_used for row in every),
            edition=self._directory.edition(),
        )

    def one(self, request: Request, visitor: Visitor) -> Response:
        """Show one customer."""
        customer = self._directory.customer(request.path_params["key"])
        if customer is None:
            return self._web.error(
                404,
                "No such customer",
                "The latest run observed no customer with this key or id. One that was created since appears"
                " with the next run.",
            )
        period = _period(request)
        meters = self._meters()
        subjects = self._directory.attributed(customer)
        values = [self._usage.by_subject(one.key, period.days, subjects) for one in meters]
        concerns = self._directory.concerns(customer.key) if customer.key else ()
        wanted = [*subjects, *(one.subject for one in concerns[:_CONCERNS])]
        names = self._directory.names(list(dict.fromkeys(wanted)))
        shown = subject_table(_heads(meters))
        view = shown.view(subject_rows(customer, values, names), request.query_params)
        if request.query_params.get("csv"):
            name = f"subjects-{period.days.since}-{period.days.last}"
            return shown.csv(view, name)
        return self._web.render(
            visitor,
            "customer.html",
            customer=customer,
            reference=request.path_params["key"],
            page=self._page_of(customer),
            period=period,
            meters=meters,
            view=view,
            totals=[sum(one.values()) for one in values],
            usage=self._usage_parts(meters, period.days, subjects),
            concerns=concerns[:_CONCERNS],
            more_concerns=max(0, len(concerns) - _CONCERNS),
            blocked=any(one.blocked for one in concerns),
            names={one.subject: _text(names.get(one.subject, ())) for one in concerns[:_CONCERNS]},
            account=None if customer.is_unseen else self._queries.account(customer.id),
            gate=self._gate_parts(customer),
            changes=past_changes(self._history.changes_of(customer.key, _CHANGES)) if customer.key else (),
            edition=self._directory.edition(),
        )

    def _meters(self) -> list[MeterColumn]:
        """Return the kept meters, requests and tokens first."""
        known = list(_TITLES)
        kept = sorted(
            self._usage.meters(), key=lambda one: known.index(one.meter) if one.meter in known else 9
        )
        return [MeterColumn(one.meter, *_TITLES.get(one.meter, (one.meter, one.meter)), one) for one in kept]

    def _rows(self, days: Days, meters: Sequence[MeterColumn]) -> tuple[CustomerRow, ...]:
        """Return all rows of a period, from the cache unless customers or usage have changed."""
        edition = self._directory.edition()
        version = (edition.version if edition else 0, self._usage.revision())
        key = (version, tuple(one.key for one in meters), days)
        with self._lock:
            found = self._tables.get(key)
        if found is None:
            values = [self._usage.by_subject(one.key, days) for one in meters]
            found = rows(self._directory.customers(), values, self._directory.all_concerns())
        with self._lock:
            self._tables[key] = found
            self._tables.move_to_end(key)
            while len(self._tables) > _CACHED:
                self._tables.popitem(last=False)
        return found

    def _page_of(self, customer: KnownCustomer) -> str | None:
        """Return the address of the customer's page in the metering service."""
        if customer.is_unseen:
            return None
        return self._queries.config().metering.page_of(customer.id, customer.key)

    def _usage_parts(
        self, meters: Sequence[MeterColumn], days: Days, subjects: Sequence[str]
    ) -> dict[str, object]:
        """Return the charts of a customer's usage, and its usage by dimension."""
        charts, dimensions = [], []
        for meter in meters:
            now = self._usage.by_day(meter.key, days, subjects)
            since, before = meter.kept.since, list[float]()
            if since is not None and since <= days.before().since:
                before = self._usage.by_day(meter.key, days.before(), subjects)
            points = per_day(days.since, now, before)
            charts.append(chart(f"{meter.title} per day", meter.title.lower(), points))
            for dimension in meter.kept.dimensions:
                parts = self._usage.by_dimension(meter.key, days, dimension, subjects)
                if parts:
                    largest = sorted(parts.items(), key=lambda part: (-part[1], part[0]))
                    dimensions.append((meter.title, dimension_words(dimension), largest))
        return {"charts": charts, "dimensions": dimensions}

    def _gate_parts(self, customer: KnownCustomer) -> dict[str, object]:
        """Return what the gates of the gateways say of a customer, and which cannot be read."""
        read = self._queries.gates()
        lines, overrides = gate_lines(
            customer, ((name, answer.value.gate if answer.value else None) for name, _, answer in read)
        )
        unread = [(name, answer.problem) for name, _, answer in read if answer.problem]
        return {"lines": lines, "overrides": overrides, "unread": unread}


def _heads(meters: Sequence[MeterColumn]) -> list[tuple[str, str]]:
    return [(one.name, one.title) for one in meters]


def _text(names: Sequence[Name]) -> str:
    """Return who is behind a subject, in short."""
    return ", ".join(name.text for name in names[:3])


class MeterColumn(NamedTuple):
    """A kept meter as a column; `name` is that of the CSV and of the order."""

    key: str
    name: str
    title: str
    kept: KeptMeter


def _period(request: Request) -> Period:
    return period_of(request.query_params, datetime.now(UTC).date())
