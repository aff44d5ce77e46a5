"""What the kept usage says of unbilled subjects: last seen, trend, and what it is worth by the prices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from decimal import Decimal
from typing import Final

from syncd.core.unbilled import WINDOW
from syncd.metering.usage import REQUESTS_METER, TOKENS_METER
from syncd.usage.days import Days
from syncd.usage.estimates import Labels, Prices
from syncd.usage.store import UsageStore

_WEEK: Final = timedelta(days=7)


@dataclass(frozen=True, slots=True)
class Insight:
    """What is known of one subject; `estimate` is None without prices, or if nothing of it has a price."""

    last_seen: date | None = None
    this_week: float = 0
    """Requests of the last seven days, today included, or tokens where it has no requests."""
    week_before: float = 0
    estimate: Decimal | None = None

    @property
    def trend(self) -> str:
        """Return the last seven days against the seven before, in words."""
        if not self.week_before:
            return "new" if self.this_week else ""
        change = round(100 * (self.this_week - self.week_before) / self.week_before)
        return f"{change:+,} %" if change else "steady"


@dataclass(frozen=True, slots=True)
class Insights:
    """What is known of several subjects; `currency` is empty without prices."""

    of: Mapping[str, Insight] = field(default_factory=dict)
    currency: str = ""

    def estimate(self, subjects: Iterable[str]) -> Decimal | None:
        """Return what the usage of these subjects is worth, None if nothing of it has a price."""
        known = (self.of[key].estimate for key in subjects if key in self.of)
        found = [amount for amount in known if amount is not None]
        return sum(found, Decimal(0)) if found else None

    def of_subject(self, key: str) -> Insight:
        """Return what is known of a subject."""
        return self.of.get(key, Insight())


def insights(
    store: UsageStore,
    prices: Prices | None,
    subjects: Collection[str],
    today: date,
    shown: Collection[str] | None = None,
) -> Insights:
    """Return what the kept usage says of these subjects; raises StateError.

    Of those that are not among `shown`, only what they are worth.
    """
    if not subjects:
        return Insights({}, prices.currency if prices else "")
    tomorrow = today + timedelta(days=1)
    this_week, before = Days(tomorrow - _WEEK, tomorrow), Days(tomorrow - 2 * _WEEK, tomorrow - _WEEK)
    seen: dict[str, date] = {}
    now: dict[str, float] = {}
    then: dict[str, float] = {}
    shown = subjects if shown is None else shown
    for meter in (TOKENS_METER, REQUESTS_METER):
        for key, last in store.last_days(meter, shown).items():
            seen[key] = max(last, seen.get(key, last))
        recent, earlier = (store.by_subject(meter, days, shown) for days in (this_week, before))
        for key in recent.keys() | earlier.keys():
            now[key], then[key] = recent.get(key, 0), earlier.get(key, 0)
    worth = _worth(store, prices, subjects, Days(today - WINDOW, tomorrow)) if prices else {}
    found = {
        key: Insight(seen.get(key), now.get(key, 0), then.get(key, 0), worth.get(key)) for key in subjects
    }
    return Insights(found, prices.currency if prices else "")


def _worth(store: UsageStore, prices: Prices, subjects: Collection[str], days: Days) -> dict[str, Decimal]:
    """Return the estimate of each subject that has usage with a price, as if it were a customer of its own.

    Each month counts by itself, because the tiers of a price start again each month.
    """
    worth: defaultdict[str, Decimal] = defaultdict(Decimal)
    for month in days.by_month():
        used: defaultdict[str, list[tuple[str, Labels, float]]] = defaultdict(list)
        for meter in sorted(prices.meters):
            for subject, labels, value in store.by_labels(meter, month, subjects):
                if prices.rate_of(meter, labels) is not None:
                    used[subject].append((meter, labels, value))
        for subject, amounts in used.items():
            worth[subject] += prices.estimate(amounts)[0]
    return dict(worth)
