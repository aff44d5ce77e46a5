"""Estimates: usage times the prices of the configuration, in exact decimals. Pure: no I/O.

A price applies to the quantity of a customer in a calendar month, as on an invoice: tiers start again each
month. Part of a month is charged as if it were all, so a graduated price makes an early estimate too high or
too low, never the one of a whole month.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from typing import Literal

from syncd.config.prices import PricesConfig, RateConfig

Labels = tuple[tuple[str, str], ...]
"""The dimensions of some usage with their values, sorted by name."""


@dataclass(frozen=True, slots=True)
class Tier:
    """A tier: up to and including `up_to`, None for the last one; `amount` is for one unit."""

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

    def charge(self, quantity: Decimal) -> Decimal:
        """Return the price of a quantity of one customer and month; nothing costs nothing."""
        if quantity <= 0:
            return Decimal(0)
        match self.price:
            case "unit":
                return quantity * self.amount / self.per
            case "package":
                return (quantity / self.per).to_integral_value(ROUND_CEILING) * self.amount
            case "flat":
                return self.amount
            case "volume":
                tier = next(tier for tier in self.tiers if tier.up_to is None or quantity <= tier.up_to)
                return tier.flat + quantity * tier.amount
            case "graduated":
                return self._graduated(quantity)

    def _graduated(self, quantity: Decimal) -> Decimal:
        charged, start = Decimal(0), Decimal(0)
        for tier in self.tiers:
            if quantity <= start:
                break
            end = quantity if tier.up_to is None else min(quantity, tier.up_to)
            charged += tier.flat + (end - start) * tier.amount
            start = end if tier.up_to is None else tier.up_to
        return charged


@dataclass(slots=True)
class Bill:
    """The usage of one customer in one calendar month, by rate."""

    quantities: dict[int, Decimal] = field(default_factory=lambda: defaultdict(Decimal))

    def add(self, rate: int, value: float) -> None:
        """Add usage that a rate fits."""
        self.quantities[rate] += Decimal(str(value))


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
        """Return the estimate of a customer's month."""
        charged = (self.rates[rate].charge(quantity) for rate, quantity in bill.quantities.items())
        return sum(charged, Decimal(0))

    def estimate(self, usage: Iterable[tuple[str, Labels, float]]) -> tuple[Decimal, dict[str, float]]:
        """Return the estimate of one customer's month, and by meter what has no price."""
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
        Tier(tier.up_to, (tier.amount or Decimal(0)) / config.per, tier.flat or Decimal(0))
        for tier in config.tiers
    )
    where = {name: frozenset(values) for name, values in config.where.items()}
    return Rate(config.meter, where, config.price, config.amount or Decimal(0), config.per, tiers)
