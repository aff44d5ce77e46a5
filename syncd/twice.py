"""Usage that is counted for two customers: one carries the subject, and it is the key of the other. Pure.

OpenMeter refuses a key that is another customer's subject, but accepts a subject that is another customer's
key (openmeter/customer/adapter/customer.go, CreateCustomer and UpdateCustomer look at the key only). Then it
counts the usage for both (streaming/clickhouse/queryhelper.go, customersWhere), and answers 409 to every
later change of the one whose key it is. syncd's plans never make such a pair. One that people have made is
blocked: which of the two shall pay is not for syncd to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from syncd.changes import Change, ChangeKind
from syncd.model import DesiredCustomer, ObservedCustomer
from syncd.moves import customer_name
from syncd.ownership import is_ours


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


def counted_twice(
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
        if key in named or any(is_ours(customer.metadata, owner_id) for customer in both):
            yield Change(ChangeKind.BLOCKED, pair.named.key, (key,), pair.reason, pair.named.id)
