"""Mapping rules: the settings that decide the mapping, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from openmeter_plugin.metering.rules import DEFAULT_PREFIXES, SubjectPrefixes
from syncd.core.model import CustomerDetails, Principal

GroupBy = Literal["none", "tag", "custom_id", "owner", "file"]
SubjectField = Literal["id", "username", "custom_id", "tag"]
"""`tag`: consumers tagged ``customer:<key>`` send that key, the others their id."""
Overflow = Literal["block", "split"]

DEFAULT_KEY = "{kind}-{id}"
"""Made of fields that never change at the source, and different from the subject.

The metering API attributes usage by a customer's key too, so a subject that is its customer's key could
neither move to another customer nor be detached.
"""
MAX_KEY = 256
MAX_NAME = 256
"""Both from openmeter-v1.yaml, CustomerCreate."""


@dataclass(frozen=True, slots=True)
class Templates:
    """Templates (`syncd.mapping.templates`); None takes the default.

    `key` and `name` are for a customer of one principal, `group_key` and `group_name` for one that a
    group shares. The others apply at creation only.
    """

    key: str = DEFAULT_KEY
    name: str | None = None
    group_key: str = "{group}"
    group_name: str = "{group}"
    email: str | None = None
    currency: str | None = None
    description: str | None = None
    billing_address: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def creates(self) -> bool:
        """Return whether any template gives details that customers are created with."""
        plain = (self.email, self.currency, self.description)
        return any(plain) or bool(self.billing_address or self.metadata)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One row of the mapping file: a principal, its customer, and the details of that customer."""

    kind: Literal["consumer", "application"]
    place: str
    """File and line, for messages: ``customers.csv line 3``."""
    id: str | None = None
    username: str | None = None
    customer: str | None = None
    name: str | None = None
    details: CustomerDetails = field(default_factory=CustomerDetails)


@dataclass(frozen=True, slots=True)
class MappingRules:
    """The settings that decide the mapping; `anonymous_consumers` holds ids or usernames.

    `labels_only`: the metering API accepts only metadata that keep the label rules.
    """

    owner_id: str
    group_by: GroupBy = "none"
    subject_field: SubjectField = "id"
    prefixes: SubjectPrefixes = DEFAULT_PREFIXES
    include_anonymous: bool = False
    anonymous_consumers: frozenset[str] = field(default_factory=frozenset)
    templates: Templates = field(default_factory=Templates)
    assignments: tuple[Assignment, ...] = ()
    max_subjects_per_customer: int | None = None
    overflow: Overflow = "block"
    labels_only: bool = False

    def index(self) -> Mapping[tuple[str, str, str], Assignment]:
        """Return the assignments by kind, identifying field, and its value."""
        found: dict[tuple[str, str, str], Assignment] = {}
        for row in self.assignments:
            if row.id:
                found[row.kind, "id", row.id] = row
            elif row.username:
                found[row.kind, "username", row.username] = row
        return found


def assignment_of(
    principal: Principal, index: Mapping[tuple[str, str, str], Assignment]
) -> Assignment | None:
    """Return the row of a principal: by id, else by username."""
    return index.get((principal.kind, "id", principal.id)) or index.get(
        (principal.kind, "username", principal.username or "")
    )
