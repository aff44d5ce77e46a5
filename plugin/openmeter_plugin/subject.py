"""The subject: the name under which usage is sent, and under which a customer claims it.

The plugin writes it into every event and syncd into every customer's usage attribution;
both take it from here, so the two can never disagree. Imports nothing, on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

PrincipalKind = Literal["consumer", "application"]

CUSTOMER_TAG: Final = "customer:"
"""``customer:<key>`` on a consumer puts it into the customer of that key."""


def default_subject(kind: PrincipalKind, principal_id: str) -> str:
    """Return the subject where no field is configured: ``consumer:<id>`` or ``application:<id>``.

    The prefix keeps the two kinds apart and the id survives renames; Kong's own plugin
    documents the same form.
    """
    return f"{kind}:{principal_id}"


def tagged_customers(tags: Iterable[object]) -> set[str]:
    """Return the customer keys in a consumer's tags. More than one, or an empty one, names nobody."""
    return {
        tag[len(CUSTOMER_TAG) :].strip()
        for tag in tags
        if isinstance(tag, str) and tag.startswith(CUSTOMER_TAG)
    }
