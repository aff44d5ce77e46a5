"""What cron means, as crontab(5) says."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from syncd.config.sections import next_times

NOW = datetime(2026, 11, 28, 22, 0, tzinfo=UTC)  # a Saturday


def days(expression: str, count: int = 3) -> list[str]:
    return [f"{time:%a %d %b %H:%M}" for time in next_times(expression, NOW, count)]


@pytest.mark.parametrize("weekday", ["0", "7", "sun", "SUN"])
def test_sunday_is_0_and_7_and_sun(weekday: str) -> None:
    assert days(f"0 3 * * {weekday}", 2) == ["Sun 29 Nov 03:00", "Sun 06 Dec 03:00"]


def test_a_day_of_the_month_or_a_weekday_is_enough() -> None:
    assert days("0 9 1 * 1") == ["Mon 30 Nov 09:00", "Tue 01 Dec 09:00", "Mon 07 Dec 09:00"]


def test_names_and_ranges_are_read() -> None:
    assert days("@daily", 1) == ["Sun 29 Nov 00:00"]
    assert days("@Weekly", 1) == ["Sun 29 Nov 00:00"]
    assert days("30 6 * dec mon-fri", 2) == ["Tue 01 Dec 06:30", "Wed 02 Dec 06:30"]
    assert next_times("0 0 29 2 *", NOW, 1) == [datetime(2028, 2, 29, tzinfo=UTC)]


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("30 2 31 2 *", "none of its months has a day 31"),
        ("0 0 31 4,6 *", "none of its months has a day 31"),
        ("0 0 32 * *", "bad day-of-month"),
        ("0 0 0 * *", "bad day-of-month"),
        ("0 0 31 13 *", "bad month"),
        ("61 * * * *", "bad minute"),
        ("0 0 * * 8", "bad day-of-week"),
        ("* * * *", "five crontab fields"),
        ("* * * * * *", "five crontab fields"),
        ("@reboot", "five crontab fields"),
        ("", "five crontab fields"),
    ],
)
def test_an_expression_that_never_comes_or_is_none_is_refused_with_the_reason(
    expression: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        next_times(expression, NOW, 1)
