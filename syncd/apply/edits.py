"""What a change writes into a customer, decided on the customer as it is now. Pure.

Each function returns a `Decide`: it gives the edit, None where all is as wanted already, and raises
BlockedError where the world has overtaken the plan: another owner, a subscription, another mark.
"""

from __future__ import annotations

from syncd.core.changes import Change, EntityState
from syncd.core.errors import BlockedError
from syncd.core.model import ObservedCustomer
from syncd.core.ownership import is_adoptable, is_managed, owner_of
from syncd.metering.base import CustomerEdit, Decide
from syncd.planning.customer_index import subscription_reason


def adopting(change: Change) -> Decide:
    """Give it our marks, unless somebody was faster."""

    def decide(there: ObservedCustomer) -> CustomerEdit | None:
        marks = _metadata(change.after)
        if all(there.metadata.get(name) == value for name, value in marks.items()):
            return None
        if not is_adoptable(there.metadata):
            raise BlockedError(f"customer {there.key or there.id} was taken by {owner_of(there)} meanwhile")
        return CustomerEdit(metadata=marks)

    return decide


def marking(change: Change, owner_id: str) -> Decide:
    """Note since when it is gone, or take that back."""

    def decide(there: ObservedCustomer) -> CustomerEdit | None:
        require_ours(there, owner_id)
        after, before = _metadata(change.after), _metadata(change.before)
        if all(there.metadata.get(name) == value for name, value in after.items()):
            return None
        if any(there.metadata.get(name) != before.get(name) for name in after):
            raise BlockedError("its marks changed meanwhile; plan again")
        return CustomerEdit(metadata=after)

    return decide


def detaching(change: Change, owner_id: str) -> Decide:
    """Take subjects off it: those that are gone with their marks, or those that move (they have none)."""

    def decide(there: ObservedCustomer) -> CustomerEdit | None:
        require_ours(there, owner_id)
        rest = tuple(key for key in there.subject_keys if key not in change.subject_keys)
        marks = _metadata(change.after)
        if rest == there.subject_keys and all(there.metadata.get(k) == v for k, v in marks.items()):
            return None
        if there.active_subscription:
            raise BlockedError(subscription_reason(there))
        _require_same_marks(change, there)
        return CustomerEdit(subject_keys=rest, metadata=marks or None)

    return decide


def deleting(change: Change, owner_id: str) -> Decide:
    """Write nothing, but look whether it may still be deleted."""

    def look(there: ObservedCustomer) -> None:
        require_ours(there, owner_id)
        if there.active_subscription:
            raise BlockedError(subscription_reason(there))
        if set(there.subject_keys) - set(change.subject_keys):
            raise BlockedError(f"customer {there.key} got further subjects meanwhile; plan again")
        _require_same_marks(change, there)

    return look


def adding(keys: tuple[str, ...], owner_id: str) -> Decide:
    """Append subjects; the order of the others stays."""

    def decide(there: ObservedCustomer) -> CustomerEdit | None:
        require_ours(there, owner_id)
        missing = tuple(key for key in keys if not there.carries(key))
        if not missing:
            return None
        if there.active_subscription:
            raise BlockedError(subscription_reason(there))
        return CustomerEdit(subject_keys=there.subject_keys + missing)

    return decide


def renaming(change: Change, owner_id: str) -> Decide:
    """Give it the name that the source has."""

    def decide(there: ObservedCustomer) -> CustomerEdit | None:
        require_ours(there, owner_id)
        name = change.after.name if change.after else None
        return None if name == there.name else CustomerEdit(name=name)

    return decide


def require_ours(there: ObservedCustomer, owner_id: str) -> None:
    """Raise BlockedError for a customer of somebody else."""
    if not is_managed(there.metadata, owner_id):
        raise BlockedError(f"customer {there.key or there.id} now belongs to {owner_of(there)}; left alone")


def require_open(there: ObservedCustomer, owner_id: str) -> None:
    """Raise BlockedError for a customer that could not take another subject."""
    require_ours(there, owner_id)
    if there.active_subscription:
        raise BlockedError(subscription_reason(there))


def _require_same_marks(change: Change, there: ObservedCustomer) -> None:
    """Another syncd may have seen the principal again since the plan, and taken its mark back."""
    before = _metadata(change.before)
    if any(there.metadata.get(name) != value for name, value in before.items()):
        raise BlockedError("its marks changed meanwhile; plan again")


def _metadata(state: EntityState | None) -> dict[str, str]:
    metadata = (state.metadata if state else None) or {}
    return {name: str(value) for name, value in metadata.items()}
