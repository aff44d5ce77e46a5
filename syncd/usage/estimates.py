"""Estimates by payer: what the usage of some months is worth, added up row by row or read from the API."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Final

from openmeter_plugin.units import number
from syncd.metering.answers import API
from syncd.metering.base import Meter, MeteringApi
from syncd.metering.usage import rfc3339, whole
from syncd.usage.days import LONGEST
from syncd.usage.prices import Bill, Labels, Prices, digits_of, rounded

ADDITIVE: Final = frozenset({"count", "sum"})
"""Aggregations whose values of days and dimensions add up."""
NOTE: Final = (
    "Estimates are usage times the prices of the configuration; the invoice follows the customer's own plan."
)
_NOTHING: Final = Decimal(0)

_Bills = defaultdict[str, Bill]


def _bills() -> _Bills:
    return defaultdict(Bill)


@dataclass(slots=True)
class Estimate:
    """What usage is worth, by id of its customer and by unbilled subject.

    Add all usage of a calendar month, end the month, and add that of the next: a price sees the usage of one
    payer in one month. A customer has the total of an invoice, whose lines are rounded to the cent. An
    unbilled subject is charged as if it were a customer of its own, but not rounded: it has no invoice, and
    the worth of many small ones must add up.
    """

    prices: Prices
    owner_of: Mapping[str, str]
    """The id of the customer that pays for each subject."""
    customers: dict[str, Decimal] = field(default_factory=dict)
    unbilled: dict[str, Decimal] = field(default_factory=dict)
    unpriced: dict[str, float] = field(default_factory=dict)
    """By meter, what no rate fits."""
    gaps: list[str] = field(default_factory=list)
    """Why a part of the usage could not be read."""
    is_known: bool = False
    """Whether any month was charged."""
    _of_customers: _Bills = field(default_factory=_bills)
    _of_subjects: _Bills = field(default_factory=_bills)

    def add(self, meter: str, subject: str, labels: Labels, value: float) -> None:
        """Add usage of the month; that of a meter without any rate is left out."""
        rate = self.prices.rate_of(meter, labels)
        if rate is None:
            if meter in self.prices.meters:
                self.unpriced[meter] = self.unpriced.get(meter, 0.0) + value
            return
        owner = self.owner_of.get(subject)
        bill = self._of_subjects[subject] if owner is None else self._of_customers[owner]
        bill.add(rate, value)

    def end_month(self) -> None:
        """Charge what was added since the last month ended."""
        self.is_known = True
        for customer, bill in self._of_customers.items():
            self.customers[customer] = self.customers.get(customer, _NOTHING) + self.prices.invoice(bill)
        for subject, bill in self._of_subjects.items():
            self.unbilled[subject] = self.unbilled.get(subject, _NOTHING) + self.prices.charge(bill)
        self._of_customers.clear()
        self._of_subjects.clear()

    @property
    def unbilled_total(self) -> Decimal:
        """Return what the usage without a customer is worth."""
        return sum(self.unbilled.values(), _NOTHING)

    @property
    def total(self) -> Decimal:
        """Return what all usage is worth."""
        return sum(self.customers.values(), self.unbilled_total)

    def of_customer(self, identity: str) -> Decimal | None:
        """Return what the usage of a customer is worth, None if that is not known."""
        return self.customers.get(identity, _NOTHING) if self.is_known else None

    def of_unbilled(self, subject: str) -> Decimal | None:
        """Return what the usage of an unbilled subject is worth, None if that is not known."""
        return self.unbilled.get(subject, _NOTHING) if self.is_known else None

    def to_json(self) -> dict[str, object]:
        """Return the sums; amounts are texts, because JSON has no exact decimals."""
        return {
            "currency": self.prices.currency,
            "total": plain(self.total) if self.is_known else None,
            "unbilled": plain(self.unbilled_total) if self.is_known else None,
            "unpriced": {meter: whole(value) for meter, value in sorted(self.unpriced.items())},
            "gaps": list(self.gaps),
        }

    def left_out(self) -> list[str]:
        """Return sentences on what the estimate leaves out."""
        return [
            f"No price fits {number(whole(value))} of {meter}; the estimate leaves that out."
            for meter, value in sorted(self.unpriced.items())
        ] + [f"The estimate is incomplete: {gap}." for gap in self.gaps]


def read_estimate(
    api: MeteringApi, prices: Prices, owner_of: Mapping[str, str], since: datetime | None, until: datetime
) -> Estimate:
    """Read what the usage of a period is worth: one query for each month and meter with a price."""
    found = Estimate(prices, owner_of)
    if since is None:
        found.gaps.append("a period without a beginning (`--from`, `--last`) is not estimated")
        return found
    if until - since > timedelta(days=LONGEST):
        found.gaps.append(f"usage of more than {LONGEST} days is not estimated")
        return found
    meters = list(_priced(api.meters(), prices, found.gaps))
    for begin, end in _months(since, until):
        for meter, dimensions in meters:
            # Sorted: a sum of fractions depends on its order, and the same usage must have the same estimate.
            for row in sorted(api.grouped_usage(meter, dimensions, rfc3339(begin), rfc3339(end))):
                labels = tuple(zip(dimensions, row.labels, strict=True))
                found.add(meter.key, row.subject, labels, row.value)
        found.end_month()
    return found


def _priced(
    known: Mapping[str, Meter], prices: Prices, gaps: list[str]
) -> Iterator[tuple[Meter, tuple[str, ...]]]:
    """Yield the meters to query, each with the dimensions that its prices ask for."""
    for key in sorted(prices.meters):
        meter = known.get(key)
        if meter is None:
            gaps.append(f"the {API} has no meter {key}")
            continue
        if meter.aggregation not in ADDITIVE:
            gaps.append(f"meter {key} neither counts nor sums")
            continue
        dimensions = sorted(prices.dimensions(key))
        if lacking := [name for name in dimensions if name not in meter.dimensions]:
            gaps.append(f"meter {key} has no dimension {', '.join(lacking)}")
        yield meter, tuple(name for name in dimensions if name in meter.dimensions)


def _months(since: datetime, until: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Return the parts of a period by calendar month in UTC."""
    since, until = since.astimezone(UTC), until.astimezone(UTC)
    while since < until:
        first = since.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        following = (first + timedelta(days=32)).replace(day=1)
        yield since, min(following, until)
        since = following


def plain(amount: Decimal | None) -> str | None:
    """Return an amount in full, as a text for programs: ``1204.5``."""
    if amount is None:
        return None
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def money(amount: Decimal | None, currency: str) -> str:
    """Format an amount of money: ``1,204.50 EUR``; a part of a cent shows its first digits."""
    if amount is None:
        return ""
    places = digits_of(currency)
    if amount and abs(amount) < Decimal(1).scaleb(-places):
        places = min(12, places - amount.adjusted())
    return f"{rounded(amount, places):,.{places}f} {currency}"
