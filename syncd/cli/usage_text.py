"""``syncd usage``: the period, and usage as a table for people or as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import NamedTuple

import typer
from rich.console import Console

from openmeter_plugin.units import number, plural
from syncd.cli.options import Last, Sort, printable
from syncd.metering.usage import CustomerUsage, SubjectUsage, Usage, whole
from syncd.usage.estimates import NOTE, Estimate, money, plain

_MAX_CUSTOMERS = 100
"""Customers on a terminal; what is unbilled is never cut."""


@dataclass(frozen=True, slots=True)
class Period:
    """From `since` to before `until`; None is open."""

    since: datetime | None = None
    until: datetime | None = None

    def describe(self) -> str:
        """Return it for a heading."""
        if self.since is None and self.until is None:
            return "of all time"
        begin = f" from {_time(self.since)}" if self.since else ""
        end = f" to {_time(self.until)}" if self.until else " until now"
        return f"{begin}{end} (UTC)".strip()


def period(since: datetime | None, until: datetime | None, last: Last | None, now: datetime) -> Period:
    """Return the period that the options ask for; raises BadParameter."""
    if last is None:
        if since and until and since >= until:
            raise typer.BadParameter("--from must be before --to")
        return Period(since, until)
    if since or until:
        raise typer.BadParameter("--last cannot be combined with --from and --to")
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match last:
        case Last.DAY:
            return Period(today - timedelta(days=1), today)
        case Last.WEEK:
            monday = today - timedelta(days=today.weekday())
            return Period(monday - timedelta(days=7), monday)
        case Last.MONTH:
            first = today.replace(day=1)
            return Period((first - timedelta(days=1)).replace(day=1), first)


def sorted_usage(usage: Usage, by: Sort) -> Usage:
    """Return the usage with customers, and subjects within them, sorted; the largest first."""

    def subject_rank(subject: SubjectUsage) -> tuple[float, float, str]:
        return (*_rank(by, subject.requests, subject.tokens), subject.key)

    def customer_rank(customer: CustomerUsage) -> tuple[float, float, str]:
        return (*_rank(by, customer.requests, customer.tokens), customer.key or customer.id)

    customers = (
        replace(customer, subjects=tuple(sorted(customer.subjects, key=subject_rank)))
        for customer in usage.customers
    )
    return Usage(tuple(sorted(customers, key=customer_rank)), tuple(sorted(usage.unbilled, key=subject_rank)))


def _rank(by: Sort, requests: float, tokens: float) -> tuple[float, float]:
    match by:
        case Sort.REQUESTS:
            return -requests, -tokens
        case Sort.TOKENS:
            return -tokens, -requests
        case Sort.NAME:
            return 0.0, 0.0


class Row(NamedTuple):
    """A line of the table; `estimate` is None where there is none, as for one of a customer's subjects."""

    label: str
    requests: float
    tokens: float
    style: str = ""
    estimate: Decimal | None = None


def show_usage(console: Console, usage: Usage, when: Period, estimate: Estimate | None = None) -> None:
    """Print usage by customer and subject with totals; what no customer pays for comes first."""
    worth = estimate.customers if estimate else {}
    usage = _complete(usage, estimate)
    used = [one for one in usage.customers if one.requests or one.tokens or worth.get(one.id)]
    shown = used[:_MAX_CUSTOMERS] if console.is_terminal else used
    rows = list(_rows(usage.unbilled, shown, estimate))
    requests, tokens = _sums(usage)
    rows.append(Row("total", requests, tokens, "bold", estimate.total if estimate else None))
    currency = estimate.prices.currency if estimate and estimate.is_known else None
    _print_table(console, rows, f"Usage {when.describe()}", currency)
    if cut := len(used) - len(shown):
        console.file.write(f"... and {plural(cut, 'more customer')}; --output csv shows all\n")
    if unused := len(usage.customers) - len(used):
        console.file.write(f"{plural(unused, 'customer')} without usage in this period.\n")
    unbilled = sum(subject.requests for subject in usage.unbilled)
    share = f" ({100 * unbilled / requests:.1f} % of the requests)" if requests and unbilled else ""
    console.file.write(f"Unbilled subjects: {number(len(usage.unbilled))}{share}.\n")
    for sentence in (*estimate.left_out(), NOTE) if estimate else ():
        console.file.write(f"{sentence}\n")


def _rows(
    unbilled: Sequence[SubjectUsage], customers: Iterable[CustomerUsage], estimate: Estimate | None
) -> Iterator[Row]:
    if unbilled:
        sums = sum(s.requests for s in unbilled), sum(s.tokens for s in unbilled)
        total = estimate.unbilled_total if estimate else None
        yield Row("unbilled: on no customer", *sums, "bold red", total)
        yield from _subjects(unbilled, estimate)
    for customer in customers:
        key = customer.key or customer.id
        label = key if customer.name == key else f"{key} ({customer.name})"
        worth = estimate.of_customer(customer.id) if estimate else None
        yield Row(label, customer.requests, customer.tokens, estimate=worth)
        yield from _subjects(customer.subjects)


