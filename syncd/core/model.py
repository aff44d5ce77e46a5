"""Principals, customers and subjects, desired and observed, as immutable values.

principal   makes the requests: a Kong consumer, a Dev Portal application, or a static subject
customer    pays; its usage attribution in the metering API lists the keys of its subjects
subject     the name under which usage is sent (see `openmeter_plugin.metering.subject`)
desired     called for by the sources; *observed* is what the metering API has

Values of which a plan of 100,000 principals makes half a million are structs: making a frozen dataclass takes
ten times as long, and the cycle collector would visit each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

_T = TypeVar("_T")
PrincipalKind = Literal["consumer", "application", "static"]

NO_METADATA: Mapping[str, str] = {}


@lru_cache(maxsize=10_000)
def shared(value: _T) -> _T:
    """Return a value equal to this one: tags and owners repeat in 100,000 documents, for 28 MiB."""
    return value


class Principal(Struct, frozen=True, gc=False):
    """A consumer, application or static subject, as one source describes it.

    `id` is empty for a consumer of a declarative file that has neither an id nor a username:
    Kong gives such a consumer another random id at each load.
    `metadata` and `customer` are set for static subjects only, `owner` for applications only:
    ``developer:<id>`` or ``team:<id>``. `application` is set for a consumer that represents an
    application on a gateway: the id of that application.
    """

    kind: PrincipalKind
    id: str
    source: str
    username: str | None = None
    custom_id: str | None = None
    tags: tuple[str, ...] = ()
    anonymous: bool = False
    metadata: Mapping[str, str] = msgspec.field(default_factory=lambda: NO_METADATA)
    customer: str | None = None
    owner: str | None = None
    application: str | None = None

    def describe(self) -> str:
        """Return a text that identifies the principal: ``consumer alice (id 4711, from kong-admin ...)``."""
        identity = f"id {self.id}" if self.id else "no id"
        if self.application:
            identity += f", mapped to application {self.application}"
        return f"{self.label()} ({identity}, from {self.source})"

    def label(self) -> str:
        """Return a short name: ``consumer alice``."""
        kind = "static subject" if self.kind == "static" else self.kind
        return f"{kind} {self.username or self.custom_id or self.id}"


@dataclass(frozen=True, slots=True)
class CustomerDetails:
    """The fields that a customer gets when it is created; syncd never changes them afterwards."""

    email: str | None = None
    currency: str | None = None
    description: str | None = None
    billing_address: Mapping[str, str] = field(default_factory=dict)
    """The parts of an address in the spelling of the v3 API: country, postal_code, line1, phone_number ..."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """In addition to the ownership metadata; the externalId of another system, for example."""

    def to_json(self) -> dict[str, object]:
        """Return the fields that are set, except metadata, as in a plan."""
        parts: dict[str, object] = {
            "email": self.email,
            "currency": self.currency,
            "description": self.description,
            "billing_address": dict(self.billing_address),
        }
        return {name: value for name, value in parts.items() if value}

    @classmethod
    def from_json(cls, parts: Mapping[str, Any]) -> CustomerDetails:
        """Return the details from the result of `to_json`."""
        return cls(
            parts.get("email"),
            parts.get("currency"),
            parts.get("description"),
            dict(parts.get("billing_address") or {}),
        )


NO_DETAILS = CustomerDetails()


class DesiredSubject(Struct, frozen=True, gc=False):
    """A subject that a customer should carry; `principal` is the label of the principal that uses it.

    `display_name` None leaves that of the subject entity alone. `own_key` is the key that a customer
    of its principal alone would have; set only if a limit of subjects may split one off its group.
    """

    key: str
    display_name: str | None
    metadata: Mapping[str, str]
    principal: str
    own_key: str | None = None


class DesiredCustomer(Struct, frozen=True, gc=False):
    """A customer that should exist.

    `name_follows_source`: a later change of the name at the source renames the customer. False for
    groups, which only start with a name: people give such customers their real name by hand.
    `subjects` are sorted by key, `ownership` is the ownership metadata.
    """

    key: str
    name: str
    name_follows_source: bool
    subjects: tuple[DesiredSubject, ...]
    ownership: Mapping[str, str]
    details: CustomerDetails = NO_DETAILS


@dataclass(frozen=True, slots=True)
class Problem:
    """A part of the sources that cannot be mapped; it affects these keys and no others."""

    customer_key: str | None
    subject_keys: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class DesiredState:
    """The customers that the sources call for, sorted by key; `problems` could not be mapped.

    `warnings` name details that customers are created without, and rows of the mapping file without an
    effect. `known` are subjects that need no customer but are not orphaned: those of consumers whose group
    sends a subject of its own. `prefixes` are those of the subjects that syncd makes.
    """

    customers: tuple[DesiredCustomer, ...]
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    known: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ("consumer:", "app:")


class ObservedCustomer(Struct, frozen=True, gc=False):
    """A customer as the metering API has it; `active_subscription` is the id of one, if any."""

    id: str
    key: str | None
    name: str
    subject_keys: tuple[str, ...]
    metadata: Mapping[str, str]
    active_subscription: str | None = None

    def carries(self, subject_key: str) -> bool:
        """Return whether usage of this subject is attributed here: by subject key or own key.

        Not by its id: a real OpenMeter finds no customer for usage under an id.
        """
        return subject_key in self.subject_keys or subject_key == self.key


class ObservedSubject(Struct, frozen=True, gc=False):
    """A subject entity as the metering API has it; its metadata may hold any JSON."""

    key: str
    display_name: str | None
    metadata: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ObservedState:
    """The customers and subject entities of the metering API; `subjects` is None if it has no entities."""

    customers: tuple[ObservedCustomer, ...]
    subjects: tuple[ObservedSubject, ...] | None
