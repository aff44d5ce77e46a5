"""The words of syncd as immutable values; nothing here does I/O.

principal   who calls: a Kong consumer, a Dev Portal application, or a static subject of the configuration
customer    who pays; carries the keys of its subjects (its usage attribution) in the metering API
subject     the name under which usage is sent (see `openmeter_plugin.metering.subject`)
desired     what the sources ask for; *observed* is what the metering API has
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, dataclass_transform

# MERGED: Immutable values of which there are hundreds of thousands.
#
# mypy refuses to change them, as it does with frozen dataclasses. These are not guarded at run time
# as well: that doubles the time to make one, and a plan of 100,000 principals makes half a million.

_C = TypeVar("_C")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(kind: type[_C]) -> type[_C]:
    """Make a class a dataclass of values."""
    return dataclass(slots=True, unsafe_hash=True)(kind)


PrincipalKind = Literal["consumer", "application", "static"]

NO_METADATA: Mapping[str, str] = {}


@value
class Principal:
    """Someone whose usage is metered, as one source describes them.

    `id` is empty for a consumer of a declarative file that has neither an id nor a username:
    Kong gives such a consumer another random id at each load.
    `metadata` and `customer` are set for static subjects only; `owner` for applications:
    ``developer:<id>`` or ``team:<id>``; `application` for a consumer that an application is on a
    gateway: the id of that application.
    """

    kind: PrincipalKind
    id: str
    source: str
    username: str | None = None
    custom_id: str | None = None
    tags: tuple[str, ...] = ()
    anonymous: bool = False
    metadata: Mapping[str, str] = field(default_factory=lambda: NO_METADATA)
    customer: str | None = None
    owner: str | None = None
    application: str | None = None

    def describe(self) -> str:
        """Return the principal so that it can be found: ``consumer alice (id 4711, from kong-admin ...)``."""
        identity = f"id {self.id}" if self.id else "no id"
        if self.application:
            identity += f", mapped to application {self.application}"
        return f"{self.label()} ({identity}, from {self.source})"

    def label(self) -> str:
        """Return the principal in short: ``consumer alice``."""
        kind = "static subject" if self.kind == "static" else self.kind
        return f"{kind} {self.username or self.custom_id or self.id}"


@dataclass(frozen=True, slots=True)
class CustomerDetails:
    """What a customer gets when it is created, and what nobody touches afterwards."""

    email: str | None = None
    currency: str | None = None
    description: str | None = None
    billing_address: Mapping[str, str] = field(default_factory=dict)
    """The parts of an address in the spelling of the v3 API: country, postal_code, line1, phone_number ..."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Besides our marks; the externalId of another system, for example."""

    def to_json(self) -> dict[str, object]:
        """Return what is set, metadata apart, as it stands in a plan."""
        parts: dict[str, object] = {
            "email": self.email,
            "currency": self.currency,
            "description": self.description,
            "billing_address": dict(self.billing_address),
        }
        return {name: value for name, value in parts.items() if value}

    @classmethod
    def from_json(cls, parts: Mapping[str, Any]) -> CustomerDetails:
        """Return the details that `to_json` gave."""
        return cls(
            parts.get("email"),
            parts.get("currency"),
            parts.get("description"),
            dict(parts.get("billing_address") or {}),
        )


NO_DETAILS = CustomerDetails()


@value
class DesiredSubject:
    """A subject that a customer shall carry; `principal` is the label of the one whose usage it is.

    `display_name` None leaves that of the subject entity alone. `own_key` is the key that a customer
    of its principal alone would have; set only where a limit of subjects may split one off its group.
    """

    key: str
    display_name: str | None
    metadata: Mapping[str, str]
    principal: str
    own_key: str | None = None


@value
class DesiredCustomer:
    """A customer that shall exist.

    `name_follows_source`: a later change of the name at the source renames the customer. False for
    groups, whose name is only a start: people give such customers their real name by hand.
    `subjects` are sorted by key, `marks` are the metadata that make the customer ours.
    """

    key: str
    name: str
    name_follows_source: bool
    subjects: tuple[DesiredSubject, ...]
    marks: Mapping[str, str]
    details: CustomerDetails = NO_DETAILS


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the sources that cannot be mapped; it concerns these keys and no others."""

    customer_key: str | None
    subject_keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class DesiredState:
    """All that the sources ask for. `customers` is sorted by key; `problems` are left out of it.

    `warnings` tell of details that customers are created without. `known` are subjects that nobody needs
    attached, but that are not gone: those of consumers whose group sends a subject of its own.
    """

    customers: tuple[DesiredCustomer, ...]
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()


@value
class ObservedCustomer:
    """A customer as the metering API has it; `active_subscription` is the id of one, if any."""

    id: str
    key: str | None
    name: str
    subject_keys: tuple[str, ...]
    metadata: Mapping[str, str]
    active_subscription: str | None = None

    def carries(self, subject_key: str) -> bool:
        """Tell whether usage of this subject is attributed here: by subject key, or by its own key or id."""
        return subject_key in self.subject_keys or subject_key in (self.key, self.id)


@value
class ObservedSubject:
    """A subject entity as the metering API has it; its metadata may hold any JSON."""

    key: str
    display_name: str | None
    metadata: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ObservedState:
    """All that the metering API has. `subjects` is None where the server knows no subject entities."""

    customers: tuple[ObservedCustomer, ...]
    subjects: tuple[ObservedSubject, ...] | None
