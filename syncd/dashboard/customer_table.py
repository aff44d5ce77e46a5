"""Rows and tables of customers: the table of all, and what the page of one customer shows. Pure: no I/O."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from msgspec import Struct

from syncd.customers.known import Concern, KnownCustomer, Name
from syncd.dashboard.tables import Choice, Column, Table
from syncd.gateways.models import Gate, GateKey, GateOverride
from syncd.metering.usage import owners, whole
from syncd.usage.figures import Payer, Values

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


def reference(customer: KnownCustomer | Payer) -> str:
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


SUBJECTS_PER_PAGE: Final = 50
_NAMES: Final = 3
"""Names shown of a subject that a whole group sends."""


class SubjectRow(Struct, frozen=True, gc=False):
    """A subject of a customer, with who is behind it and its usage of each meter."""

    key: str
    names: tuple[Name, ...]
    values: tuple[float, ...]
    is_own_key: bool = False
    """It is the customer's key: its usage is attributed without being listed."""

    @property
    def text(self) -> str | None:
        """Return the names to show, None if no source names the subject."""
        if not self.names:
            return None
        shown = ", ".join(name.text for name in self.names[:_NAMES])
        rest = len(self.names) - _NAMES
        return f"{shown} and {rest} more" if rest > 0 else shown

    @property
    def custom_ids(self) -> str | None:
        """Return the custom_ids of the principals."""
        found = dict.fromkeys(name.custom_id for name in self.names if name.custom_id)
        return ", ".join(list(found)[:_NAMES]) or None

    @property
    def tags(self) -> tuple[str, ...]:
        """Return the tags of the principals, each once."""
        return tuple(dict.fromkeys(tag for name in self.names for tag in name.tags))

    @property
    def kinds(self) -> str:
        """Return what kinds of principals they are, and from which sources."""
        return ", ".join(dict.fromkeys(f"{name.kind}, {name.source}" for name in self.names))


def subject_rows(
    customer: KnownCustomer, meters: Sequence[Mapping[str, float]], names: Mapping[str, Sequence[Name]]
) -> list[SubjectRow]:
    """Return a row for each subject, and for any other key of the customer with usage.

    `meters` have the values by subject, of the subjects that usage is attributed to this customer for.
    """
    keys = dict.fromkeys(customer.subject_keys)
    for values in meters:
        keys |= dict.fromkeys(sorted(key for key in values if key not in keys))
    return [
        SubjectRow(
            key,
            tuple(names.get(key, ())),
            tuple(values.get(key, 0) for values in meters),
            key not in customer.subject_keys,
        )
        for key in keys
    ]


def subject_table(meters: Sequence[tuple[str, str]]) -> Table[SubjectRow]:
    """Return the table of subjects; `meters` are name and title of each."""
    columns: tuple[Column[SubjectRow], ...] = (
        Column("subject", "Subject", lambda row: row.key),
        Column("name", "Name", lambda row: row.text, shown=False),
        Column("custom_id", "custom_id", lambda row: row.custom_ids),
        Column("tags", "Tags", lambda row: " ".join(row.tags) or None, sortable=False),
        Column("source", "Source", lambda row: row.kinds or None, shown=False),
        *(_subject_meter(index, name, title) for index, (name, title) in enumerate(meters)),
    )
    return Table(
        columns, f"-{meters[0][0]}" if meters else "subject", searched=_searched, size=SUBJECTS_PER_PAGE
    )


def _searched(row: SubjectRow) -> Iterable[str]:
    return (row.key, *(word for name in row.names for word in name.words))


def _subject_meter(index: int, name: str, title: str) -> Column[SubjectRow]:
    return Column(name, title, lambda row: whole(row.values[index]), number=True)


@dataclass(frozen=True, slots=True)
class GateLine:
    """A feature of a customer that a gateway's gate stops, or that is close to the limit."""

    gateway: str
    mode: str
    key: GateKey


@dataclass(frozen=True, slots=True)
class OverrideLine:
    """An override of a subject of a customer, on one gateway."""

    gateway: str
    override: GateOverride


def gate_lines(
    customer: KnownCustomer, gates: Iterable[tuple[str, Gate | None]]
) -> tuple[list[GateLine], list[OverrideLine]]:
    """Return what the gates report about a customer; `gates` are the names of gateways, and their gates."""
    subjects = {*customer.subject_keys, customer.key}
    lines: list[GateLine] = []
    overrides: list[OverrideLine] = []
    for gateway, gate in gates:
        if gate is None:
            continue
        lines += [
            GateLine(gateway, gate.mode, key)
            for key in (*gate.denied, *gate.close)
            if key.account == customer.id or not subjects.isdisjoint(key.subjects)
        ]
        overrides += [OverrideLine(gateway, one) for one in gate.overrides if one.subject in subjects]
    return lines, overrides


@dataclass(frozen=True, slots=True)
class PastChange:
    """A change of a customer that a run made or tried."""

    at: str
    run_id: str
    kind: str
    status: str
    detail: str
    subjects: tuple[str, ...]
    reason: str


def past_changes(documents: Iterable[Mapping[str, Any]]) -> list[PastChange]:
    """Return the changes of a customer from the history (`History.changes_of`)."""
    return [
        PastChange(
            one["at"],
            one["run"],
            one["change"]["kind"],
            one["status"],
            one.get("detail") or "",
            tuple(one["change"]["subject_keys"]),
            one["change"]["reason"],
        )
        for one in documents
    ]
