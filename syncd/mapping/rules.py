"""Mapping rules: the settings that decide the mapping, as values, and the templates among them.

A template is a text with named fields, such as ``team-{group}`` or ``{username}``; ``{{`` is a brace. If the
principal lacks one of the fields, there is no text at all: half a name is worse than none.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from openmeter_plugin.metering.rules import DEFAULT_PREFIXES, SubjectPrefixes
from syncd.core.model import CustomerDetails, Principal

PRINCIPAL_FIELDS = frozenset(
    {"subject", "kind", "id", "username", "custom_id", "owner", "owner_type", "owner_id", "source"}
)
GROUP_FIELDS = frozenset({"group"})
FIELDS = PRINCIPAL_FIELDS | GROUP_FIELDS


def check_template(template: str, fields: frozenset[str] = FIELDS) -> str:
    """Return the template if it is valid, else raise a ValueError that names the fault."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is not a template: {error}") from None
    for _, name, form, conversion in parsed:
        if name is None:
            continue
        if name not in fields or form or conversion:
            raise ValueError(f"can use only the fields {', '.join(f'{{{f}}}' for f in sorted(fields))}")
    return template


def fields_of(principal: Principal, subject: str, group: str | None) -> dict[str, str]:
    """Return the values that the principal has for the fields."""
    values = {name: value(principal, subject, group) for name, value in _VALUES.items()}
    return {name: value for name, value in values.items() if value}


_VALUES: Mapping[str, Callable[[Principal, str, str | None], str | None]] = {
    "subject": lambda _principal, subject, _group: subject,
    "kind": lambda principal, _subject, _group: principal.kind,
    "id": lambda principal, _subject, _group: principal.id,
    "username": lambda principal, _subject, _group: principal.username,
    "custom_id": lambda principal, _subject, _group: principal.custom_id,
    "owner": lambda principal, _subject, _group: principal.owner,
    "owner_type": lambda principal, _subject, _group: (principal.owner or "").partition(":")[0],
    "owner_id": lambda principal, _subject, _group: (principal.owner or "").partition(":")[2],
    "source": lambda principal, _subject, _group: principal.source,
    "group": lambda _principal, _subject, group: group,
}


def filled(template: str, principal: Principal, subject: str, group: str | None) -> str | None:
    """Return the same as `fill` with `fields_of`, without computing unused values."""
    text = ""
    for literal, name in _parts(template):
        text += literal
        if name is not None:
            value = _VALUES[name](principal, subject, group)
            if not value:
                return None
            text += value
    return text


@lru_cache(maxsize=64)
def _parts(template: str) -> tuple[tuple[str, str | None], ...]:
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(template))


def fill(template: str, values: Mapping[str, str]) -> str | None:
    """Return the text, None if a field has no value."""
    try:
        return template.format_map(values)
    except KeyError:
        return None


def missing_fields(template: str, values: Mapping[str, str]) -> list[str]:
    """Return the fields of the template that have no value."""
    return sorted({name for _, name, _, _ in string.Formatter().parse(template) if name} - values.keys())


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
    """Templates; None takes the default.

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
