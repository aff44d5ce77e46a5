"""The subject: the name under which usage is sent, and under which a customer claims it.

The plugin writes it into every event and syncd into every customer's usage attribution;
both take it from here, so the two can never disagree. Imports nothing, on purpose.
"""

from __future__ import annotations

from typing import Literal

PrincipalKind = Literal["consumer", "application"]


def default_subject(kind: PrincipalKind, principal_id: str) -> str:
    """Return the subject where no field is configured: ``consumer:<id>`` or ``application:<id>``.

    The prefix keeps the two kinds apart and the id survives renames; Kong's own plugin
    documents the same form.
    """
    return f"{kind}:{principal_id}"
