"""Moves of a subject from one managed customer to another, and the reasons against them.

Removing a subject from a customer whose *key* it is has no effect, because the metering API attributes
usage by key too. OpenMeter even accepts such a subject on another customer
(openmeter/customer/adapter/customer.go, CreateCustomer and UpdateCustomer check the key only); it then
counts its usage for both (streaming/clickhouse/queryhelper.go, customersWhere) and refuses every change
of the first. Only deleting that customer frees its key. That has no grace period and may concern billing
that syncd cannot see, so syncd leaves it to a person and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def taken_reason(
    want: DesiredCustomer,
    subject: DesiredSubject,
    carrier: ObservedCustomer,
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
        reason += _own_key_reason(want, subject, carrier)
    else:
        reason += (
            " A move would also move usage that is not invoiced yet, so it is left there. If you want that,"
            " pass --allow-move, or move it by hand"
        )
    return reason


def _own_key_reason(want: DesiredCustomer, subject: DesiredSubject, carrier: ObservedCustomer) -> str:
    others = [key for key in carrier.subject_keys if key != subject.key]
    first = f"move its other subjects ({', '.join(others)}) to where they belong, " if others else ""
    return (
        " It is that customer's own key, so no other customer can carry it while that customer exists, and"
        f" syncd does not delete it. By hand: {first}end its subscriptions and entitlements, invoice its"
        f" usage, and delete customer {carrier.key!r}. The next run then attaches the subject to"
        f" {want.key!r}, with its usage that is not invoiced"
    )


def _is_free(carrier: ObservedCustomer) -> bool:
    """Return whether subjects can leave: none can leave a customer with a subscription or an adopted one."""
    return not carrier.active_subscription and ADOPTED not in carrier.metadata


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
        names=names_of(leaving),
    )


def customer_name(customer: ObservedCustomer) -> str:
    """Return how messages name a customer."""
    return f"{customer.key or customer.id!r} ({customer.name})"


def names_of(subjects: Iterable[DesiredSubject]) -> tuple[str, ...]:
    """Return the names of the principals of these subjects; that of a consumer without its kind."""
    return tuple(subject.principal.removeprefix("consumer ") for subject in subjects)


def principals_of(subjects: list[DesiredSubject]) -> str:
    """Return the principals of these subjects, for a message."""
    return ", ".join(subject.principal for subject in subjects)
