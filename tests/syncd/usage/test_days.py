"""Ranges of days, and what each is compared with."""

from __future__ import annotations

from datetime import date

import pytest

from syncd.usage.days import Days, RangeError, chosen, month_before, month_of

TODAY = date(2026, 11, 29)


def days(since: str, until: str) -> Days:
    return Days(date.fromisoformat(since), date.fromisoformat(until))


@pytest.mark.parametrize(
    ("shown", "before"),
    [
        (("2026-10-01", "2026-11-01"), ("2026-09-01", "2026-10-01")),
        (("2026-10-01", "2026-12-01"), ("2026-08-01", "2026-10-01")),
        (("2026-01-01", "2026-02-01"), ("2025-12-01", "2026-01-01")),
        (("2026-11-01", "2026-11-30"), ("2026-10-01", "2026-10-30")),
        (("2026-03-01", "2026-03-31"), ("2026-02-01", "2026-03-01")),
        (("2026-11-03", "2026-11-10"), ("2026-10-27", "2026-11-03")),
        (("2026-11-01", "2026-12-15"), ("2026-09-18", "2026-11-01")),
    ],
    ids=["month", "months", "january", "month so far", "shorter month", "week", "across months"],
)
def test_a_range_is_compared_with_the_one_before_it(shown: tuple[str, str], before: tuple[str, str]) -> None:
    assert days(*shown).before() == days(*before)


def test_the_parts_by_month_are_the_range() -> None:
    parts = list(days("2026-10-20", "2027-01-05").by_month())
    assert [str(part.since) for part in parts] == ["2026-10-20", "2026-11-01", "2026-12-01", "2027-01-01"]
    assert [day for part in parts for day in part] == list(days("2026-10-20", "2027-01-05"))


def test_this_month_up_to_today_is_the_default() -> None:
    assert chosen(None, None, None, TODAY) == days("2026-11-01", "2026-11-30")


def test_a_month_that_has_ended_is_whole_and_the_current_one_ends_today() -> None:
    assert chosen("2026-10", None, None, TODAY) == month_of(date(2026, 10, 5))
    assert chosen("2026-11", None, None, TODAY) == days("2026-11-01", "2026-11-30")
    assert chosen("2026-12", None, None, TODAY) == days("2026-12-01", "2026-12-02")


def test_both_days_of_a_chosen_range_belong_to_it() -> None:
    assert chosen(None, "2026-11-03", "2026-11-09", TODAY) == days("2026-11-03", "2026-11-10")
    assert chosen(None, "2026-11-28", None, TODAY) == days("2026-11-28", "2026-11-30")


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (("2026-13", None, None), "month"),
        (("x", None, None), "month"),
        ((None, "2026-02-30", None), "from"),
        ((None, None, "2026-10-01"), "from"),
        ((None, "2026-10-05", "2026-10-04"), "after"),
        ((None, "2020-01-01", "2026-10-04"), "800"),
        ((None, "9999-12-31", "9999-12-31"), "after"),
        ((None, "0001-01-01", "0001-01-02"), "years"),
        (("0001-01", None, None), "years"),
    ],
)
def test_what_is_no_range_is_named(asked: tuple[str | None, str | None, str | None], fault: str) -> None:
    with pytest.raises(RangeError, match=fault):
        chosen(*asked, TODAY)


def test_a_heading_names_a_month_a_day_or_both_ends() -> None:
    assert month_of(TODAY).describe() == "November 2026"
    assert month_before(date(2026, 1, 31)).describe() == "December 2025"
    assert days("2026-11-03", "2026-11-04").describe() == "2026-11-03"
    assert days("2026-11-03", "2026-11-10").describe() == "2026-11-03 to 2026-11-09"
