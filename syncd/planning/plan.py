"""The planner: compares the desired with the observed state and returns ordered changes. Pure.

For each desired customer, in this order:

==============================  ====================================================================
the metering API has            then
==============================  ====================================================================
no customer with that key       create it with the subjects that are free
a managed customer              attach missing subjects, rename; with an active subscription the server
                                refuses any change of its subject keys: blocked
one without ownership metadata  subjects that it carries are *unmanaged* (a clean result), others are
                                blocked; with `adopt` it gets syncd's ownership metadata and is then
                                managed, but keeps its name
one of another owner            the same, but it is never adopted
==============================  ====================================================================

A subject that another customer already carries is *unmanaged* if syncd does not manage that customer.
If it does, the subject is blocked, or with `allow_move` moved. A move also changes usage that has not
been invoiced yet, because attribution is evaluated when usage is queried. A subject that is the other
customer's own key cannot move.

A subject whose usage is already counted for two customers is blocked and stays where it is. Both are in
`syncd.planning.carriers`.

`syncd.planning.orphans` plans removals; `syncd.core.policy` decides which changes a policy allows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from msgspec import structs

from syncd.core.changes import Cause, Change, ChangeKind, EntityState, Plan, ordered
from syncd.core.model import (
    DesiredCustomer,
    DesiredState,
    DesiredSubject,
    ObservedCustomer,
    ObservedState,
    ObservedSubject,
)
from syncd.core.ownership import (
    ADOPTED,
    RESERVED_KEYS,
    is_adoptable,
    is_managed,
    is_same_value,
    may_write_subject,
    owner_of,
)
from syncd.core.policy import POLICIES, Policy
from syncd.planning.carriers import (
    CustomerIndex,
    Taken,
    customer_name,
    double_counting_changes,
    moves_to,
    names_of,
    principals_of,
    taken_reason,
    without_double_counted,
)
from syncd.planning.orphans import Grace, Obstacle, orphan_changes


def is_unchanged(
    want: DesiredCustomer,
    have: ObservedCustomer | None,
    entities: Mapping[str, ObservedSubject] | None,
    owner_id: str,
) -> bool:
    """Return whether a managed customer already has the wanted name, subjects and subject entities.

    A cheap check that lets the planner skip nearly all customers in nearly all runs. It may miss an
    unchanged customer; the planner then finds no changes for it.
    """
    if have is None or want.name != have.name or not is_managed(have.metadata, owner_id):
        return False
    carried: Collection[str] = have.subject_keys
    if len(carried) > 1:
        carried = frozenset(carried)
    for subject in want.subjects:
        if subject.key not in carried:
            return False
        if entities is not None:
            entity = entities.get(subject.key)
            if entity is None or _differs(subject, entity):
                return False
    return True


_NEVER = timedelta(days=36500)
_IGNORED_FLAGS_NOTE = (
    "policy create-only never changes a customer that exists, so --adopt and --allow-move do nothing"
)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What a run allows beyond its policy. `undeletable`: ids of customers that must stay -> why."""

    adopt: bool = False
    allow_move: bool = False
    grace: Grace = field(default_factory=Grace)
    undeletable: Mapping[str, Obstacle] = field(default_factory=dict)


def make_plan(
    desired: DesiredState,
    observed: ObservedState,
    *,
    owner_id: str,
    policy: Policy,
    options: PlanOptions | None = None,
) -> Plan:
    """Return the changes that bring the metering API from the observed to the desired state."""
    options = options or PlanOptions()
    grace = options.grace
    notes: tuple[str, ...] = ()
    if policy == "create-only":
        if options.adopt or options.allow_move:
            notes = (_IGNORED_FLAGS_NOTE,)
        options = replace(options, adopt=False, allow_move=False)
    if policy != "sync":
        grace = Grace(grace.now, _NEVER)
    index = CustomerIndex(observed)
    planner = _Planner(index, owner_id, options)
    changes = [
        change
        for customer in desired.customers
        if not is_unchanged(customer, index.by_key.get(customer.key), index.entities, owner_id)
        for change in planner.customer(without_double_counted(customer, index.double_counted))
    ]
    changes += [
        Change(ChangeKind.BLOCKED, problem.customer_key, problem.subject_keys, problem.reason)
        for problem in desired.problems
    ]
    changes += double_counting_changes(index.double_counted, desired.customers, owner_id)
    unchangeable = {pair.key_customer.id for pair in index.double_counted.values()}
    changes += orphan_changes(
        desired, index.after_moves(), owner_id, grace, options.undeletable, unchangeable
    )
    return Plan(owner_id, policy, ordered(POLICIES[policy](changes)), notes)


