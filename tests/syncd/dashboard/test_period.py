"""The period that a visitor chooses."""

from __future__ import annotations

from datetime import date

import pytest

from syncd.dashboard.period import period_of
from syncd.usage.days import Days

TODAY = date(2026, 11, 29)
THIS_MONTH = Days(date(2026, 11, 1), date(2026, 11, 30))


@pytest.mark.parametrize(
    ("query", "days", "month"),
    [
        ({}, THIS_MONTH, "2026-11"),
        ({"month": " 2026-10 "}, Days(date(2026, 10, 1), date(2026, 11, 1)), "2026-10"),
        ({"month": "2024-02"}, Days(date(2024, 2, 1), date(2024, 3, 1)), "2024-02"),
        ({"month": "2026-10", "from": "2026-11-28"}, Days(date(2026, 11, 28), date(2026, 11, 30)), ""),
        ({"from": "2026-02-27", "through": "2026-03-01"}, Days(date(2026, 2, 27), date(2026, 3, 2)), ""),
    ],
)
def test_the_form_shows_the_chosen_period(query: dict[str, str], days: Days, month: str) -> None:
    found = period_of(query, TODAY)
    assert (found.days, found.month, found.problem) == (days, month, None)
    values = [value for value, _ in found.months]
    assert month in values
    assert len(values) == len(set(values))
    again = period_of(found.query, TODAY)
    assert again == found, "its parameters choose it again"


@pytest.mark.parametrize("query", [{"month": "2026-13"}, {"from": "x"}, {"through": "2026-11-02"}])
def test_instead_of_a_wrong_period_this_month_is_chosen_and_the_problem_said(query: dict[str, str]) -> None:
    found = period_of(query, TODAY)
    assert (found.days, found.month, found.query) == (THIS_MONTH, "2026-11", {})
    assert found.problem


def test_thirteen_months_can_be_chosen_by_name() -> None:
    months = period_of({}, TODAY).months
    assert months[0] == ("2026-11", "November 2026")
    assert (months[-1], len(months)) == (("2025-11", "November 2025"), 13)
