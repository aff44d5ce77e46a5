"""How many subjects a customer may have: what does not fit is reported, or gets a customer of its own.

Needs to know what the metering API has, so that those who are on the customer already stay there
whoever else comes. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from syncd.core.model import (
    DesiredCustomer,
    DesiredState,
    DesiredSubject,
    ObservedCustomer,
    ObservedState,
    Problem,
)
from syncd.core.ownership import CUSTOMER_GROUP, is_ours, label_value, ownership_metadata
from syncd.mapping.rules import MAX_KEY, MAX_NAME, MappingRules


def within_limits(world: DesiredState, observed: ObservedState, rules: MappingRules) -> DesiredState:
    """Return the world with no customer over the limit."""
    limit = rules.max_subjects_per_customer
    if limit is None:
        return world
    there = {customer.key: customer for customer in observed.customers if customer.key}
    carriers = there | {key: customer for customer in observed.customers for key in customer.subject_keys}
    kept: list[DesiredCustomer] = []
    split: list[DesiredCustomer] = []
    problems = list(world.problems)
    taken = _taken(world)
    for customer in world.customers:
        stays, over = _divided(customer, there.get(customer.key), carriers, limit, rules.owner_id)
        kept.append(customer if not over else replace(customer, subjects=stays))
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
        tuple(sorted((customer for customer in kept + split if customer.subjects), key=lambda c: c.key)),
        tuple(sorted(problems, key=lambda problem: problem.reason)),
        world.warnings,
        world.known,
    )


def _divided(
    customer: DesiredCustomer,
    have: ObservedCustomer | None,
    carriers: dict[str, ObservedCustomer],
    limit: int,
    owner_id: str,
) -> tuple[tuple[DesiredSubject, ...], tuple[DesiredSubject, ...]]:
    """Return those that stay and those that do not fit.

    First come those that are there, then the namesake, then the new by key, and last those who have
    a customer of their own already, since moving them moves usage that is not invoiced yet.
    """
    carried = set(have.subject_keys) if have else set()
    wanted = {subject.key for subject in customer.subjects}
    room = max(limit - len(carried - wanted), 0)

    def rank(subject: DesiredSubject) -> tuple[int, str]:
        own = carriers.get(subject.key)
        split_off = own is not None and own.key != customer.key and is_ours(own.metadata, owner_id)
        place = 0 if subject.key in carried else 1 if subject.key == customer.key else 3 if split_off else 2
        return place, subject.key

    ordered = sorted(customer.subjects, key=rank)
    room = max(room, len(carried & wanted))
    stays = sorted(ordered[:room], key=lambda subject: subject.key)
    return tuple(stays), tuple(ordered[room:])


def _own(group: DesiredCustomer, subject: DesiredSubject, owner_id: str) -> DesiredCustomer:
    """Return a customer for one member of a group, which names the group."""
    ours = {**ownership_metadata(owner_id, subject.key), CUSTOMER_GROUP: label_value(group.key)}
    who = subject.principal.partition(" ")[2]
    return DesiredCustomer(
        key=subject.own_key or subject.key,
        name=f"{group.name}: {who}"[:MAX_NAME].strip(),
        name_follows_source=False,
        subjects=(replace(subject, display_name=None, metadata={**subject.metadata, **ours}),),
        marks=ours,
        details=group.details,
    )


def _taken(world: DesiredState) -> dict[str, str]:
    """Return what cannot be the key of a customer that is split off, and whose it is.

    Neither another customer's key, nor another principal's subject: its usage would be counted twice.
    """
    taken = {subject.key: _subject_of(subject) for one in world.customers for subject in one.subjects}
    return taken | {one.key: f"that of {_shown(one)}" for one in world.customers}


def _subject_of(subject: DesiredSubject) -> str:
    return f"the subject {subject.key!r} of {subject.principal}"


def _shown(customer: DesiredCustomer) -> str:
    people = ", ".join(subject.principal for subject in customer.subjects[:3])
    return f"customer {customer.key!r} ({people}{', ...' if len(customer.subjects) > 3 else ''})"


def _unsplit(group: DesiredCustomer, subject: DesiredSubject, key: str, whose: str | None) -> Problem:
    why = f"which is longer than {MAX_KEY} characters" if whose is None else f"and that is {whose}"
    reason = (
        f"{subject.principal} does not fit into customer {group.key!r} (mapping.max_subjects_per_customer),"
        f" and a customer of its own would have the key {key!r}, {why}. Use a template mapping.key that tells"
        " them apart"
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
