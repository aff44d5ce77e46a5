"""The rows of the customers table, and how they are sorted, filtered and written as CSV. Pure: no I/O."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from syncd.customers.known import Concern, KnownCustomer
from syncd.dashboard.tables import Choice, Column, Table
from syncd.metering.usage import owners, whole

Values = Mapping[str, float]
"""The value of a meter for each subject."""

PAGE_SIZE: Final = 50


class CustomerRow(Struct, frozen=True, gc=False):
    """A customer with its usage of each meter, and its concerns in the latest plan.

    `unbilled` are the events of the subjects that it is meant to have, and that nobody is billed for.
    """

    customer: KnownCustomer
    values: tuple[float, ...]
    blocked: int = 0
    unbilled: float = 0

    @property
    def is_used(self) -> bool:
        """Return whether any meter counted anything."""
        return any(self.values)

    @property
    def reference(self) -> str:
        """Return how its page is addressed."""
        return reference(self.customer)


def reference(customer: KnownCustomer) -> str:
    """Return the key of a customer for a URL, its id where browsers would resolve the key as a path."""
    key = customer.key or customer.id
    parts = key.replace("\\", "/").split("/")
    return customer.id if any(part in ("", ".", "..") for part in parts) else key


def rows(
    customers: Sequence[KnownCustomer], meters: Sequence[Values], concerns: Iterable[Concern]
) -> tuple[CustomerRow, ...]:
    """Return a row for each customer; usage is attributed as `syncd usage` does."""
    owner_of = owners(customers)
    used: dict[str, list[float]] = {}
    for index, values in enumerate(meters):
        for subject, value in values.items():
            if (owner := owner_of.get(subject)) is not None:
                if owner not in used:
                    used[owner] = [0.0] * len(meters)
                used[owner][index] += value
    blocked: Counter[str] = Counter()
    unbilled: dict[str, float] = defaultdict(float)
    for concern in concerns:
        blocked[concern.customer_key] += concern.blocked
        unbilled[concern.customer_key] += concern.events
    nothing = (0.0,) * len(meters)
    return tuple(
        CustomerRow(
            one,
            tuple(found) if (found := used.get(one.id)) else nothing,
            blocked[one.key] if one.key else 0,
            unbilled.get(one.key, 0) if one.key else 0,
        )
        for one in customers
    )


def table(meters: Sequence[tuple[str, str]], search: str, found: Collection[str]) -> Table[CustomerRow]:
    """Return the table; `meters` are name and title of each.

    The directory has looked for `search`: `found` are the ids of the customers that fit.
    """
    columns: list[Column[CustomerRow]] = [
        Column("name", "Customer", lambda row: row.customer.name),
        Column("key", "Key", lambda row: row.customer.key, shown=False),
        Column("id", "Id", lambda row: None if row.customer.is_unseen else row.customer.id, shown=False),
        Column("managed_by", "Managed by", lambda row: row.customer.managed_by),
        Column("subscription", "Subscription", lambda row: row.customer.subscription, shown=False),
        Column("subjects", "Subjects", lambda row: len(row.customer.subject_keys), number=True),
        *(_meter(index, name, title) for index, (name, title) in enumerate(meters)),
        Column("blocked", "Blocked", lambda row: row.blocked, shown=False),
        Column("unbilled", "Unbilled events", lambda row: whole(row.unbilled), number=True),
    ]
    return Table(
        tuple(columns),
        f"-{meters[0][0]}" if meters else "name",
        _CHOICES,
        lambda row: (search,) if row.customer.id in found else (),
        PAGE_SIZE,
    )


def _meter(index: int, name: str, title: str) -> Column[CustomerRow]:
    return Column(name, title, lambda row: whole(row.values[index]), number=True)


def totals(shown: Iterable[CustomerRow], meters: int) -> tuple[int | float, ...]:
    """Return the sum of each meter, and last that of unbilled events."""
    sums = [0.0] * (meters + 1)
    for row in shown:
        for index, value in enumerate((*row.values, row.unbilled)):
            sums[index] += value
    return tuple(whole(total) for total in sums)


_CHOICES: Final[tuple[Choice[CustomerRow], ...]] = (
    Choice(
        "usage",
        "Usage",
        {"": "With or without", "used": "With usage", "unused": "Without usage"},
        lambda row, value: row.is_used is (value == "used"),
    ),
    Choice(
        "managed",
        "Managed by",
        {"": "Anybody", "syncd": "syncd", "finance": "Finance (not managed)", "other": "Another owner"},
        lambda row, value: row.customer.keeper == value,
    ),
    Choice(
        "subscription",
        "Subscription",
        {"": "With or without", "active": "Active", "none": "None"},
        lambda row, value: (row.customer.subscription is not None) is (value == "active"),
    ),
    Choice(
        "state",
        "Status",
        {"": "Any", "blocked": "Blocked changes", "unbilled": "Unbilled usage"},
        lambda row, value: bool(row.blocked if value == "blocked" else row.unbilled),
    ),
)
