"""The observed world, indexed: who carries a subject, who refuses changes, what a plan takes off whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from syncd.changes import Change, ChangeKind
from syncd.model import ObservedCustomer, ObservedWorld
from syncd.moves import customer_name
from syncd.twice import counted_twice


class Holders:
    """What the metering API has; `leave` notes the moves and retirements of the plan that is being made."""

    def __init__(self, observed: ObservedWorld) -> None:
        self._observed = observed
        self._leaving: dict[str, set[str]] = {}
        self._retired: set[str] = set()
        self.by_key = {customer.key: customer for customer in observed.customers if customer.key}
        self._by_subject = {key: customer for customer in observed.customers for key in customer.subject_keys}
        entities = observed.subjects
        self.entities = None if entities is None else {subject.key: subject for subject in entities}
        self.pairs = counted_twice(self.by_key, self._by_subject)
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

    def after_moves(self) -> ObservedWorld:
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
