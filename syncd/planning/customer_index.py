"""Index of the observed state: which customer carries a subject, and which ones refuse changes. Pure.

It also finds usage that is counted for two customers: one carries the subject, and the subject is the
key of the other. OpenMeter refuses a key that is another customer's subject, but accepts a subject that
is another customer's key (openmeter/customer/adapter/customer.go, CreateCustomer and UpdateCustomer look
at the key only). It then counts the usage for both (streaming/clickhouse/queryhelper.go, customersWhere)
and answers 409 to every later change of the customer that has the key. syncd never plans such a pair.
One that people created is blocked: syncd cannot decide which of the two pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from msgspec import structs

from syncd.core.changes import Change, ChangeKind
from syncd.core.model import DesiredCustomer, ObservedCustomer, ObservedState
from syncd.core.ownership import is_managed
from syncd.planning.moves import customer_name


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
