"""Final checks before deletions: a customer stays if anything about it is in doubt.

A run plans, checks the customers that this first plan deletes, and plans again: the second plan reports
customers that have to stay as blocked, with the reason. *Retiring* a customer (`syncd.planning.moves`)
is checked more strictly, because no grace period precedes it: anything that people added to the customer
prevents it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from syncd.core.changes import Change, ChangeKind, Plan
from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.core.model import NO_DETAILS, CustomerDetails, DesiredCustomer, Principal
from syncd.core.ownership import RESERVED_KEYS
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules
from syncd.metering.base import Inspection, Inspector

_MAX_DELETIONS = 100
"""Later deletions are left to the server, which refuses them itself: each check costs a few requests."""


@dataclass(frozen=True, slots=True)
class DeletionChecks:
    """Results. `undeletable`: customer id -> why it must stay. `details`: of checked customers, by id."""

    undeletable: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, CustomerDetails] = field(default_factory=dict)

    def with_details(self, plan: Plan) -> Plan:
        """Return the plan with the details of retired customers, in case one has to be created again."""
        return replace(plan, changes=tuple(map(self._with_details, plan.changes)))

    def _with_details(self, change: Change) -> Change:
        details = self.details.get(change.customer_id or "", NO_DETAILS)
        if change.kind is not ChangeKind.RETIRE_CUSTOMER or change.before is None or details == NO_DETAILS:
            return change
        return replace(change, before=replace(change.before, details=details))


def check_deletions(
    plan: Plan, inspector: Inspector, principals: Sequence[Principal], rules: MappingRules
) -> DeletionChecks:
    """Inspect each customer that this plan deletes. Raises ApiError."""
    retired = plan.of(ChangeKind.RETIRE_CUSTOMER)
    expected = _expected_customers(retired, principals, rules)
    undeletable: dict[str, str] = {}
    details: dict[str, CustomerDetails] = {}
    for change in (*retired, *islice(plan.of(ChangeKind.DELETE_CUSTOMER), _MAX_DELETIONS)):
        identity = change.customer_id or ""
        try:
            found = inspector.inspect(identity)
        except (RefusedError, UnauthorizedError) as error:
            undeletable[identity] = f"its entitlements and subscriptions cannot be read ({error})"
            continue
        if found is None:
            continue
        details[identity] = replace(found.details, metadata={})
        is_retired = change.kind is ChangeKind.RETIRE_CUSTOMER
        obstacle = (
            _retirement_obstacle(found, expected.get(change.subject_keys[0]))
            if is_retired
            else _deletion_obstacle(found)
        )
        if obstacle:
            undeletable[identity] = obstacle
    return DeletionChecks(undeletable, details)


def _deletion_obstacle(found: Inspection) -> str | None:
    """Return what rules out any deletion of a customer."""
    if found.entitlements:
        return f"it has entitlements ({', '.join(found.entitlements)})"
    if found.open_subscriptions:
        return f"it has a subscription that has not ended ({', '.join(found.open_subscriptions)})"
    if found.open_invoices:
        return f"it has an invoice that is not final ({', '.join(found.open_invoices)})"
    return None


def _retirement_obstacle(found: Inspection, expected: DesiredCustomer | None) -> str | None:
    """Return what rules out retiring a customer: what people or billing changed since syncd created it."""
    if why := _deletion_obstacle(found):
        return why
    if found.subscriptions:
        return f"it has had a subscription ({', '.join(found.subscriptions)})"
    if found.others:
        return f"it has {' and '.join(found.others)}"
    if expected is None:
        return "its principal is unknown, so syncd cannot check whether it was edited"
    edited = [what for what, actual, wanted in _fields(found, expected) if actual and actual != wanted]
    return f"these fields were edited since syncd created it: {', '.join(edited)}" if edited else None


def _fields(found: Inspection, expected: DesiredCustomer) -> Iterable[tuple[str, object, object]]:
    actual, wanted = found.details, expected.details
    foreign = {name: value for name, value in actual.metadata.items() if name not in RESERVED_KEYS}
    return (
        ("name", found.name, expected.name),
        ("email", actual.email, wanted.email),
        ("currency", actual.currency, wanted.currency),
        ("description", actual.description, wanted.description),
        ("billing address", actual.billing_address, wanted.billing_address),
        ("metadata", foreign, wanted.metadata),
    )


def _expected_customers(
    retired: Iterable[Change], principals: Iterable[Principal], rules: MappingRules
) -> dict[str, DesiredCustomer]:
    """Return, by subject, the customer that syncd would create for the principal alone, without grouping."""
    wanted = {key for change in retired for key in change.subject_keys}
    if not wanted:
        return {}
    alone = replace(rules, group_by="none", assignments=(), max_subjects_per_customer=None)
    found: dict[str, DesiredCustomer] = {}
    for principal in principals:
        names = (principal.id, f"{principal.kind}:{principal.id}", principal.username, principal.custom_id)
        if wanted.isdisjoint(name for name in names if name):
            continue
        single = replace(principal, customer=None, application=None)
        for customer in desired_state([single], alone).customers:
            found |= {subject.key: customer for subject in customer.subjects if subject.key in wanted}
    return found
