"""The rules of the mapping, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from syncd.core.model import CustomerDetails, Principal

GroupBy = Literal["none", "tag", "custom_id", "owner", "file"]
SubjectField = Literal["id", "username", "custom_id", "tag"]
"""`tag`: consumers tagged ``customer:<key>`` send that key, the others their id."""
Overflow = Literal["block", "split"]

DEFAULT_KEY = "{kind}-{id}"
"""Made of what never changes at the source, and another text than the subject.

A metering API attributes usage by a customer's key too, so a subject that is the key of its customer
could neither move to another customer nor be detached.
"""
MAX_KEY = 256
MAX_NAME = 256
"""Both from openmeter-v1.yaml, CustomerCreate."""


@dataclass(frozen=True, slots=True)
class Templates:
    """Texts with named fields in braces (`syncd.mapping.templates`); None takes the default.

    `key` and `name` are for a customer of one principal, `group_key` and `group_name` for one that a
    group shares. The rest is given at creation only.
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
        """Tell whether there is anything that customers are created with."""
        plain = (self.email, self.currency, self.description)
        return any(plain) or bool(self.billing_address or self.metadata)


@dataclass(frozen=True, slots=True)
class Assignment:
    """One row of the mapping file: which principal, in which customer, created with what."""

    kind: Literal["consumer", "application"]
    place: str
    """Where it stands, for messages: ``customers.csv line 3``."""
    id: str | None = None
    username: str | None = None
    customer: str | None = None
    name: str | None = None
    details: CustomerDetails = field(default_factory=CustomerDetails)


@dataclass(frozen=True, slots=True)
class MappingRules:
    """The settings that decide the mapping; `anonymous_consumers` holds ids or usernames.

    `labels_only`: the metering API takes metadata that keep the label rules, and no others.
    """

    owner_id: str
    group_by: GroupBy = "none"
    subject_field: SubjectField = "id"
    include_anonymous: bool = False
    anonymous_consumers: frozenset[str] = field(default_factory=frozenset)
    templates: Templates = field(default_factory=Templates)
    assignments: tuple[Assignment, ...] = ()
    max_subjects_per_customer: int | None = None
    overflow: Overflow = "block"
    labels_only: bool = False

    def index(self) -> Mapping[tuple[str, str, str], Assignment]:
        """Return the assignments by kind, the field they go by, and its value."""
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
