"""Estimates: usage times the prices of the configuration, in exact decimals. Pure: no I/O.

A price applies to the quantity of a customer in a calendar month, as on an invoice: tiers start again each
month. Part of a month is charged as if it were all, so a graduated price makes an early estimate too high or
too low, never the one of a whole month.

Amounts equal those of OpenMeter's invoices to the smallest unit of the currency; a test holds that against
invoices of a real OpenMeter. An invoice charges a flat price to a customer without usage too: estimates are
of usage, so here nothing costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_HALF_UP, Context, Decimal
from typing import Final, Literal

from syncd.config.prices import PricesConfig, RateConfig

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
