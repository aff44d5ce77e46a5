"""Moves of a subject from one managed customer to another, and the reasons against them.

Removing a subject from a customer whose *key* it is has no effect, because the metering API attributes
usage by key too. OpenMeter even accepts such a subject on another customer
(openmeter/customer/adapter/customer.go, CreateCustomer and UpdateCustomer check the key only); it then
counts its usage for both (streaming/clickhouse/queryhelper.go, customersWhere) and refuses every change
of the first. So that customer is *retired* first, that is, deleted: only if syncd manages it, it has no
other subject, and `syncd.planning.deletion_checks` finds no obstacle. The v1 API could give it another
key instead; v3 cannot (keys are immutable), so both dialects retire.
"""

from __future__ import annotations

from collections.abc import Mapping

from syncd.core.changes import Change, ChangeKind, EntityState
from syncd.core.model import DesiredCustomer, DesiredSubject, ObservedCustomer
from syncd.core.ownership import ADOPTED

Taken = tuple[DesiredSubject, ObservedCustomer]
"""A subject and the customer that carries it today."""


def moves_to(want: DesiredCustomer, taken: list[Taken]) -> list[Change]:
    """Return the moves that detach these subjects from managed customers, so that `want` can carry them."""
    by_carrier: dict[str, tuple[ObservedCustomer, list[DesiredSubject]]] = {}
    for subject, carrier in taken:
        if _is_free(carrier) and subject.key != carrier.key:
            by_carrier.setdefault(carrier.id, (carrier, []))[1].append(subject)
    return [_move(want, carrier, leaving) for carrier, leaving in by_carrier.values()]


def retirements_for(
    want: DesiredCustomer, taken: list[Taken], undeletable: Mapping[str, str]
) -> list[Change]:
    """Return the retirements of managed customers whose key and only subject belongs to `want` now.

    `undeletable` are customers that must stay: id -> why.
    """
    return [
        _retirement(want, subject, carrier)
        for subject, carrier in taken
        if _is_retirable(subject, carrier) and carrier.id not in undeletable
    ]


def taken_reason(
    want: DesiredCustomer,
    subject: DesiredSubject,
    carrier: ObservedCustomer,
    undeletable: Mapping[str, str],
    refusal: str | None = None,
) -> str:
    """Explain why a subject stays on another managed customer, and what to do.

    `refusal`: why one of the two customers cannot change, if so; no option then helps.
    """
    reason = (
        f"{subject.principal} should be in customer {want.key!r} but is attributed to"
        f" {customer_name(carrier)}."
    )
    if refusal:
        reason += f" {refusal[0].upper()}{refusal[1:]}"
    elif carrier.active_subscription:
        reason += (
            f" That customer has an active subscription ({carrier.active_subscription}), so its subject keys"
            " cannot change: move the subject by hand between two subscriptions"
        )
    elif ADOPTED in carrier.metadata:
        reason += " That customer was adopted, and syncd never detaches its subjects: move it by hand"
    elif carrier.key == subject.key:
        reason += _own_key_reason(subject, carrier, undeletable)
    else:
        reason += (
            " A move would also move usage that is not invoiced yet, so it is left there. If you want that,"
            " pass --allow-move, or move it by hand"
        )
    return reason


def _own_key_reason(
    subject: DesiredSubject, carrier: ObservedCustomer, undeletable: Mapping[str, str]
) -> str:
    reason = " It is that customer's own key, so no other customer can carry it while that customer exists"
    by_hand = (
        f"delete customer {carrier.key!r} by hand once its usage is invoiced; the next run then moves the"
        " subject"
    )
    if not _is_retirable(subject, carrier):
        others = ", ".join(key for key in carrier.subject_keys if key != subject.key)
        return f"{reason}. It also carries other subjects ({others}). Move those first, or {by_hand}"
    if carrier.id in undeletable:
        why = undeletable[carrier.id]
        return f"{reason}. syncd does not delete it: {why}. If that does not matter, {by_hand}"
    return (
        f"{reason}. It has no other subject: pass --allow-retire to have syncd delete it and move the"
        f" subject, including usage that is not invoiced yet; or {by_hand}"
    )


def _is_free(carrier: ObservedCustomer) -> bool:
    """Return whether subjects can leave: none can leave a customer with a subscription or an adopted one."""
    return not carrier.active_subscription and ADOPTED not in carrier.metadata


def _is_retirable(subject: DesiredSubject, carrier: ObservedCustomer) -> bool:
    return _is_free(carrier) and subject.key == carrier.key and set(carrier.subject_keys) <= {subject.key}


def _move(want: DesiredCustomer, carrier: ObservedCustomer, leaving: list[DesiredSubject]) -> Change:
    keys = tuple(subject.key for subject in leaving)
    return Change(
        ChangeKind.MOVE_SUBJECTS,
        carrier.key,
        keys,
        f"{principals_of(leaving)} now belongs to customer {want.key!r};"
        " usage that is not invoiced yet moves too",
        carrier.id,
        EntityState(subject_keys=carrier.subject_keys),
        EntityState(subject_keys=tuple(key for key in carrier.subject_keys if key not in keys)),
        want.key,
    )


def _retirement(want: DesiredCustomer, subject: DesiredSubject, carrier: ObservedCustomer) -> Change:
    return Change(
        ChangeKind.RETIRE_CUSTOMER,
        carrier.key,
        (subject.key,),
        f"{subject.principal} now belongs to customer {want.key!r}, but is the key of its own"
        " customer, so that customer is deleted first; usage that is not invoiced yet moves too",
        carrier.id,
        EntityState(carrier.name, carrier.subject_keys, dict(carrier.metadata)),
        None,
        want.key,
    )


def customer_name(customer: ObservedCustomer) -> str:
    """Return how messages name a customer."""
    return f"{customer.key or customer.id!r} ({customer.name})"


def principals_of(subjects: list[DesiredSubject]) -> str:
    """Return the principals of these subjects, for a message."""
    return ", ".join(subject.principal for subject in subjects)
