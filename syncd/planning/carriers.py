"""Carriers: the customer that pays for a subject today, and what is against another: moves, double counting.

Moves. Removing a subject from a customer whose *key* it is has no effect, because the metering API attributes
usage by key too. OpenMeter even accepts such a subject on another customer
(openmeter/customer/adapter/customer.go, CreateCustomer and UpdateCustomer check the key only); it then
counts its usage for both (streaming/clickhouse/queryhelper.go, customersWhere) and answers 409 to every later
change of the customer that has the key. Only deleting that customer frees its key. That has no grace period
and may concern billing that syncd cannot see, so syncd leaves it to a person and says what to do.

Double counting: one customer carries the subject, and the subject is the key of the other. OpenMeter refuses
a key that is another customer's subject, but not the reverse, as above. syncd never plans such a pair. One
that people created is blocked: syncd cannot decide which of the two pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from msgspec import structs

from syncd.core.changes import Change, ChangeKind, EntityState
from syncd.core.model import DesiredCustomer, DesiredSubject, ObservedCustomer, ObservedState
from syncd.core.ownership import ADOPTED, is_managed

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


@dataclass(frozen=True, slots=True)
class DoubleCounting:
    """A subject whose usage is counted for two customers."""

    subject_key: str
    key_customer: ObservedCustomer
    """Has the subject as its key. The metering API refuses every change of it, but not its deletion."""
    carrier: ObservedCustomer
    """Has the subject among its subject keys."""

    @property
    def reason(self) -> str:
        """Explain what is wrong and what to do."""
        return (
            f"usage under {self.subject_key!r} is counted twice: for customer"
            f" {customer_name(self.key_customer)}, whose key it is, and for customer"
            f" {customer_name(self.carrier)}, which carries it as a subject. Decide which of them pays, then"
            " remove the subject from the second or delete the first"
        )

    @property
    def refusal(self) -> str:
        """Explain why the customer with the key cannot be changed, and what to do."""
        return (
            f"the metering API refuses every change of customer {customer_name(self.key_customer)} while"
            f" customer {customer_name(self.carrier)} carries its key as a subject. Remove the subject there"
        )


DoubleCounted = Mapping[str, DoubleCounting]
"""By subject."""


def find_double_counting(
    by_key: Mapping[str, ObservedCustomer], by_subject: Mapping[str, ObservedCustomer]
) -> dict[str, DoubleCounting]:
    """Return the subjects whose usage is counted for two customers."""
    return {
        key: DoubleCounting(key, key_customer, carrier)
        for key, key_customer in by_key.items()
        if (carrier := by_subject.get(key, key_customer)) is not key_customer
    }


def without_double_counted(want: DesiredCustomer, double_counted: DoubleCounted) -> DesiredCustomer:
    """Return a customer without the double-counted subjects, which no plan changes."""
    if double_counted.keys().isdisjoint(subject.key for subject in want.subjects):
        return want
    subjects = tuple(subject for subject in want.subjects if subject.key not in double_counted)
    return structs.replace(want, subjects=subjects)


def double_counting_changes(
    double_counted: DoubleCounted, customers: Iterable[DesiredCustomer], owner_id: str
) -> Iterator[Change]:
    """Report double counting if a source names the subject, or syncd manages one of the two customers."""
    if not double_counted:
        return
    named = {subject.key for customer in customers for subject in customer.subjects}
    for key, pair in sorted(double_counted.items()):
        both = (pair.key_customer, pair.carrier)
        if key in named or any(is_managed(customer.metadata, owner_id) for customer in both):
            yield Change(ChangeKind.BLOCKED, pair.key_customer.key, (key,), pair.reason, pair.key_customer.id)


class CustomerIndex:
    """Customers of the metering API by key and subject, less what the plan in the making moves away."""

    def __init__(self, observed: ObservedState) -> None:
        self._observed = observed
        self._leaving: dict[str, set[str]] = {}
        self.by_key = {customer.key: customer for customer in observed.customers if customer.key}
        self._by_subject = {key: customer for customer in observed.customers for key in customer.subject_keys}
        entities = observed.subjects
        self.entities = None if entities is None else {subject.key: subject for subject in entities}
        self.double_counted = find_double_counting(self.by_key, self._by_subject)
        """The subjects whose usage is already counted for two customers."""

    def carrier_of(self, subject_key: str) -> ObservedCustomer | None:
        """Return the customer that pays for this subject today, found by subject key or key."""
        return self._by_subject.get(subject_key) or self.by_key.get(subject_key)

    def conflicting(self, key: str) -> ObservedCustomer | None:
        """Return the customer for which the metering API refuses a new one with this key: also by id."""
        return self.carrier_of(key) or self._by_id.get(key)

    @cached_property
    def _by_id(self) -> dict[str, ObservedCustomer]:
        # Built only for a customer that is missing, which is rare.
        return {customer.id: customer for customer in self._observed.customers}

    def subject_refusal(self, customer: ObservedCustomer) -> str | None:
        """Return why the metering API would refuse new subject keys on a customer; None if it would not."""
        if customer.active_subscription:
            return subscription_reason(customer)
        return self.change_refusal(customer)

    def change_refusal(self, customer: ObservedCustomer) -> str | None:
        """Return why the metering API would refuse any change of a customer; None if it would not."""
        pair = self.double_counted.get(customer.key or "")
        return pair.refusal if pair else None

    def record_moves(self, moves: Iterable[Change]) -> None:
        """Record subjects that leave a customer by a move."""
        for move in moves:
            self._leaving.setdefault(move.customer_id or "", set()).update(move.subject_keys)

    def after_moves(self) -> ObservedState:
        """Return the observed state without the subjects that move away."""
        if not self._leaving:
            return self._observed
        customers = tuple(
            structs.replace(customer, subject_keys=self._remaining(customer))
            for customer in self._observed.customers
        )
        return replace(self._observed, customers=customers)

    def _remaining(self, customer: ObservedCustomer) -> tuple[str, ...]:
        leaving = self._leaving.get(customer.id, ())
        return tuple(key for key in customer.subject_keys if key not in leaving)


def subscription_reason(have: ObservedCustomer) -> str:
    """Explain why the subject keys of a customer with a subscription cannot change, and what to do."""
    return (
        f"customer {customer_name(have)} has an active subscription ({have.active_subscription}), and the"
        " metering API then refuses any change of its subject keys, even of their order. Attach the subject"
        " by hand between two subscriptions, or send this usage under a subject that the customer already"
        " carries, such as its key (the plugin's subject.field and mapping.subject_field: tag)"
    )
