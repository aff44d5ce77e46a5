"""Templates: texts with named fields, such as ``team-{group}`` or ``{username}``; ``{{`` is a brace.

If the principal lacks one of the fields, there is no text at all: half a name is worse than none.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from functools import lru_cache

from syncd.core.model import Principal

PRINCIPAL_FIELDS = frozenset(
    {"subject", "kind", "id", "username", "custom_id", "owner", "owner_type", "owner_id", "source"}
)
GROUP_FIELDS = frozenset({"group"})
FIELDS = PRINCIPAL_FIELDS | GROUP_FIELDS


def check(template: str, fields: frozenset[str] = FIELDS) -> str:
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


def missing(template: str, values: Mapping[str, str]) -> list[str]:
    """Return the fields of the template that have no value."""
    return sorted({name for _, name, _, _ in string.Formatter().parse(template) if name} - values.keys())
