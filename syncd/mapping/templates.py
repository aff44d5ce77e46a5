"""Texts with named fields: ``team-{group}``, ``{username}``. Braces and nothing else; ``{{`` is a brace.

A field that the principal does not have makes the whole text absent: half a name is worse than none.
"""

from __future__ import annotations

import string
from collections.abc import Mapping

from syncd.model import Principal

PRINCIPAL_FIELDS = frozenset(
    {"subject", "kind", "id", "username", "custom_id", "owner", "owner_type", "owner_id", "source"}
)
GROUP_FIELDS = frozenset({"group"})
FIELDS = PRINCIPAL_FIELDS | GROUP_FIELDS


def check(template: str, fields: frozenset[str] = FIELDS) -> str:
    """Return the template if it can be filled. Raises ValueError naming what is wrong with it."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"is not a template: {error}") from None
    for _, name, form, conversion in parsed:
        if name is None:
            continue
        if name not in fields or form or conversion:
            raise ValueError(f"knows only the fields {', '.join(f'{{{f}}}' for f in sorted(fields))}")
    return template


def fields_of(principal: Principal, subject: str, group: str | None) -> dict[str, str]:
    """Return the values that the principal has for the fields."""
    owner_type, _, owner_id = (principal.owner or "").partition(":")
    values = {
        "subject": subject,
        "kind": principal.kind,
        "id": principal.id,
        "username": principal.username,
        "custom_id": principal.custom_id,
        "owner": principal.owner,
        "owner_type": owner_type,
        "owner_id": owner_id,
        "source": principal.source,
        "group": group,
    }
    return {name: value for name, value in values.items() if value}


def fill(template: str, values: Mapping[str, str]) -> str | None:
    """Return the text, None where a field has no value."""
    try:
        return template.format_map(values)
    except KeyError:
        return None


def missing(template: str, values: Mapping[str, str]) -> list[str]:
    """Return the fields of the template that have no value."""
    return sorted({name for _, name, _, _ in string.Formatter().parse(template) if name} - values.keys())