def _subjects(subjects: Iterable[SubjectUsage], estimate: Estimate | None = None) -> Iterator[Row]:
    for subject in subjects:
        name = f" ({subject.name})" if subject.name else ""
        label = f"  {subject.key}{name}"
        worth = estimate.of_unbilled(subject.key) if estimate else None
        yield Row(label, subject.requests, subject.tokens, "dim", worth)


def _sums(usage: Usage) -> tuple[float, float]:
    subjects = [s for customer in usage.customers for s in customer.subjects] + list(usage.unbilled)
    return sum(subject.requests for subject in subjects), sum(subject.tokens for subject in subjects)


def _print_table(console: Console, rows: Sequence[Row], heading: str, currency: str | None) -> None:
    """Print rows with aligned columns of numbers; on a terminal a long label is cut in the middle.

    With a currency the last column has the estimates.
    """
    heads = ["customer", "requests", "tokens", *(["estimate"] if currency else [])]
    cells = [
        [
            printable(row.label),
            number(whole(row.requests)),
            number(whole(row.tokens)),
            *([money(row.estimate, currency)] if currency else []),
        ]
        for row in rows
    ]
    label, *widths = (max(map(len, column)) for column in zip(heads, *cells, strict=True))
    if console.is_terminal:
        label = min(label, max(console.width - sum(widths) - 2 * len(widths), 20))

    def line(texts: Sequence[str]) -> str:
        figures = (f"  {text:>{width}}" for text, width in zip(texts[1:], widths, strict=True))
        return f"{_fitted(texts[0], label):<{label}}{''.join(figures)}".rstrip()

    console.print(heading, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(line(heads), style="bold", markup=False, highlight=False, soft_wrap=True)
    for row, texts in zip(rows, cells, strict=True):
        if console.is_terminal:
            console.print(line(texts), style=row.style, markup=False, highlight=False, soft_wrap=True)
        else:
            console.file.write(f"{line(texts)}\n")


def _fitted(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    end = (width - 3) // 3
    return f"{text[: width - 3 - end]}...{text[-end:]}"


_COLUMNS = ("from", "to", "customer_key", "customer_id", "customer_name", "subject", "requests", "tokens")


def print_csv(usage: Usage, when: Period, estimate: Estimate | None = None) -> None:
    """Print a line for each subject; the customer's columns are empty where no customer pays.

    Tiers see a customer's whole usage, so its estimate is in the first of its lines: the column adds up.
    """
    usage = _complete(usage, estimate)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow((*_COLUMNS, *(("estimate", "currency") if estimate else ())))
    span = (_time(when.since), _time(when.until))
    for customer in usage.customers:
        owner = (customer.key or "", customer.id, customer.name)
        worth = estimate.of_customer(customer.id) if estimate else None
        for subject in customer.subjects or ([SubjectUsage("", 0, 0)] if worth else []):
            cells = map(_cell, (*owner, subject.key))
            writer.writerow((*span, *cells, *_amounts(subject), *_worth(worth, estimate)))
            worth = None
    for subject in usage.unbilled:
        worth = estimate.of_unbilled(subject.key) if estimate else None
        cells = map(_cell, ("", "", "", subject.key))
        writer.writerow((*span, *cells, *_amounts(subject), *_worth(worth, estimate)))


def _complete(usage: Usage, estimate: Estimate | None) -> Usage:
    """Return the usage with the unbilled subjects that only have usage of other meters, with a price."""
    listed = {subject.key for subject in usage.unbilled}
    other = sorted(set(estimate.unbilled) - listed) if estimate else []
    return replace(usage, unbilled=(*usage.unbilled, *(SubjectUsage(key, 0, 0) for key in other)))


def _worth(amount: Decimal | None, estimate: Estimate | None) -> tuple[str, ...]:
    if estimate is None:
        return ()
    return ("", "") if amount is None else (plain(amount) or "", estimate.prices.currency)


def to_json(usage: Usage, estimate: Estimate | None = None) -> dict[str, object]:
    """Return the usage with its estimate, as ``syncd usage --output json`` prints it."""
    document = _complete(usage, estimate).to_json()
    if estimate is None:
        return document
    return {
        **document,
        "customers": [
            {**customer.to_json(), "estimate": plain(estimate.of_customer(customer.id))}
            for customer in usage.customers
        ],
        "unbilled": [
            {**subject.to_json(), "estimate": plain(estimate.of_unbilled(subject.key))}
            for subject in _complete(usage, estimate).unbilled
        ],
        "estimate": estimate.to_json(),
    }


def _amounts(subject: SubjectUsage) -> tuple[float, float]:
    return whole(subject.requests), whole(subject.tokens)


def _cell(text: str) -> str:
    """Return a text that a spreadsheet does not run as a formula: names are made by others."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _time(moment: datetime | None) -> str:
    """Return a time in UTC; a midnight as its day."""
    if moment is None:
        return ""
    moment = moment.astimezone(UTC)
    form = "%Y-%m-%d" if moment == moment.replace(hour=0, minute=0, second=0, microsecond=0) else None
    return moment.strftime(form or "%Y-%m-%dT%H:%M:%SZ")
