"""Edits: what a change writes to a customer, decided on the customer as it is now. Pure.

Each function returns a `Decide`, or a check before a deletion. A `Decide` returns the edit, or None if
nothing has to change. Both raise BlockedError if the customer has changed since the plan was made: another
owner, a subscription, a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from msgspec import structs

from syncd.core.changes import Change, EntityState
from syncd.core.errors import BlockedError
from syncd.core.model import ObservedCustomer
from syncd.core.ownership import is_adoptable, is_managed, owner_of
from syncd.metering.base import CustomerEdit, Decide
from syncd.planning.carriers import subscription_reason

_MARKS_CHANGED = "its marks have changed since the plan was made; plan again"


def adopting(change: Change) -> Decide:
    """Add ownership metadata, unless the customer has got an owner since the plan was made."""

    def decide(current: ObservedCustomer) -> CustomerEdit | None:
        ownership = _metadata(change.after)
        if all(current.metadata.get(name) == value for name, value in ownership.items()):
            return None
        if not is_adoptable(current.metadata):
            raise BlockedError(f"customer {current.key or current.id} now belongs to {owner_of(current)}")
        return CustomerEdit(metadata=ownership)

    return decide


def marking(change: Change, owner_id: str) -> Decide:
    """Set the orphan marks of a customer, or remove them."""

    def decide(current: ObservedCustomer) -> CustomerEdit | None:
        require_managed(current, owner_id)
        after, before = _metadata(change.after), _metadata(change.before)
        if all(current.metadata.get(name) == value for name, value in after.items()):
            return None
        if any(current.metadata.get(name) != before.get(name) for name in after):
            raise BlockedError(_MARKS_CHANGED)
        return CustomerEdit(metadata=after)

    return decide


def detaching(change: Change, owner_id: str) -> Decide:
    """Remove subjects: orphans together with their marks, or subjects that move (these have no marks)."""

    def decide(current: ObservedCustomer) -> CustomerEdit | None:
        require_managed(current, owner_id)
        rest = tuple(key for key in current.subject_keys if key not in change.subject_keys)
        marks = _metadata(change.after)
        if rest == current.subject_keys and all(current.metadata.get(k) == v for k, v in marks.items()):
            return None
        if current.active_subscription:
            raise BlockedError(subscription_reason(current))
        _require_same_marks(change, current)
        return CustomerEdit(subject_keys=rest, metadata=marks or None)

    return decide


def deleting(change: Change, owner_id: str) -> Callable[[ObservedCustomer], None]:
    """Check that the customer may still be deleted."""

    def check(current: ObservedCustomer) -> None:
        require_managed(current, owner_id)
        if current.active_subscription:
            raise BlockedError(subscription_reason(current))
        if set(current.subject_keys) - set(change.subject_keys):
            raise BlockedError(
                f"customer {current.key} has got further subjects since the plan was made; plan again"
            )
        _require_same_marks(change, current)

    return check


def adding(keys: tuple[str, ...], owner_id: str) -> Decide:
    """Append subjects, and keep the order of the others."""

    def decide(current: ObservedCustomer) -> CustomerEdit | None:
        require_managed(current, owner_id)
        missing = tuple(key for key in keys if not current.carries(key))
        if not missing:
            return None
        if current.active_subscription:
            raise BlockedError(subscription_reason(current))
        return CustomerEdit(subject_keys=current.subject_keys + missing)

    return decide


def renaming(change: Change, owner_id: str) -> Decide:
    """Set the name that the source has."""

    def decide(current: ObservedCustomer) -> CustomerEdit | None:
        require_managed(current, owner_id)
        name = change.after.name if change.after else None
        return None if name == current.name else CustomerEdit(name=name)

    return decide


def require_as_planned(current: ObservedCustomer, *expected: ObservedCustomer) -> None:
    """Raise BlockedError if a customer differs from each of its expected states.

    Either somebody has edited it since the plan was made, or a server that lags behind has answered with an
    old state of it. An edit writes the whole customer back, so on an old state it would undo what was written
    in between; and what an old state shows as done may be undone.
    """
    if _written_back(current) not in map(_written_back, expected):
        raise BlockedError(
            f"customer {current.key or current.id} is not as it was when the plan was made: it was edited"
            " since, or the metering API answered with an old state of it; plan again"
        )


def _written_back(customer: ObservedCustomer) -> tuple[str, frozenset[str], Mapping[str, str]]:
    return customer.name, frozenset(customer.subject_keys), customer.metadata


def applied(edit: CustomerEdit, customer: ObservedCustomer) -> ObservedCustomer:
    """Return a customer as it is after an edit."""
    return structs.replace(
        customer,
        name=customer.name if edit.name is None else edit.name,
        subject_keys=customer.subject_keys if edit.subject_keys is None else edit.subject_keys,
        metadata={**customer.metadata, **(edit.metadata or {})},
    )


def require_managed(current: ObservedCustomer, owner_id: str) -> None:
    """Raise BlockedError if syncd does not manage the customer."""
    if not is_managed(current.metadata, owner_id):
        raise BlockedError(
            f"customer {current.key or current.id} now belongs to {owner_of(current)}; left alone"
        )


def require_accepts_subjects(current: ObservedCustomer, owner_id: str) -> None:
    """Raise BlockedError if the customer cannot get another subject."""
    require_managed(current, owner_id)
    if current.active_subscription:
        raise BlockedError(subscription_reason(current))


def _require_same_marks(change: Change, current: ObservedCustomer) -> None:
    """Raise BlockedError if another syncd has removed or renewed a mark since the plan was made."""
    before = _metadata(change.before)
    if any(current.metadata.get(name) != value for name, value in before.items()):
        raise BlockedError(_MARKS_CHANGED)


def _metadata(state: EntityState | None) -> dict[str, str]:
    metadata = (state.metadata if state else None) or {}
    return {name: str(value) for name, value in metadata.items()}
