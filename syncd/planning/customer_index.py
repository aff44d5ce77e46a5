"""The observed world, indexed: who carries a subject, who refuses changes, what a plan takes off whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from syncd.core.changes import Change, ChangeKind
from syncd.core.model import DesiredCustomer, ObservedCustomer, ObservedState
from syncd.core.ownership import is_managed
from syncd.planning.moves import customer_name

# MERGED: Usage that is counted for two customers: one carries the subject, and it is the key of the
# other. Pure.
#
# OpenMeter refuses a key that is another customer's subject, but accepts a subject that is another customer's
# key (openmeter/customer/adapter/customer.go, CreateCustomer and UpdateCustomer look at the key only).
# Then it
# counts the usage for both (streaming/clickhouse/queryhelper.go, customersWhere), and answers 409 to every
# later change of the one whose key it is. syncd's plans never make such a pair. One that people have made is
# blocked: which of the two shall pay is not for syncd to say.


@dataclass(frozen=True, slots=True)
class Pair:
    """Two customers that usage under one subject is counted for."""

    subject_key: str
    named: ObservedCustomer
    """Its key is the subject. The metering API refuses every change of it, but not its deletion."""
    carrier: ObservedCustomer
    """It has the subject among its subject keys."""

    @property
    def reason(self) -> str:
        """Say what is wrong, and what to do."""
        return (
            f"usage under {self.subject_key!r} is counted twice: for customer {customer_name(self.named)},"
            f" whose key it is, and for customer {customer_name(self.carrier)}, which carries it as a"
            " subject. Decide who pays, then take the subject off the one or delete the other"
        )

    @property
    def refusal(self) -> str:
        """Say why the one whose key it is cannot be changed, and what to do."""
        return (
            f"the metering API refuses every change of customer {customer_name(self.named)} while customer"
            f" {customer_name(self.carrier)} carries its key as a subject. Take it off there"
        )


Pairs = Mapping[str, Pair]
"""By subject."""


def double_counted(
    by_key: Mapping[str, ObservedCustomer], by_subject: Mapping[str, ObservedCustomer]
) -> dict[str, Pair]:
    """Return the subjects whose usage two customers are charged for."""
    return {
        key: Pair(key, named, carrier)
        for key, named in by_key.items()
        if (carrier := by_subject.get(key, named)) is not named
    }


def apart(want: DesiredCustomer, pairs: Pairs) -> DesiredCustomer:
    """Return a customer without the subjects that are counted twice: nothing is done about those."""
    if pairs.keys().isdisjoint(subject.key for subject in want.subjects):
        return want
    return replace(want, subjects=tuple(subject for subject in want.subjects if subject.key not in pairs))


def pair_changes(pairs: Pairs, customers: Iterable[DesiredCustomer], owner_id: str) -> Iterator[Change]:
    """Report the pairs that concern us: a source names the subject, or one of the two is ours."""
    if not pairs:
        return
    named = {subject.key for customer in customers for subject in customer.subjects}
    for key, pair in sorted(pairs.items()):
        both = (pair.named, pair.carrier)
        if key in named or any(is_managed(customer.metadata, owner_id) for customer in both):
            yield Change(ChangeKind.BLOCKED, pair.named.key, (key,), pair.reason, pair.named.id)


class CustomerIndex:
    """What the metering API has; `leave` notes the moves and retirements of the plan that is being made."""

    def __init__(self, observed: ObservedState) -> None:
        self._observed = observed
        self._leaving: dict[str, set[str]] = {}
        self._retired: set[str] = set()
        self.by_key = {customer.key: customer for customer in observed.customers if customer.key}
        self._by_subject = {key: customer for customer in observed.customers for key in customer.subject_keys}
        entities = observed.subjects
        self.entities = None if entities is None else {subject.key: subject for subject in entities}
        self.pairs = double_counted(self.by_key, self._by_subject)
        """The subjects that are counted for two customers already."""

    @cached_property
    def _by_id(self) -> dict[str, ObservedCustomer]:
        # Asked for only where something is missing, which is nowhere in nearly all runs.
        return {customer.id: customer for customer in self._observed.customers}

    def of(self, subject_key: str) -> ObservedCustomer | None:
        """Return the customer that usage of this subject goes to today: by subject key, key or id."""
        return (
            self._by_subject.get(subject_key) or self.by_key.get(subject_key) or self._by_id.get(subject_key)
        )

    def refusal(self, customer: ObservedCustomer) -> str | None:
        """Return why the metering API will refuse other subject keys on a customer, None if it will not."""
        if customer.active_subscription:
            return subscription_reason(customer)
        return self.frozen(customer)

    def frozen(self, customer: ObservedCustomer) -> str | None:
        """Return why the metering API will refuse any change of a customer, None if it will not."""
        pair = self.pairs.get(customer.key or "")
        return pair.refusal if pair else None

    def leave(self, moves: Iterable[Change]) -> None:
        """Note what moves off a customer, or has a customer retired."""
        for move in moves:
            self._leaving.setdefault(move.customer_id or "", set()).update(move.subject_keys)
            if move.kind is ChangeKind.RETIRE_CUSTOMER:
                self._retired.add(move.customer_id or "")

    def after_moves(self) -> ObservedState:
        """Return the observed world without the subjects and customers that leave it by a move."""
        if not self._leaving:
            return self._observed
        customers = tuple(
            replace(customer, subject_keys=self._staying(customer))
            for customer in self._observed.customers
            if customer.id not in self._retired
        )
        return replace(self._observed, customers=customers)

    def _staying(self, customer: ObservedCustomer) -> tuple[str, ...]:
        leaving = self._leaving.get(customer.id, ())
        return tuple(key for key in customer.subject_keys if key not in leaving)


def subscription_reason(have: ObservedCustomer) -> str:
    """Say why the subject keys of a paying customer cannot change, and what to do."""
    return (
        f"customer {customer_name(have)} has an active subscription ({have.active_subscription}); the"
        " metering API refuses to change its subject keys, not even their order. Attach the subject by hand"
        " between two subscriptions, or send this usage under a subject that the customer carries already,"
        " such as its key (the plugin's subject.field and mapping.subject_field: tag)"
    )
