"""The period that a visitor chooses: a month by its name, or any days. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Final

from syncd.usage.days import Days, RangeError, chosen, month_before, month_of

_MONTHS: Final = 13
"""Months that can be chosen by name; any other days by their dates."""


@dataclass(frozen=True, slots=True)
class Period:
    """The chosen days, the parameters that choose them again, and why the wanted ones are not shown."""

    days: Days
    month: str
    """The chosen month; empty for other days."""
    months: tuple[tuple[str, str], ...]
    """The months that can be chosen, the latest first, as value and title."""
    query: Mapping[str, str]
    problem: str | None = None


def period_of(query: Mapping[str, str], today: date) -> Period:
    """Return the period that query parameters ask for; this month if that is none."""
    given = {name: query.get(name, "").strip() for name in ("month", "from", "through")}
    problem = None
    try:
        days = chosen(given["month"] or None, given["from"], given["through"], today)
    except RangeError as error:
        given = dict.fromkeys(given, "")
        days, problem = chosen(None, None, None, today), str(error)
    if given["from"]:
        given["month"] = ""
        month, first = "", [("", "Other days")]
    else:
        month = f"{days.since:%Y-%m}"
        first = []
    months = _months(today)
    if month and month not in dict(months):
        first.append((month, month_of(days.since).describe()))
    query = {name: value for name, value in given.items() if value}
    return Period(days, month, (*first, *months), query, problem)


def _months(today: date) -> list[tuple[str, str]]:
    found, month = [], month_of(today)
    for _ in range(_MONTHS):
        found.append((f"{month.since:%Y-%m}", month.describe()))
        month = month_before(month.since)
    return found