class _Planner:
    """Plans one customer at a time."""

    def __init__(self, index: CustomerIndex, owner_id: str, options: PlanOptions) -> None:
        self._index = index
        self._owner_id = owner_id
        self._options = options

    def customer(self, want: DesiredCustomer) -> Iterator[Change]:
        have = self._index.by_key.get(want.key)
        if have is None:
            yield from self._create(want)
        elif is_managed(have.metadata, self._owner_id):
            yield from self._update(want, have)
        elif self._options.adopt and is_adoptable(have.metadata) and not self._index.change_refusal(have):
            yield from self._adopt(want, have)
        else:
            yield from self._unmanaged(want, have)

    def _create(self, want: DesiredCustomer) -> Iterator[Change]:
        free: list[DesiredSubject] = []
        taken: list[Taken] = []
        for subject in want.subjects:
            carrier = self._index.carrier_of(subject.key)
            if carrier is None:
                free.append(subject)
            else:
                taken.append((subject, carrier))
        moves = self._moves(want, taken, None)
        moved = {key for move in moves for key in move.subject_keys}
        key_conflict = None if want.key in moved else self._index.conflicting(want.key)
        if key_conflict is not None:
            moved = set()
        else:
            self._index.record_moves(moves)
            yield from moves
        why_not = None if key_conflict is None else _key_reason(want, key_conflict)
        yield from self._report_taken(want, taken, moved, why_not)
        moved |= {subject.key for subject in free}
        free = [subject for subject in want.subjects if subject.key in moved]
        if not free:
            return
        if key_conflict is not None:
            yield _blocked(want, free, _key_reason(want, key_conflict), key_conflict)
            return
        keys = tuple(subject.key for subject in free)
        yield Change(
            ChangeKind.CREATE_CUSTOMER,
            want.key,
            keys,
            f"new: {principals_of(free)}",
            after=EntityState(want.name, keys, {**want.details.metadata, **want.ownership}, want.details),
            names=names_of(free),
        )
        yield from self._entity_changes(want, free, None)

    def _update(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        if ADOPTED in have.metadata:
            want = _without_names(want)
        attached, missing, taken = [], [], []
        carried = {*have.subject_keys, have.key}
        for subject in want.subjects:
            if subject.key in carried:
                attached.append(subject)
            elif (carrier := self._index.carrier_of(subject.key)) is None:
                missing.append(subject)
            else:
                taken.append((subject, carrier))
        moves = self._moves(want, taken, have)
        self._index.record_moves(moves)
        yield from moves
        moved = {key for move in moves for key in move.subject_keys}
        yield from self._report_taken(
            want,
            taken,
            moved,
            self._index.subject_refusal(have),
            settled=have.active_subscription is not None,
        )
        moved |= {subject.key for subject in missing}
        missing = [subject for subject in want.subjects if subject.key in moved]
        if missing:
            change = self._attach(want, have, missing)
            yield change
            if change.actionable:
                attached += missing
        if want.name_follows_source and want.name != have.name and not self._index.change_refusal(have):
            yield Change(
                ChangeKind.RENAME_CUSTOMER,
                want.key,
                (),
                "the name changed at the source",
                have.id,
                EntityState(name=have.name),
                EntityState(name=want.name),
            )
        yield from self._entity_changes(want, attached, have)

    def _attach(self, want: DesiredCustomer, have: ObservedCustomer, missing: list[DesiredSubject]) -> Change:
        if refusal := self._index.subject_refusal(have):
            return replace(
                _blocked(want, missing, refusal, have, settled=have.active_subscription is not None),
                **_subscription_of(have),
            )
        keys = tuple(subject.key for subject in missing)
        return Change(
            ChangeKind.ATTACH_SUBJECTS,
            want.key,
            keys,
            f"new in this customer: {principals_of(missing)}",
            have.id,
            EntityState(subject_keys=have.subject_keys),
            EntityState(subject_keys=have.subject_keys + keys),
            names=names_of(missing),
        )

    def _adopt(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        ownership = {**want.ownership, ADOPTED: "true"}
        yield Change(
            ChangeKind.ADOPT_CUSTOMER,
            want.key,
            tuple(subject.key for subject in want.subjects),
            f"exists already with the key that syncd would give it: {principals_of(list(want.subjects))}."
            " syncd adds its ownership metadata and keeps the name",
            have.id,
            EntityState(metadata={name: have.metadata[name] for name in ownership if name in have.metadata}),
            EntityState(metadata=ownership),
            names=names_of(want.subjects),
        )
        yield from self._update(want, structs.replace(have, metadata={**have.metadata, **ownership}))

    def _moves(
        self, want: DesiredCustomer, taken: list[Taken], have: ObservedCustomer | None
    ) -> list[Change]:
        if not (taken and self._options.allow_move) or (have and self._index.subject_refusal(have)):
            return []
        managed = [
            (subject, carrier)
            for subject, carrier in taken
            if is_managed(carrier.metadata, self._owner_id) and not self._index.change_refusal(carrier)
        ]
        return moves_to(want, managed)

    def _report_taken(
        self,
        want: DesiredCustomer,
        taken: list[Taken],
        moved: set[str],
        why_not: str | None,
        *,
        settled: bool = False,
    ) -> Iterator[Change]:
        for subject, carrier in taken:
            if subject.key not in moved:
                yield self._report_one_taken(want, subject, carrier, why_not, settled=settled)

    def _unmanaged(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        for subject in want.subjects:
            carrier = have if have.carries(subject.key) else self._index.carrier_of(subject.key)
            if carrier is not None:
                yield self._report_one_taken(want, subject, carrier, _not_managed(have), settled=True)
                continue
            reason = (
                f"{_not_managed(have)}"
                f" and the usage of {subject.principal} stays unbilled. Attach the subject by hand, or use"
                f" another customer key{self._adoption_hint(have)}"
            )
            blocked = _blocked(want, [subject], reason, have, settled=True)
            yield replace(blocked, cause=Cause.NOT_MANAGED, fact=f"it belongs to {owner_of(have)}")

    def _adoption_hint(self, have: ObservedCustomer) -> str:
        if self._options.adopt or not is_adoptable(have.metadata):
            return ""
        return "; or pass --adopt to let syncd manage this customer (it keeps its name)"

    def _report_one_taken(
        self,
        want: DesiredCustomer,
        subject: DesiredSubject,
        carrier: ObservedCustomer,
        why_not: str | None,
        *,
        settled: bool,
    ) -> Change:
        """Report a subject that another customer, or an unmanaged one, carries.

        `why_not`: why the customer that it is meant for cannot get it, whatever is allowed; `settled`: that
        is a decision of a person.
        """
        if not is_managed(carrier.metadata, self._owner_id):
            reason = f"already attributed to a customer that belongs to {owner_of(carrier)}"
            names = names_of([subject])
            return Change(ChangeKind.UNMANAGED, carrier.key, (subject.key,), reason, carrier.id, names=names)
        refusal = self._index.change_refusal(carrier) or why_not
        reason = taken_reason(want, subject, carrier, refusal)
        settled = settled or carrier.active_subscription is not None or ADOPTED in carrier.metadata
        blocked = _blocked(want, [subject], reason, carrier, settled=settled)
        if refusal is not None or carrier.key == subject.key:
            return blocked
        cause = (
            Cause.SUBSCRIPTION
            if carrier.active_subscription
            else Cause.ADOPTED
            if ADOPTED in carrier.metadata
            else Cause.ELSEWHERE
        )
        return replace(blocked, cause=cause, fact=f"it is attributed to {customer_name(carrier)}")

    def _entity_changes(
        self, want: DesiredCustomer, subjects: list[DesiredSubject], have: ObservedCustomer | None
    ) -> Iterator[Change]:
        if self._index.entities is not None:
            yield from _upsert_changes(want, subjects, have, self._index.entities, self._owner_id)


def _upsert_changes(
    want: DesiredCustomer,
    subjects: Iterable[DesiredSubject],
    have: ObservedCustomer | None,
    entities: Mapping[str, ObservedSubject],
    owner_id: str,
) -> Iterator[Change]:
    """Yield the subject entities to write, so that these subjects have entities with syncd's fields."""
    for subject in subjects:
        entity = entities.get(subject.key)
        if entity is None:
            reason, before = f"no subject entity yet: {subject.principal}", None
        elif _differs(subject, entity) and may_write_subject(entity, owner_id):
            reason = f"the subject entity differs: {subject.principal}"
            before = EntityState(entity.display_name, None, dict(entity.metadata))
        else:
            continue
        after = EntityState(subject.display_name, None, dict(subject.metadata))
        identity = have.id if have else None
        names = names_of([subject])
        yield Change(
            ChangeKind.UPSERT_SUBJECT,
            want.key,
            (subject.key,),
            reason,
            identity,
            before,
            after,
            names=names,
        )


def _differs(subject: DesiredSubject, entity: ObservedSubject) -> bool:
    """Return whether an entity lacks a field that the subject should have."""
    if subject.display_name is not None and subject.display_name != entity.display_name:
        return True
    return any(
        found != value and not (name in RESERVED_KEYS and is_same_value(found, value))
        for name, value in subject.metadata.items()
        for found in (entity.metadata.get(name),)
    )


def _without_names(want: DesiredCustomer) -> DesiredCustomer:
    """Return an adopted customer without names, so that it keeps those that people gave it.

    Display names of its subject entities go too: servers with the subject hook copy them to the customer.
    """
    subjects = tuple(structs.replace(subject, display_name=None) for subject in want.subjects)
    return structs.replace(want, name_follows_source=False, subjects=subjects)


def _not_managed(have: ObservedCustomer) -> str:
    return f"customer {customer_name(have)} belongs to {owner_of(have)}, so syncd does not change it"


def _key_reason(want: DesiredCustomer, key_conflict: ObservedCustomer) -> str:
    if key_conflict.id == want.key:
        return f"its key {want.key!r} is the id of customer {customer_name(key_conflict)}. Use another key"
    return (
        f"its key {want.key!r} is a subject of customer {customer_name(key_conflict)}, and the metering"
        " API refuses a key that is another customer's subject. Remove the subject from that customer,"
        " or use another key"
    )


def _blocked(
    want: DesiredCustomer,
    subjects: list[DesiredSubject],
    reason: str,
    customer: ObservedCustomer | None,
    *,
    settled: bool = False,
) -> Change:
    keys = tuple(subject.key for subject in subjects)
    identity = customer.id if customer else None
    return Change(
        ChangeKind.BLOCKED, want.key, keys, reason, identity, settled=settled, names=names_of(subjects)
    )


def _subscription_of(have: ObservedCustomer) -> dict[str, Any]:
    """Return cause and fact of a change that the subscription of its customer blocks."""
    if have.active_subscription is None:
        return {}
    return {"cause": Cause.SUBSCRIPTION, "fact": f"subscription {have.active_subscription}"}
