"""The limit of subjects per customer: those over it are reported, or get customers of their own.

Takes the observed state into account, so that subjects that a customer already has stay on it, whichever
others are added.
"""

from __future__ import annotations

from msgspec import structs

from syncd.core.model import (
    DesiredCustomer,
    DesiredState,
    DesiredSubject,
    ObservedCustomer,
    ObservedState,
    Problem,
)
from syncd.core.ownership import CUSTOMER_GROUP, is_managed, label_value, ownership_metadata
from syncd.mapping.rules import MAX_KEY, MAX_NAME, MappingRules


def within_limits(desired: DesiredState, observed: ObservedState, rules: MappingRules) -> DesiredState:
    """Return the desired state with no customer over the limit."""
    limit = rules.max_subjects_per_customer
    if limit is None:
        return desired
    existing = {customer.key: customer for customer in observed.customers if customer.key}
    carriers = existing | {key: customer for customer in observed.customers for key in customer.subject_keys}
    within: list[DesiredCustomer] = []
    split: list[DesiredCustomer] = []
    problems = list(desired.problems)
    taken = _taken_keys(desired)
    for customer in desired.customers:
        stays, over = _divided(customer, existing.get(customer.key), carriers, limit, rules.owner_id)
        within.append(customer if not over else structs.replace(customer, subjects=stays))
        for subject in over:
            own, itself = _own(customer, subject, rules.owner_id), _subject_of(subject)
            if rules.overflow != "split":
                problems.append(_blocked(customer, subject, limit))
            elif len(own.key) > MAX_KEY or taken.get(own.key, itself) != itself:
                problems.append(_unsplit(customer, subject, own.key, taken.get(own.key)))
            else:
                taken[own.key] = f"that of {subject.principal}"
                split.append(own)
    return DesiredState(
        tuple(sorted((customer for customer in within + split if customer.subjects), key=lambda c: c.key)),
        tuple(sorted(problems, key=lambda problem: problem.reason)),
        desired.warnings,
        desired.known,
        desired.prefixes,
    )


def _divided(
    customer: DesiredCustomer,
    current: ObservedCustomer | None,
    carriers: dict[str, ObservedCustomer],
    limit: int,
    owner_id: str,
) -> tuple[tuple[DesiredSubject, ...], tuple[DesiredSubject, ...]]:
    """Return the subjects that stay and those that do not fit.

    First come those already on the customer, then the one that the customer is named after, then new
    ones by key, and last those with a customer of their own, since moving them moves usage that is not
    invoiced yet.
    """
    carried = set(current.subject_keys) if current else set()
    wanted = {subject.key for subject in customer.subjects}
    room = max(limit - len(carried - wanted), 0)

    def rank(subject: DesiredSubject) -> tuple[int, str]:
        own = carriers.get(subject.key)
        split_off = own is not None and own.key != customer.key and is_managed(own.metadata, owner_id)
        place = 0 if subject.key in carried else 1 if subject.key == customer.key else 3 if split_off else 2
        return place, subject.key

    ordered = sorted(customer.subjects, key=rank)
    room = max(room, len(carried & wanted))
    stays = sorted(ordered[:room], key=lambda subject: subject.key)
    return tuple(stays), tuple(ordered[room:])


def _own(group: DesiredCustomer, subject: DesiredSubject, owner_id: str) -> DesiredCustomer:
    """Return a customer for one member of a group, with the group in its name and metadata."""
    ownership = {**ownership_metadata(owner_id, subject.key), CUSTOMER_GROUP: label_value(group.key)}
    member = subject.principal.partition(" ")[2]
    return DesiredCustomer(
        key=subject.own_key or subject.key,
        name=f"{group.name}: {member}"[:MAX_NAME].strip(),
        name_follows_source=False,
        subjects=(structs.replace(subject, display_name=None, metadata={**subject.metadata, **ownership}),),
        ownership=ownership,
        details=group.details,
    )


def _taken_keys(desired: DesiredState) -> dict[str, str]:
    """Return the keys that a split-off customer cannot have, each with its user.

    These are the keys of other customers, and the subjects of other principals, whose usage would be
    counted twice.
    """
    taken = {subject.key: _subject_of(subject) for one in desired.customers for subject in one.subjects}
    return taken | {one.key: f"that of {_shown(one)}" for one in desired.customers}


def _subject_of(subject: DesiredSubject) -> str:
    return f"the subject {subject.key!r} of {subject.principal}"


def _shown(customer: DesiredCustomer) -> str:
    members = ", ".join(subject.principal for subject in customer.subjects[:3])
    return f"customer {customer.key!r} ({members}{', ...' if len(customer.subjects) > 3 else ''})"


def _unsplit(group: DesiredCustomer, subject: DesiredSubject, key: str, whose: str | None) -> Problem:
    why = f"which is longer than {MAX_KEY} characters" if whose is None else f"which is {whose}"
    reason = (
        f"{subject.principal} does not fit into customer {group.key!r} (mapping.max_subjects_per_customer),"
        f" and a customer of its own would have the key {key!r}, {why}. Use a template mapping.key that gives"
        " each principal its own key"
    )
    return Problem(group.key, (subject.key,), reason)


def _blocked(customer: DesiredCustomer, subject: DesiredSubject, limit: int) -> Problem:
    reason = (
        f"{subject.principal} does not fit into customer {customer.key!r}:"
        f" mapping.max_subjects_per_customer is {limit}. Let the plugin send the customer's key as the"
        " subject, set mapping.overflow to split (a customer of its own that names the group), or raise"
        " the limit"
    )
    return Problem(customer.key, (subject.key,), reason)
