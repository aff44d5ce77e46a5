"""Moving a subject from one customer of ours to another: when it can be done, and why not."""

from __future__ import annotations

from syncd.changes import Change, ChangeKind, State
from syncd.model import DesiredCustomer, DesiredSubject, ObservedCustomer
from syncd.ownership import ADOPTED

Held = tuple[DesiredSubject, ObservedCustomer]
"""A subject, and the customer that carries it today."""


def moves_to(want: DesiredCustomer, held: list[Held]) -> list[Change]:
    """Return the moves that take these subjects off customers of ours, for `want` to take them."""
    by_holder: dict[str, tuple[ObservedCustomer, list[DesiredSubject]]] = {}
    for subject, holder in held:
        if _can_leave(subject, holder):
            by_holder.setdefault(holder.id, (holder, []))[1].append(subject)
    return [_move(want, holder, leaving) for holder, leaving in by_holder.values()]


def held_reason(want: DesiredCustomer, subject: DesiredSubject, holder: ObservedCustomer) -> str:
    """Say why a subject stays on another customer of ours, and what to do."""
    reason = (
        f"{subject.principal} is to be in customer {want.key!r} but is attributed to {customer_name(holder)}."
    )
    if holder.active_subscription:
        reason += (
            f" That one has an active subscription ({holder.active_subscription}), so its subject keys"
            " cannot change: move it by hand between two subscriptions"
        )
    elif ADOPTED in holder.metadata:
        reason += " That one was adopted from people, whose subjects stay: move it by hand"
    elif holder.key == subject.key:
        reason += (
            " That is that customer's own key, which no other customer may carry as a subject: delete"
            f" customer {holder.key!r} by hand when its usage is invoiced, then the next run goes on"
        )
    else:
        reason += (
            " Moving it would also move usage that is not invoiced yet, so it is left there: allow it with"
            " --allow-move, or move it by hand, when that is wanted"
        )
    return reason


def _can_leave(subject: DesiredSubject, holder: ObservedCustomer) -> bool:
    """Tell whether it can be taken off: not where it is the key, nor from a paying or adopted customer."""
    return not holder.active_subscription and subject.key != holder.key and ADOPTED not in holder.metadata


def _move(want: DesiredCustomer, holder: ObservedCustomer, leaving: list[DesiredSubject]) -> Change:
    keys = tuple(subject.key for subject in leaving)
    return Change(
        ChangeKind.MOVE_SUBJECTS,
        holder.key,
        keys,
        f"{principals_of(leaving)} now belongs to customer {want.key!r};"
        " usage that is not invoiced yet moves too",
        holder.id,
        State(subject_keys=holder.subject_keys),
        State(subject_keys=tuple(key for key in holder.subject_keys if key not in keys)),
        want.key,
    )


def customer_name(customer: ObservedCustomer) -> str:
    """Return how messages call a customer."""
    return f"{customer.key or customer.id!r} ({customer.name})"


def principals_of(subjects: list[DesiredSubject]) -> str:
    """Return whose subjects these are."""
    return ", ".join(subject.principal for subject in subjects)
