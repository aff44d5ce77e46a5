"""``syncd usage``: the period, and usage as a table for people or as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import typer
from rich.console import Console

from openmeter_plugin.units import number, plural
from syncd.cli.options import Last, Sort, printable
from syncd.metering.usage import CustomerUsage, SubjectUsage, Usage, whole

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


Row = tuple[str, float, float, str]
"""A label, requests, tokens, and the style of the line."""


def show_usage(console: Console, usage: Usage, when: Period) -> None:
    """Print usage by customer and subject with totals; what no customer pays for comes first."""
    used = [customer for customer in usage.customers if customer.requests or customer.tokens]
    shown = used[:_MAX_CUSTOMERS] if console.is_terminal else used
    rows = list(_rows(usage.unbilled, shown))
    requests, tokens = _sums(usage)
    rows.append(("total", requests, tokens, "bold"))
    _print_table(console, rows, f"Usage {when.describe()}")
    if cut := len(used) - len(shown):
        console.file.write(f"... and {plural(cut, 'more customer')}; --output csv shows all\n")
    if unused := len(usage.customers) - len(used):
        console.file.write(f"{plural(unused, 'customer')} without usage in this period.\n")
    unbilled = sum(subject.requests for subject in usage.unbilled)
    share = f" ({100 * unbilled / requests:.1f} % of the requests)" if requests and unbilled else ""
    console.file.write(f"Unbilled subjects: {number(len(usage.unbilled))}{share}.\n")


def _rows(unbilled: Sequence[SubjectUsage], customers: Iterable[CustomerUsage]) -> Iterator[Row]:
    if unbilled:
        sums = sum(s.requests for s in unbilled), sum(s.tokens for s in unbilled)
        yield ("unbilled: on no customer", *sums, "bold red")
        yield from _subjects(unbilled)
    for customer in customers:
        key = customer.key or customer.id
        label = key if customer.name == key else f"{key} ({customer.name})"
        yield (label, customer.requests, customer.tokens, "")
        yield from _subjects(customer.subjects)


def _subjects(subjects: Iterable[SubjectUsage]) -> Iterator[Row]:
    for subject in subjects:
        name = f" ({subject.name})" if subject.name else ""
        yield (f"  {subject.key}{name}", subject.requests, subject.tokens, "dim")


def _sums(usage: Usage) -> tuple[float, float]:
    subjects = [s for customer in usage.customers for s in customer.subjects] + list(usage.unbilled)
    return sum(subject.requests for subject in subjects), sum(subject.tokens for subject in subjects)


def _print_table(console: Console, rows: Sequence[Row], heading: str) -> None:
    """Print rows with aligned columns of numbers; on a terminal a long label is cut in the middle."""
    cells = [
        (printable(label), number(whole(requests)), number(whole(tokens)), style)
        for label, requests, tokens, style in rows
    ]
    wide = max(len("requests"), *(len(cell[1]) for cell in cells))
    wider = max(len("tokens"), *(len(cell[2]) for cell in cells))
    label = max(len("customer"), *(len(cell[0]) for cell in cells))
    if console.is_terminal:
        label = min(label, max(console.width - wide - wider - 4, 20))

    def line(first: str, second: str, third: str) -> str:
        return f"{_fitted(first, label):<{label}}  {second:>{wide}}  {third:>{wider}}"

    console.print(heading, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(
        line("customer", "requests", "tokens"), style="bold", markup=False, highlight=False, soft_wrap=True
    )
    for first, second, third, style in cells:
        if console.is_terminal:
            console.print(
                line(first, second, third), style=style, markup=False, highlight=False, soft_wrap=True
            )
        else:
            console.file.write(f"{line(first, second, third)}\n")


def _fitted(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    end = (width - 3) // 3
    return f"{text[: width - 3 - end]}...{text[-end:]}"


_COLUMNS = ("from", "to", "customer_key", "customer_id", "customer_name", "subject", "requests", "tokens")


def print_csv(usage: Usage, when: Period) -> None:
    """Print a line for each subject; the customer's columns are empty where no customer pays."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_COLUMNS)
    span = (_time(when.since), _time(when.until))
    for customer in usage.customers:
        owner = (customer.key or "", customer.id, customer.name)
        for subject in customer.subjects:
            writer.writerow((*span, *map(_cell, (*owner, subject.key)), *_amounts(subject)))
    for subject in usage.unbilled:
        writer.writerow((*span, "", "", "", _cell(subject.key), *_amounts(subject)))


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
