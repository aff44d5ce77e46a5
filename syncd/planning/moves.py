"""Moving a subject from one customer of ours to another: when it can be done, and why not.

A subject that is its customer's own *key* cannot leave that customer by taking it off: the metering API
attributes usage by keys too. OpenMeter even accepts such a subject on another customer
(openmeter/customer/adapter/customer.go, CreateCustomer and UpdateCustomer check the key only), and then
counts its usage for both (streaming/clickhouse/queryhelper.go, customersWhere) and refuses every change
of the first. So that customer has to go first: it is *retired*, which means deleted, where it is ours,
has no other subject, and `syncd.planning.deletion_checks` finds nothing that speaks against it. The v1
API could give it
another key instead; v3 cannot (a key is fixed), so that one way serves both dialects.
"""

from __future__ import annotations

from collections.abc import Mapping

from syncd.core.changes import Change, ChangeKind, EntityState
from syncd.core.model import DesiredCustomer, DesiredSubject, ObservedCustomer
from syncd.core.ownership import ADOPTED

Held = tuple[DesiredSubject, ObservedCustomer]
"""A subject, and the customer that carries it today."""


def moves_to(want: DesiredCustomer, held: list[Held]) -> list[Change]:
    """Return the moves that take these subjects off customers of ours, for `want` to take them."""
    by_holder: dict[str, tuple[ObservedCustomer, list[DesiredSubject]]] = {}
    for subject, holder in held:
        if _is_free(holder) and subject.key != holder.key:
            by_holder.setdefault(holder.id, (holder, []))[1].append(subject)
    return [_move(want, holder, leaving) for holder, leaving in by_holder.values()]


def retirements_for(want: DesiredCustomer, held: list[Held], kept: Mapping[str, str]) -> list[Change]:
    """Return the deletions of customers of ours whose key and only subject `want` is to take over.

    `kept` names customers that must not be deleted: id -> why.
    """
    return [
        _retirement(want, subject, holder)
        for subject, holder in held
        if _is_retirable(subject, holder) and holder.id not in kept
    ]


def held_reason(
    want: DesiredCustomer,
    subject: DesiredSubject,
    holder: ObservedCustomer,
    kept: Mapping[str, str],
    refused: str | None = None,
) -> str:
    """Say why a subject stays on another customer of ours, and what to do.

    `refused`: why the metering API refuses any change of that customer, if it does.
    """
    reason = (
        f"{subject.principal} is to be in customer {want.key!r} but is attributed to {customer_name(holder)}."
    )
    if refused:
        reason += f" {refused[0].upper()}{refused[1:]}"
    elif holder.active_subscription:
        reason += (
            f" That one has an active subscription ({holder.active_subscription}), so its subject keys"
            " cannot change: move it by hand between two subscriptions"
        )
    elif ADOPTED in holder.metadata:
        reason += " That one was adopted from people, whose subjects stay: move it by hand"
    elif holder.key == subject.key:
        reason += _own_key_reason(subject, holder, kept)
    else:
        reason += (
            " Moving it would also move usage that is not invoiced yet, so it is left there: allow it with"
            " --allow-move, or move it by hand, when that is wanted"
        )
    return reason


def _own_key_reason(subject: DesiredSubject, holder: ObservedCustomer, kept: Mapping[str, str]) -> str:
    reason = " That is that customer's own key, so nobody else can carry it while that customer exists"
    by_hand = f"delete customer {holder.key!r} by hand when its usage is invoiced; the next run goes on"
    if not _is_retirable(subject, holder):
        others = ", ".join(key for key in holder.subject_keys if key != subject.key)
        return f"{reason}, and it carries other subjects too ({others}). Move those first, or {by_hand}"
    if holder.id in kept:
        return f"{reason}. syncd does not delete it: {kept[holder.id]}. If that is of no use, {by_hand}"
    return (
        f"{reason}. It has no other subject: allow with --allow-retire that syncd deletes it and moves the"
        f" subject, with usage that is not invoiced yet; or {by_hand}"
    )


def _is_free(holder: ObservedCustomer) -> bool:
    """Tell whether anything can be taken off: nothing from a paying or adopted customer."""
    return not holder.active_subscription and ADOPTED not in holder.metadata


def _is_retirable(subject: DesiredSubject, holder: ObservedCustomer) -> bool:
    return _is_free(holder) and subject.key == holder.key and set(holder.subject_keys) <= {subject.key}


def _move(want: DesiredCustomer, holder: ObservedCustomer, leaving: list[DesiredSubject]) -> Change:
    keys = tuple(subject.key for subject in leaving)
    return Change(
        ChangeKind.MOVE_SUBJECTS,
        holder.key,
        keys,
        f"{principals_of(leaving)} now belongs to customer {want.key!r};"
        " usage that is not invoiced yet moves too",
        holder.id,
        EntityState(subject_keys=holder.subject_keys),
        EntityState(subject_keys=tuple(key for key in holder.subject_keys if key not in keys)),
        want.key,
    )


def _retirement(want: DesiredCustomer, subject: DesiredSubject, holder: ObservedCustomer) -> Change:
    return Change(
        ChangeKind.RETIRE_CUSTOMER,
        holder.key,
        (subject.key,),
        f"{subject.principal} now belongs to customer {want.key!r}, and its own customer, whose key is that"
        " subject, is in the way: it is deleted; usage that is not invoiced yet moves too",
        holder.id,
        EntityState(holder.name, holder.subject_keys, dict(holder.metadata)),
        None,
        want.key,
    )


def customer_name(customer: ObservedCustomer) -> str:
    """Return how messages call a customer."""
    return f"{customer.key or customer.id!r} ({customer.name})"


def principals_of(subjects: list[DesiredSubject]) -> str:
    """Return whose subjects these are."""
    return ", ".join(subject.principal for subject in subjects)
