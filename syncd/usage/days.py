"""Ranges of UTC days, as finance chooses them, and the range before that each is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

_ONE = timedelta(days=1)
LONGEST = 800
"""Days of the longest range: more than two years."""
_YEARS = range(2000, 2200)
"""The years that can be chosen: others are slips of the keyboard."""
_LATEST = date(_YEARS[-1], 12, 31)


class RangeError(ValueError):
    """A range that cannot be used; the text says why."""


@dataclass(frozen=True, slots=True, order=True)
class Days:
    """The UTC days from `since` to before `until`."""

    since: date
    until: date

    def __post_init__(self) -> None:
        if self.since >= self.until:
            raise RangeError("the first day must not be after the last one")
        if (self.until - self.since).days > LONGEST:
            raise RangeError(f"at most {LONGEST} days can be shown at once")

    def __len__(self) -> int:
        return (self.until - self.since).days

    def __iter__(self) -> Iterator[date]:
        return (self.since + timedelta(days=count) for count in range(len(self)))

    def __contains__(self, day: object) -> bool:
        return isinstance(day, date) and self.since <= day < self.until

    @property
    def last(self) -> date:
        """Return the last day of the range."""
        return self.until - _ONE

    @property
    def is_months(self) -> bool:
        """Return whether the range consists of whole calendar months."""
        return self.since.day == 1 and self.until.day == 1

    @property
    def start(self) -> datetime:
        """Return the time at which the range starts."""
        return midnight(self.since)

    @property
    def end(self) -> datetime:
        """Return the time before which the range ends."""
        return midnight(self.until)

    def before(self) -> Days:
        """Return the range to compare with: as many months before, or the days that precede it.

        A month that has only begun is compared with as many days of the month before. Of a longer month the
        whole month before is taken: March 1 to 30 is compared with all of February.
        """
        if self.is_months:
            months = (self.until.year - self.since.year) * 12 + self.until.month - self.since.month
            return Days(_month_start(self.since, -months), self.since)
        if self.since.day == 1 and self.last.month == self.since.month and self.last.year == self.since.year:
            first = _month_start(self.since, -1)
            return Days(first, min(self.since, first + timedelta(days=len(self))))
        return Days(self.since - timedelta(days=len(self)), self.since)

    def by_month(self) -> Iterator[Days]:
        """Return the parts of the range by calendar month, the first one first."""
        since = self.since
        while since < self.until:
            until = min(_month_start(since, 1), self.until)
            yield Days(since, until)
            since = until

    def describe(self) -> str:
        """Return the range for a heading: ``November 2026``, ``2026-11-03 to 2026-11-09``."""
        if self == month_of(self.since):
            return f"{self.since:%B %Y}"
        if len(self) == 1:
            return self.since.isoformat()
        return f"{self.since.isoformat()} to {self.last.isoformat()}"


def midnight(day: date) -> datetime:
    """Return the start of a day."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def month_of(day: date) -> Days:
    """Return the calendar month of a day."""
    return Days(_month_start(day, 0), _month_start(day, 1))


def month_before(day: date) -> Days:
    """Return the calendar month before that of a day."""
    return Days(_month_start(day, -1), _month_start(day, 0))


def _month_start(day: date, months: int) -> date:
    """Return the first day of the month of `day`, or of one so many months away."""
    index = day.year * 12 + day.month - 1 + months
    return date(index // 12, index % 12 + 1, 1)


def chosen(month: str | None, first: str | None, last: str | None, today: date) -> Days:
    """Return the range that a page or command asks for; this month up to today by default.

    `month` is ``2026-10``; `first` and `last` are days, both of them part of the range. Raises RangeError.
    """
    found = _chosen(month, first, last, today)
    if found.since.year not in _YEARS or found.last.year not in _YEARS:
        raise RangeError(f"the range must be between the years {_YEARS[0]} and {_YEARS[-1]}")
    return found


def _chosen(month: str | None, first: str | None, last: str | None, today: date) -> Days:
    if first or last:
        since, through = _day(first, "from"), _day(last, "through") if last else today
        return Days(since, min(through, _LATEST) + _ONE)
    if month:
        try:
            whole = month_of(date.fromisoformat(f"{month}-01"))
        except ValueError:
            raise RangeError(f"month must be a month such as 2026-10, not {month!r}") from None
        return Days(whole.since, min(whole.until, max(today, whole.since) + _ONE))
    return Days(month_of(today).since, today + _ONE)


def _day(text: str | None, name: str) -> date:
    try:
        return date.fromisoformat(text or "")
    except ValueError:
        raise RangeError(f"{name} must be a day such as 2026-10-31, not {text!r}") from None
