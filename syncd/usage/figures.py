"""What usage adds up to for finance: customers, shares, changes against the period before. Pure: no I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

MOVED: Final = Decimal("0.30")
"""The change against the period before from which a customer is a riser or a faller."""


@dataclass(frozen=True, slots=True)
class Payer:
    """A customer as the last refresh saw it."""

    id: str
    key: str | None
    name: str


@dataclass(frozen=True, slots=True)
class Amount:
    """A figure and its value in the period before."""

    now: float = 0
    before: float = 0

    @property
    def change(self) -> Decimal | None:
        """Return the change as a fraction of the value before, None if there was nothing before."""
        if not self.before:
            return None
        return (Decimal(str(self.now)) - Decimal(str(self.before))) / Decimal(str(self.before))

    @property
    def difference(self) -> float:
        """Return the change itself."""
        return self.now - self.before

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.now + other.now, self.before + other.before)


NOTHING: Final = Amount()


@dataclass(frozen=True, slots=True)
class CustomerFigures:
    """The usage of a customer, one amount for each meter, and its estimates if there are prices."""

    customer: Payer
    amounts: tuple[Amount, ...]
    estimate: Decimal | None = None
    estimate_before: Decimal | None = None

    def share(self, meter: int, total: float) -> float:
        """Return its part of a meter's total, 0 to 1."""
        return self.amounts[meter].now / total if total else 0.0


@dataclass(frozen=True, slots=True)
class SubjectFigures:
    """The usage of a subject that no customer pays for."""

    subject: str
    name: str | None
    amounts: tuple[Amount, ...]
    estimate: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """The usage under one value of a dimension, such as a route or a model; an empty value is its absence."""

    value: str
    amount: Amount


Values = Mapping[str, float]
"""The value of a meter for each subject."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Usage by customer, and what is unbilled, for the meters in one order."""

    meters: tuple[str, ...]
    customers: tuple[CustomerFigures, ...]
    """Those with usage in the period or in the one before."""
    unbilled: tuple[SubjectFigures, ...]

    def total(self, meter: int) -> Amount:
        """Return all usage of a meter."""
        return self.billed(meter) + self.unbilled_total(meter)

    def billed(self, meter: int) -> Amount:
        """Return the usage of customers."""
        return _sum(customer.amounts[meter] for customer in self.customers)

    def unbilled_total(self, meter: int) -> Amount:
        """Return the usage without a customer."""
        return _sum(subject.amounts[meter] for subject in self.unbilled)

    def top(self, meter: int, count: int) -> tuple[CustomerFigures, ...]:
        """Return the customers with the most usage, the largest first."""
        used = [customer for customer in self.customers if customer.amounts[meter].now]
        return tuple(sorted(used, key=lambda c: (-c.amounts[meter].now, *_name(c)))[:count])

    def risers(self, meter: int) -> tuple[CustomerFigures, ...]:
        """Return the customers whose usage grew by more than `MOVED`, the largest difference first."""
        found = [c for c in self.customers if (change := c.amounts[meter].change) and change > MOVED]
        return tuple(sorted(found, key=lambda c: (-c.amounts[meter].difference, *_name(c))))

    def fallers(self, meter: int) -> tuple[CustomerFigures, ...]:
        """Return the customers whose usage fell by more than `MOVED` and who are not silent."""
        found = [
            customer
            for customer in self.customers
            if (amount := customer.amounts[meter]).now and (change := amount.change) and change < -MOVED
        ]
        return tuple(sorted(found, key=lambda c: (c.amounts[meter].difference, *_name(c))))

    def silent(self) -> tuple[CustomerFigures, ...]:
        """Return the customers with usage in the period before and none in this one, of any meter."""
        found = [c for c in self.customers if _used_before(c) and not _used(c)]
        return tuple(sorted(found, key=lambda c: (*(-amount.before for amount in c.amounts), *_name(c))))

    def appeared(self) -> tuple[CustomerFigures, ...]:
        """Return the customers with usage in this period and none in the one before, of any meter."""
        found = [c for c in self.customers if _used(c) and not _used_before(c)]
        return tuple(sorted(found, key=lambda c: (*(-amount.now for amount in c.amounts), *_name(c))))


def figures(
    meters: Sequence[str],
    now: Sequence[Values],
    before: Sequence[Values],
    owner_of: Mapping[str, Payer],
    names: Mapping[str, str] | None = None,
) -> Figures:
    """Add up usage by customer; `now` and `before` have the values by subject of each of the meters."""
    names = names or {}
    of_customers: dict[str, list[Amount]] = defaultdict(lambda: [NOTHING] * len(meters))
    of_nobody: dict[str, list[Amount]] = defaultdict(lambda: [NOTHING] * len(meters))
    payers: dict[str, Payer] = {}
    for index, (values, earlier) in enumerate(zip(now, before, strict=True)):
        for subject in values.keys() | earlier.keys():
            amount = Amount(values.get(subject, 0), earlier.get(subject, 0))
            if not amount.now and not amount.before:
                continue
            payer = owner_of.get(subject)
            if payer is None:
                of_nobody[subject][index] += amount
            else:
                payers[payer.id] = payer
                of_customers[payer.id][index] += amount
    return Figures(
        tuple(meters),
        tuple(sorted((CustomerFigures(payers[key], tuple(v)) for key, v in of_customers.items()), key=_name)),
        tuple(
            SubjectFigures(subject, names.get(subject), tuple(amounts))
            for subject, amounts in sorted(of_nobody.items())
        ),
    )


def slices(now: Values, before: Values) -> tuple[Slice, ...]:
    """Return the usage by value of a dimension, the largest first."""
    found = [Slice(value, Amount(now.get(value, 0), before.get(value, 0))) for value in now.keys() | before]
    return tuple(sorted(found, key=lambda s: (-s.amount.now, -s.amount.before, s.value)))


def _sum(amounts: Iterable[Amount]) -> Amount:
    now = before = 0.0
    for amount in amounts:
        now, before = now + amount.now, before + amount.before
    return Amount(now, before)


def _used(customer: CustomerFigures) -> bool:
    return any(amount.now for amount in customer.amounts)


def _used_before(customer: CustomerFigures) -> bool:
    return any(amount.before for amount in customer.amounts)


def _name(customer: CustomerFigures) -> tuple[str, str]:
    return customer.customer.key or "", customer.customer.id
