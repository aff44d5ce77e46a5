"""The usage page: what finance sees first. It reads the kept usage, never the metering API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from syncd.core.text_csv import Cell
from syncd.dashboard.charts import Chart, chart, per_day
from syncd.dashboard.period import period_of
from syncd.dashboard.tables import csv_response
from syncd.dashboard.web import Visitor, Web
from syncd.metering.usage import whole
from syncd.usage.figures import Amount, Slice
from syncd.usage.report import MeterUsage, Report, Reports, dimension_words

TOP: Final = 10
_SLICES: Final = 10
_LATE: Final = 50


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The largest values of a dimension; `rest` has all others together."""

    title: str
    slices: tuple[Slice, ...]
    rest: Amount | None
    count: int


def breakdowns(usage: MeterUsage) -> list[Breakdown]:
    """Return the usage of a meter by each of its dimensions."""
    found = []
    for name, slices in usage.slices.items():
        rest = slices[_SLICES:]
        others = sum((entry.amount for entry in rest), Amount()) if rest else None
        found.append(Breakdown(dimension_words(name), slices[:_SLICES], others, len(slices)))
    return found


class UsagePage:
    """Renders the page and its downloads."""

    def __init__(self, web: Web, reports: Reports) -> None:
        self._web = web
        self._reports = reports

    def show(self, request: Request, visitor: Visitor) -> Response:
        """Show the usage of a month or any range of days."""
        period = period_of(request.query_params, datetime.now(UTC).date())
        config = self._web.config()
        report = self._reports.report(period.days, config)
        if wanted := request.query_params.get("csv"):
            return self._csv(report, wanted)
        index = self._meter(request, report)
        return self._web.render(
            visitor,
            "usage.html",
            report=report,
            period=period,
            index=index,
            usage=report.meters[index] if report.meters else None,
            charts=[_chart(usage, report) for usage in report.meters],
            breakdowns=breakdowns(report.meters[index]) if report.meters else [],
            totals=[report.figures.total(number) for number in range(len(report.meters))],
            unbilled=[report.figures.unbilled_total(number) for number in range(len(report.meters))],
            shown=TOP,
            late=report.late[-_LATE:],
            interval=config.usage.interval.total_seconds(),
        )

    def _meter(self, request: Request, report: Report) -> int:
        wanted = request.query_params.get("meter")
        names = [usage.meter for usage in report.meters]
        return names.index(wanted) if wanted in names else 0

    def _csv(self, report: Report, wanted: str) -> Response:
        name = f"{report.days.since.isoformat()}-{report.days.last.isoformat()}"
        names = [usage.meter for usage in report.meters]
        if wanted == "days":
            rows = _day_rows(report)
            return csv_response(f"usage-by-day-{name}", ["day", *names], rows)
        money = ["estimate", "currency"] if report.estimates else []
        heads = ["customer_key", "customer_id", "customer_name", "subject", *names, *_before(names), *money]
        return csv_response(f"usage-by-customer-{name}", heads, _customer_rows(report))


def _before(names: list[str]) -> list[str]:
    return [f"{name}_before" for name in names]


def _day_rows(report: Report) -> Iterator[list[Cell]]:
    for number, day in enumerate(report.days):
        yield [day, *(whole(usage.by_day[number]) for usage in report.meters)]


def _customer_rows(report: Report) -> Iterator[list[Cell]]:
    """Yield a row for each customer, then one for each unbilled subject."""
    currency: list[Cell] = [report.estimates.currency] if report.estimates else []
    for customer in report.figures.customers:
        payer = customer.customer
        yield [
            payer.key,
            payer.id,
            payer.name,
            None,
            *(whole(amount.now) for amount in customer.amounts),
            *(whole(amount.before) for amount in customer.amounts),
            *([customer.estimate, *currency] if currency else []),
        ]
    for subject in report.figures.unbilled:
        yield [
            None,
            None,
            subject.name,
            subject.subject,
            *(whole(amount.now) for amount in subject.amounts),
            *(whole(amount.before) for amount in subject.amounts),
            *([subject.estimate, *currency] if currency else []),
        ]


def _chart(usage: MeterUsage, report: Report) -> Chart:
    before = usage.before if report.is_compared else ()
    title = f"{usage.words.capitalize()} per day"
    return chart(title, usage.words, per_day(report.days.since, usage.by_day, before))
