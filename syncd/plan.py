"""The planner: desired + observed -> ordered changes. Pure; never plans a deletion.

For each desired customer, in this order:

==============================  ====================================================================
the metering API has            then
==============================  ====================================================================
no customer of that key         create it with the subjects that are free
one that is ours                attach what is missing, rename; with an active subscription its
                                subject keys cannot change (the server refuses): blocked
one that is not ours            subjects it carries are *unmanaged* (a clean result); others blocked
==============================  ====================================================================

A subject that another customer carries already is *unmanaged* where that customer is not ours, and
blocked where it is: moving a subject changes usage that has not been invoiced yet, because
attribution is evaluated when usage is queried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from syncd.changes import Change, ChangeKind, Plan, State
from syncd.model import DesiredCustomer, DesiredSubject, DesiredWorld, ObservedCustomer, ObservedWorld
from syncd.orphans import orphaned
from syncd.ownership import is_ours, may_write_subject, owner_of

Policy = Literal["create-only", "upsert-only"]

_RANK = {kind: rank for rank, kind in enumerate(ChangeKind)}


def make_plan(desired: DesiredWorld, observed: ObservedWorld, *, owner_id: str, policy: Policy) -> Plan:
    """Return what has to be done so that the metering API has what the sources ask for."""
    planner = _Planner(observed, owner_id, policy)
    changes = [change for customer in desired.customers for change in planner.customer(customer)]
    changes += [
        Change(ChangeKind.BLOCKED, problem.customer_key, problem.subject_keys, problem.reason)
        for problem in desired.problems
    ]
    changes += orphaned(desired, observed, owner_id)
    # Customers come before subject entities: a server with the subject hook makes a customer of its
    # own for a subject that has none yet. The sort is stable, so within a kind the order is by key.
    return Plan(owner_id, policy, tuple(sorted(changes, key=lambda change: _RANK[change.kind])))


class _Planner:
    """The observed world, indexed, and the rules for one customer at a time."""

    def __init__(self, observed: ObservedWorld, owner_id: str, policy: Policy) -> None:
        self._owner_id = owner_id
        self._policy = policy
        self._by_key = {customer.key: customer for customer in observed.customers if customer.key}
        self._by_subject = {key: customer for customer in observed.customers for key in customer.subject_keys}
        entities = observed.subjects
        self._entities = None if entities is None else {subject.key: subject for subject in entities}

    def customer(self, want: DesiredCustomer) -> Iterator[Change]:
        have = self._by_key.get(want.key)
        if have is None:
            yield from self._create(want)
        elif is_ours(have.metadata, self._owner_id):
            yield from self._update(want, have)
        else:
            yield from self._foreign(want, have)

    def _holder(self, subject_key: str) -> ObservedCustomer | None:
        """Return the customer that usage of this subject goes to today: by subject key, else by key."""
        return self._by_subject.get(subject_key) or self._by_key.get(subject_key)

    def _create(self, want: DesiredCustomer) -> Iterator[Change]:
        free: list[DesiredSubject] = []
        for subject in want.subjects:
            holder = self._holder(subject.key)
            if holder is None:
                free.append(subject)
            else:
                yield self._held(want, subject, holder)
        if not free:
            return
        in_the_way = self._holder(want.key)
        if in_the_way is not None:
            reason = (
                f"its key {want.key!r} is a subject of customer {_name(in_the_way)}, and the metering API"
                " refuses a key that is another customer's subject. Take the subject off that customer,"
                " or use another key"
            )
            yield _blocked(want, free, reason, in_the_way)
            return
        keys = tuple(subject.key for subject in free)
        yield Change(
            ChangeKind.CREATE_CUSTOMER,
            want.key,
            keys,
            f"new: {_principals(free)}",
            after=State(want.name, keys, dict(want.marks)),
        )
        yield from self._entity_changes(want, free, None)

    def _update(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        attached, missing = [], []
        for subject in want.subjects:
            holder = self._holder(subject.key)
            if have.carries(subject.key):
                attached.append(subject)
            elif holder is None:
                missing.append(subject)
            else:
                yield self._held(want, subject, holder)
        if missing:
            change = self._attach(want, have, missing)
            yield change
            if change.actionable:
                attached += missing
        if want.name_follows_source and want.name != have.name and self._policy != "create-only":
            yield Change(
                ChangeKind.RENAME_CUSTOMER,
                want.key,
                (),
                "the name changed at the source",
                have.id,
                State(name=have.name),
                State(name=want.name),
            )
        yield from self._entity_changes(want, attached, have)

    def _attach(self, want: DesiredCustomer, have: ObservedCustomer, missing: list[DesiredSubject]) -> Change:
        if have.active_subscription:
            return _blocked(want, missing, subscription_reason(have), have)
        if self._policy == "create-only":
            reason = (
                "policy create-only never changes a customer that exists; use policy upsert-only to attach it"
            )
            return _blocked(want, missing, reason, have)
        keys = tuple(subject.key for subject in missing)
        return Change(
            ChangeKind.ATTACH_SUBJECTS,
            want.key,
            keys,
            f"new in this customer: {_principals(missing)}",
            have.id,
            State(subject_keys=have.subject_keys),
            State(subject_keys=have.subject_keys + keys),
        )

    def _foreign(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        for subject in want.subjects:
            holder = have if have.carries(subject.key) else self._holder(subject.key)
            if holder is not None:
                yield self._held(want, subject, holder)
                continue
            reason = (
                f"customer {_name(have)} belongs to {owner_of(have)}, so nothing is changed there and the"
                f" usage of {subject.principal} stays unattributed. Attach the subject by hand, or use"
                " another customer key"
            )
            yield _blocked(want, [subject], reason, have)

    def _held(self, want: DesiredCustomer, subject: DesiredSubject, holder: ObservedCustomer) -> Change:
        """Report a subject that is on another customer than the one we want, or on one that is not ours."""
        if not is_ours(holder.metadata, self._owner_id):
            reason = f"already attributed to {_name(holder)}, which belongs to {owner_of(holder)}; left alone"
            return Change(ChangeKind.UNMANAGED, holder.key, (subject.key,), reason, holder.id)
        reason = (
            f"{subject.principal} is to be in customer {want.key!r} but is attributed to {_name(holder)}."
            " Moving it would also move usage that is not invoiced yet, so it is left there: move it by hand"
            " when that is wanted"
        )
        return _blocked(want, [subject], reason, holder)

    def _entity_changes(
        self, want: DesiredCustomer, subjects: list[DesiredSubject], have: ObservedCustomer | None
    ) -> Iterator[Change]:
        if self._entities is None:
            return
        for subject in subjects:
            entity = self._entities.get(subject.key)
            after = State(subject.display_name, None, dict(subject.metadata))
            if entity is None:
                reason = f"no subject entity yet: {subject.principal}"
                before = None
            else:
                differs = (
                    subject.display_name is not None and subject.display_name != entity.display_name
                ) or any(entity.metadata.get(name) != value for name, value in subject.metadata.items())
                if (
                    not differs
                    or not may_write_subject(entity, self._owner_id)
                    or self._policy == "create-only"
                ):
                    continue
                reason = f"the subject entity differs: {subject.principal}"
                before = State(entity.display_name, None, dict(entity.metadata))
            yield Change(
                ChangeKind.UPSERT_SUBJECT,
                want.key,
                (subject.key,),
                reason,
                have.id if have else None,
                before,
                after,
            )


def subscription_reason(have: ObservedCustomer) -> str:
    """Say why the subject keys of a paying customer cannot change, and what to do."""
    return (
        f"customer {_name(have)} has an active subscription ({have.active_subscription}); the metering API"
        " refuses to change its subject keys, not even their order. Attach the subject by hand between two"
        " subscriptions, or send this usage under a subject that the customer carries already"
    )


def _blocked(
    want: DesiredCustomer, subjects: list[DesiredSubject], reason: str, customer: ObservedCustomer | None
) -> Change:
    keys = tuple(subject.key for subject in subjects)
    return Change(ChangeKind.BLOCKED, want.key, keys, reason, customer.id if customer else None)


def _name(customer: ObservedCustomer) -> str:
    return f"{customer.key or customer.id!r} ({customer.name})"


def _principals(subjects: list[DesiredSubject]) -> str:
    return ", ".join(subject.principal for subject in subjects)
