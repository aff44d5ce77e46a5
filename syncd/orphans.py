"""What is ours in the metering API but named by no source any more: reported, and left alone."""

from __future__ import annotations

from collections.abc import Iterator

from syncd.changes import Change, ChangeKind
from syncd.model import DesiredWorld, ObservedCustomer, ObservedWorld
from syncd.ownership import is_ours

_OUR_PREFIXES = ("consumer:", "application:")


def orphaned(desired: DesiredWorld, observed: ObservedWorld, owner_id: str) -> Iterator[Change]:
    """Yield a report for each customer and subject of ours that no source names.

    Keys that a `Problem` is about are in doubt, not gone, and never reported here.
    """
    wanted_customers = {customer.key for customer in desired.customers}
    wanted_subjects = {subject.key for customer in desired.customers for subject in customer.subjects}
    for problem in desired.problems:
        wanted_subjects |= set(problem.subject_keys)
        wanted_customers |= {problem.customer_key} if problem.customer_key else set()
    our_entities = {subject.key for subject in observed.subjects or () if is_ours(subject.metadata, owner_id)}
    for customer in sorted(observed.customers, key=lambda c: (c.key or "", c.id)):
        if not is_ours(customer.metadata, owner_id):
            continue
        if customer.key in wanted_customers:
            gone = _gone_subjects(customer, wanted_subjects, our_entities)
            if gone:
                reason = "no source names its principal any more; left alone"
                yield Change(ChangeKind.ORPHANED, customer.key, gone, reason, customer.id)
        elif not wanted_subjects.intersection(customer.subject_keys):
            reason = "no source names it any more; left alone"
            yield Change(ChangeKind.ORPHANED, customer.key, customer.subject_keys, reason, customer.id)


def _gone_subjects(customer: ObservedCustomer, wanted: set[str], our_entities: set[str]) -> tuple[str, ...]:
    # Subject keys that people attached by hand are theirs; ours are known by their form or their entity.
    return tuple(
        key
        for key in customer.subject_keys
        if key not in wanted and (key in our_entities or key.startswith(_OUR_PREFIXES))
    )
