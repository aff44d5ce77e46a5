"""Estimates: usage times the prices of the configuration, in exact decimals, added up by payer.

A price applies to the quantity of a customer in a calendar month, as on an invoice: tiers start again each
month. Part of a month is charged as if it were all, so a graduated price makes an early estimate too high or
too low, never the one of a whole month.

Amounts equal those of OpenMeter's invoices to the smallest unit of the currency; a test holds that against
invoices of a real OpenMeter. An invoice charges a flat price to a customer without usage too: estimates are
of usage, so here nothing costs nothing.

Usage is added up row by row, or read from the metering API.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_HALF_UP, Context, Decimal
from typing import Final, Literal

from openmeter_plugin.units import number
from syncd.config.prices import PricesConfig, RateConfig
from syncd.metering.answers import API
from syncd.metering.base import Meter, MeteringApi
from syncd.metering.usage import rfc3339, whole
from syncd.usage.days import LONGEST

Labels = tuple[tuple[str, str], ...]
"""The dimensions of some usage with their values, sorted by name."""

# The digits to which OpenMeter rounds (pkg/currencyx by github.com/invopop/gobl v0.504.0); ISO 4217 has two
# for HUF, MGA and MRU.
_WITHOUT_CENTS: Final = "BIF BYR CLP DJF GNF HUF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF"
_THOUSANDTHS: Final = "BHD IQD JOD KWD LYD OMR TND"
_DIGITS: Final[Mapping[str, int]] = (
    dict.fromkeys(_WITHOUT_CENTS.split(), 0)
    | dict.fromkeys(_THOUSANDTHS.split(), 3)
    | {"CLF": 4, "MGA": 5, "MRU": 5}
)
# A configured amount has up to 30 digits before and 30 after the point.
_WIDE: Final = Context(prec=64)


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier: up to and including `up_to`, None for the last one; `amount` is for `per` units of its rate."""

    up_to: Decimal | None
    amount: Decimal
    flat: Decimal


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate: which usage it fits, and what a quantity costs."""

    meter: str
    where: Mapping[str, frozenset[str]]
    price: Literal["unit", "package", "flat", "graduated", "volume"]
    amount: Decimal
    per: Decimal
    tiers: tuple[Tier, ...] = ()

    def fits(self, meter: str, labels: Labels) -> bool:
        """Return whether the rate is for this usage; a dimension that it lacks has the empty value."""
        if meter != self.meter:
            return False
        if not self.where:
            return True
        values = dict(labels)
        return all(values.get(name, "") in wanted for name, wanted in self.where.items())

    def lines(self, quantity: Decimal) -> Iterator[Decimal]:
        """Yield what a quantity of one customer and month costs, in the lines of an invoice, not rounded.

        The lines are those of openmeter/billing/rating/service/rate: a tier has one for its units and one for
        its flat price.
        """
        if quantity <= 0:
            return
        match self.price:
            case "unit":
                yield quantity * self.amount / self.per
            case "package":
                yield (quantity / self.per).to_integral_value(ROUND_CEILING) * self.amount
            case "flat":
                yield self.amount
            case "volume":
                tier = next(tier for tier in self.tiers if tier.up_to is None or quantity <= tier.up_to)
                yield from (tier.flat, quantity * tier.amount / self.per)
            case "graduated":
                yield from self._graduated(quantity)

    def _graduated(self, quantity: Decimal) -> Iterator[Decimal]:
        start = Decimal(0)
        for tier in self.tiers:
            if quantity <= start:
                break
            end = quantity if tier.up_to is None else min(quantity, tier.up_to)
            yield from (tier.flat, (end - start) * tier.amount / self.per)
            start = end


def digits_of(currency: str) -> int:
    """Return how many digits after the point an invoice in the currency has."""
    return _DIGITS.get(currency, 2)


def rounded(amount: Decimal, digits: int) -> Decimal:
    """Round to so many digits after the point, halves up: as OpenMeter rounds each line of an invoice."""
    exponent = amount.as_tuple().exponent
    if isinstance(exponent, int) and exponent >= -digits:
        return amount
    return amount.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP, _WIDE)


def exact(value: float) -> Decimal:
    """Return the decimal that a value of a meter means: ten times 0.1 is 1, and not a package more.

    A float has 15 digits that are certain.
    """
    return Decimal(int(value)) if float(value).is_integer() else Decimal(f"{value:.15g}")


@dataclass(slots=True)
class Bill:
    """The usage of one customer in one calendar month, by rate."""

    quantities: dict[int, Decimal] = field(default_factory=lambda: defaultdict(Decimal))

    def add(self, rate: int, value: float) -> None:
        """Add usage that a rate fits."""
        self.quantities[rate] += exact(value)


@dataclass(slots=True)
class Prices:
    """The rates of a configuration."""

    currency: str
    rates: tuple[Rate, ...]
    _found: dict[tuple[str, Labels], int | None] = field(default_factory=dict)

    @property
    def meters(self) -> frozenset[str]:
        """Return the meters that have a rate."""
        return frozenset(rate.meter for rate in self.rates)

    def dimensions(self, meter: str) -> frozenset[str]:
        """Return the dimensions by which the usage of a meter must be known."""
        return frozenset(name for rate in self.rates if rate.meter == meter for name in rate.where)

    def rate_of(self, meter: str, labels: Labels) -> int | None:
        """Return the number of the first rate that fits, None if none does."""
        key = (meter, labels)
        if key not in self._found:
            fitting = (index for index, rate in enumerate(self.rates) if rate.fits(meter, labels))
            self._found[key] = next(fitting, None)
        return self._found[key]

    def charge(self, bill: Bill) -> Decimal:
        """Return the exact worth of usage in a month."""
        return sum(self._lines(bill), Decimal(0))

    def invoice(self, bill: Bill) -> Decimal:
        """Return the total of the invoice for a customer's month: the sum of its rounded lines."""
        digits = digits_of(self.currency)
        return sum((rounded(line, digits) for line in self._lines(bill)), Decimal(0))

    def _lines(self, bill: Bill) -> Iterator[Decimal]:
        for rate, quantity in bill.quantities.items():
            yield from self.rates[rate].lines(quantity)

    def estimate(self, usage: Iterable[tuple[str, Labels, float]]) -> tuple[Decimal, dict[str, float]]:
        """Return the exact worth of the usage of one subject in a month, and by meter what has no price."""
        bill, unpriced = Bill(), dict[str, float]()
        for meter, labels, value in usage:
            rate = self.rate_of(meter, labels)
            if rate is not None:
                bill.add(rate, value)
            elif meter in self.meters:
                unpriced[meter] = unpriced.get(meter, 0) + value
        return self.charge(bill), unpriced


def prices_of(config: PricesConfig | None) -> Prices | None:
    """Return the prices of a configuration, None if it has none."""
    if config is None:
        return None
    return Prices(config.currency, tuple(map(_rate, config.rates)))


def _rate(config: RateConfig) -> Rate:
    tiers = tuple(
        Tier(tier.up_to, tier.amount or Decimal(0), tier.flat or Decimal(0)) for tier in config.tiers
    )
    where = {name: frozenset(values) for name, values in config.where.items()}
    return Rate(config.meter, where, config.price, config.amount or Decimal(0), config.per, tiers)


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
