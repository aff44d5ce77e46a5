"""Which customers must not be deleted although a plan would: whatever is in doubt stays.

Asked between two plannings, for the deletions of the first only; the second then reports those that
stay as blocked, with the reason. Anything that people gave a customer speaks against *retiring* it
(`syncd.planning.moves`), for that is not the end of a grace period but the means to an end.
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
"""Beyond these the server's refusal is left to tell: each costs a few requests."""


@dataclass(frozen=True, slots=True)
class DeletionChecks:
    """`kept`: id of a customer -> why it must stay. `details` of those that may be retired, by id."""

    kept: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, CustomerDetails] = field(default_factory=dict)

    def with_details(self, plan: Plan) -> Plan:
        """Return the plan with what retired customers have, should one have to be made again."""
        return replace(plan, changes=tuple(map(self._with_details, plan.changes)))

    def _with_details(self, change: Change) -> Change:
        details = self.details.get(change.customer_id or "", NO_DETAILS)
        if change.kind is not ChangeKind.RETIRE_CUSTOMER or change.before is None or details == NO_DETAILS:
            return change
        return replace(change, before=replace(change.before, details=details))


def check_deletions(
    plan: Plan, inspector: Inspector, principals: Sequence[Principal], rules: MappingRules
) -> DeletionChecks:
    """Look at each customer that this plan deletes; raises the ApiError that fits."""
    retired = plan.of(ChangeKind.RETIRE_CUSTOMER)
    own = _own_customers(retired, principals, rules)
    kept: dict[str, str] = {}
    details: dict[str, CustomerDetails] = {}
    for change in (*retired, *islice(plan.of(ChangeKind.DELETE_CUSTOMER), _MAX_DELETIONS)):
        identity = change.customer_id or ""
        try:
            found = inspector.inspect(identity)
        except (RefusedError, UnauthorizedError) as error:
            kept[identity] = f"what hangs on it cannot be looked at ({error})"
            continue
        if found is None:
            continue
        details[identity] = replace(found.details, metadata={})
        is_retired = change.kind is ChangeKind.RETIRE_CUSTOMER
        if why := _touched(found, own.get(change.subject_keys[0])) if is_retired else _bound(found):
            kept[identity] = why
    return DeletionChecks(kept, details)


def _bound(found: Inspection) -> str | None:
    """Return what forbids to delete a customer in any case."""
    if found.entitlements:
        return f"it has entitlements ({', '.join(found.entitlements)})"
    if found.open_subscriptions:
        return f"it has a subscription that has not ended ({', '.join(found.open_subscriptions)})"
    return None


def _touched(found: Inspection, own: DesiredCustomer | None) -> str | None:
    """Return what people, or billing, have made of a customer that syncd made."""
    if why := _bound(found):
        return why
    if found.subscriptions:
        return f"it had a subscription once ({', '.join(found.subscriptions)})"
    if found.others:
        return f"it has {' and '.join(found.others)}"
    if own is None:
        return "what syncd would give it is not known"
    edited = [what for what, is_, should in _fields(found, own) if is_ and is_ != should]
    return f"its {' and '.join(edited)} is not what syncd gave it" if edited else None


def _fields(found: Inspection, own: DesiredCustomer) -> Iterable[tuple[str, object, object]]:
    is_, should = found.details, own.details
    foreign = {name: value for name, value in is_.metadata.items() if name not in RESERVED_KEYS}
    return (
        ("name", found.name, own.name),
        ("email", is_.email, should.email),
        ("currency", is_.currency, should.currency),
        ("description", is_.description, should.description),
        ("billing address", is_.billing_address, should.billing_address),
        ("metadata", foreign, should.metadata),
    )


def _own_customers(
    retired: Iterable[Change], principals: Iterable[Principal], rules: MappingRules
) -> dict[str, DesiredCustomer]:
    """Return by subject what a customer of each of these alone would be, grouped by nothing."""
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
