"""Months of UTC."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from syncd.close.month import Month


@pytest.mark.parametrize(
    ("text", "until"),
    [("2026-10", (2026, 11)), ("2026-12", (2027, 1)), ("2027-02", (2027, 3)), ("2028-01", (2028, 2))],
)
def test_a_month_ends_where_the_next_begins(text: str, until: tuple[int, int]) -> None:
    month = Month.parse(text)
    assert str(month) == text
    assert month.since == datetime(month.year, month.number, 1, tzinfo=UTC)
    assert month.until == datetime(*until, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    ["", "2026", "2026-13", "2026-00", "2026-1", "26-10", "2026-10-01", "0000-01", "9999-12", "\uff12026-10"],
)
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 2026-10"):
        Month.parse(text)


def test_months_sort_by_time() -> None:
    assert Month(2026, 12) < Month(2027, 1) < Month(2027, 2)
