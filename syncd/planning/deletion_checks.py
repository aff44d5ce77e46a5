"""Final checks before deletions: a customer stays if anything about it is in doubt.

A run plans, checks the customers that this first plan deletes, and plans again: the second plan reports
customers that have to stay as blocked, with the reason.
"""

from __future__ import annotations

from itertools import islice

from syncd.core.changes import ChangeKind, Plan
from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.metering.base import Inspection, Inspector

_MAX_DELETIONS = 100
"""Later deletions are left to the server, which refuses them itself: each check costs a few requests."""


def check_deletions(plan: Plan, inspector: Inspector) -> dict[str, str]:
    """Inspect the customers that this plan deletes and return those that must stay: id -> why.

    Raises ApiError.
    """
    undeletable: dict[str, str] = {}
    for change in islice(plan.of(ChangeKind.DELETE_CUSTOMER), _MAX_DELETIONS):
        identity = change.customer_id or ""
        try:
            found = inspector.inspect(identity)
        except (RefusedError, UnauthorizedError) as error:
            undeletable[identity] = f"its entitlements and subscriptions cannot be read ({error})"
            continue
        if found is not None and (obstacle := _obstacle(found)):
            undeletable[identity] = obstacle
    return undeletable


def _obstacle(found: Inspection) -> str | None:
    """Return what rules out the deletion of a customer."""
    if found.entitlements:
        return f"it has entitlements ({', '.join(found.entitlements)})"
    if found.open_subscriptions:
        return f"it has a subscription that has not ended ({', '.join(found.open_subscriptions)})"
    if found.open_invoices:
        return f"it has an invoice that is not final ({', '.join(found.open_invoices)})"
    return None
