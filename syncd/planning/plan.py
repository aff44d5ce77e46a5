"""The planner: desired + observed -> ordered changes. Pure.

For each desired customer, in this order:

==============================  ====================================================================
the metering API has            then
==============================  ====================================================================
no customer of that key         create it with the subjects that are free
one that is ours                attach what is missing, rename; with an active subscription its
                                subject keys cannot change (the server refuses): blocked
one without any owner's marks   subjects it carries are *unmanaged* (a clean result), others blocked;
                                with `adopt` it gets our marks and is then treated as ours, but for
                                its name
one of another owner            as one without marks; never adopted
==============================  ====================================================================

A subject that another customer carries already is *unmanaged* where that customer is not ours. Where
it is ours, it is blocked, or with `allow_move` moved: that changes usage that has not been invoiced
yet, because attribution is evaluated when usage is queried. Where the subject is that customer's own
key, `allow_retire` has the customer make room for it (`syncd.planning.moves`).

A subject that is counted for two customers already is blocked, and stays where it is
(`syncd.planning.customer_index`).

What is gone from the sources is the business of `syncd.planning.orphans`, what a policy allows of
`syncd.core.policy`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

from syncd.core.changes import Change, ChangeKind, EntityState, Plan, ordered
from syncd.core.model import (
    DesiredCustomer,
    DesiredState,
    DesiredSubject,
    ObservedCustomer,
    ObservedState,
    ObservedSubject,
)
from syncd.core.ownership import ADOPTED, is_adoptable, is_managed, owner_of
from syncd.core.policy import POLICIES, Policy
from syncd.planning.customer_index import CustomerIndex, apart, pair_changes
from syncd.planning.entity_changes import differs, entity_changes
from syncd.planning.moves import Held, customer_name, held_reason, moves_to, principals_of, retirements_for
from syncd.planning.orphans import Grace, orphan_changes

# MERGED: Customers with which there is surely nothing to do: nearly all of them in nearly all runs.
#
# The planner looks at the others only. What is not surely at rest may still turn out to be so there.


def is_unchanged(
    want: DesiredCustomer,
    have: ObservedCustomer | None,
    entities: Mapping[str, ObservedSubject] | None,
    owner_id: str,
) -> bool:
    """Tell whether a customer of ours is as wanted: its name, all subjects on it, their entities."""
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
            if entity is None or differs(subject, entity):
                return False
    return True


_NEVER = timedelta(days=36500)
_IGNORED = (
    "policy create-only never changes a customer that exists, so --adopt, --allow-move and --allow-retire do"
    " nothing"
)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the planner may plan beyond the policy's own; `kept` must not be deleted: id -> why."""

    adopt: bool = False
    allow_move: bool = False
    grace: Grace = field(default_factory=Grace)
    allow_retire: bool = False
    kept: Mapping[str, str] = field(default_factory=dict)


def make_plan(
    desired: DesiredState,
    observed: ObservedState,
    *,
    owner_id: str,
    policy: Policy,
    options: PlanOptions | None = None,
) -> Plan:
    """Return what has to be done so that the metering API has what the sources ask for."""
    options = options or PlanOptions()
    grace = options.grace
    notes: tuple[str, ...] = ()
    if policy == "create-only":
        if options.adopt or options.allow_move or options.allow_retire:
            notes = (_IGNORED,)
        options = replace(options, adopt=False, allow_move=False, allow_retire=False)
    if policy != "sync":
        grace = Grace(grace.now, _NEVER)
    holders = CustomerIndex(observed)
    planner = _Planner(holders, owner_id, options)
    changes = [
        change
        for customer in desired.customers
        if not is_unchanged(customer, holders.by_key.get(customer.key), holders.entities, owner_id)
        for change in planner.customer(apart(customer, holders.pairs))
    ]
    changes += [
        Change(ChangeKind.BLOCKED, problem.customer_key, problem.subject_keys, problem.reason)
        for problem in desired.problems
    ]
    changes += pair_changes(holders.pairs, desired.customers, owner_id)
    frozen = {pair.named.id for pair in holders.pairs.values()}
    changes += orphan_changes(desired, holders.after_moves(), owner_id, grace, options.kept, frozen)
    return Plan(owner_id, policy, ordered(POLICIES[policy](changes)), notes)


class _Planner:
    """The rules for one customer at a time."""

    def __init__(self, holders: CustomerIndex, owner_id: str, options: PlanOptions) -> None:
        self._holders = holders
        self._owner_id = owner_id
        self._options = options

    def customer(self, want: DesiredCustomer) -> Iterator[Change]:
        have = self._holders.by_key.get(want.key)
        if have is None:
            yield from self._create(want)
        elif is_managed(have.metadata, self._owner_id):
            yield from self._update(want, have)
        elif self._options.adopt and is_adoptable(have.metadata) and not self._holders.frozen(have):
            yield from self._adopt(want, have)
        else:
            yield from self._foreign(want, have)

    def _create(self, want: DesiredCustomer) -> Iterator[Change]:
        free: list[DesiredSubject] = []
        held: list[Held] = []
        for subject in want.subjects:
            holder = self._holders.of(subject.key)
            if holder is None:
                free.append(subject)
            else:
                held.append((subject, holder))
        moves = self._moves(want, held, None)
        moved = {key for move in moves for key in move.subject_keys}
        in_the_way = None if want.key in moved else self._holders.of(want.key)
        if in_the_way is not None:
            moved = set()
        else:
            self._holders.leave(moves)
            yield from moves
        yield from self._all_held(want, held, moved)
        moved |= {subject.key for subject in free}
        free = [subject for subject in want.subjects if subject.key in moved]
        if not free:
            return
        if in_the_way is not None:
            yield _blocked(want, free, _key_reason(want, in_the_way), in_the_way)
            return
        keys = tuple(subject.key for subject in free)
        yield Change(
            ChangeKind.CREATE_CUSTOMER,
            want.key,
            keys,
            f"new: {principals_of(free)}",
            after=EntityState(want.name, keys, {**want.details.metadata, **want.ownership}, want.details),
        )
        yield from self._entity_changes(want, free, None)

    def _update(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        if ADOPTED in have.metadata:
            want = _unnamed(want)
        attached, missing, held = [], [], []
        carried = {*have.subject_keys, have.key, have.id}
        for subject in want.subjects:
            if subject.key in carried:
                attached.append(subject)
            elif (holder := self._holders.of(subject.key)) is None:
                missing.append(subject)
            else:
                held.append((subject, holder))
        moves = self._moves(want, held, have)
        self._holders.leave(moves)
        yield from moves
        moved = {key for move in moves for key in move.subject_keys}
        yield from self._all_held(want, held, moved)
        moved |= {subject.key for subject in missing}
        missing = [subject for subject in want.subjects if subject.key in moved]
        if missing:
            change = self._attach(want, have, missing)
            yield change
            if change.actionable:
                attached += missing
        if want.name_follows_source and want.name != have.name and not self._holders.frozen(have):
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
        if refusal := self._holders.refusal(have):
            return _blocked(want, missing, refusal, have)
        keys = tuple(subject.key for subject in missing)
        return Change(
            ChangeKind.ATTACH_SUBJECTS,
            want.key,
            keys,
            f"new in this customer: {principals_of(missing)}",
            have.id,
            EntityState(subject_keys=have.subject_keys),
            EntityState(subject_keys=have.subject_keys + keys),
        )

    def _adopt(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        marks = {**want.ownership, ADOPTED: "true"}
        yield Change(
            ChangeKind.ADOPT_CUSTOMER,
            want.key,
            tuple(subject.key for subject in want.subjects),
            f"made by hand with the key that we would give it: {principals_of(list(want.subjects))}."
            " It gets our marks; its name stays",
            have.id,
            EntityState(metadata={name: have.metadata[name] for name in marks if name in have.metadata}),
            EntityState(metadata=marks),
        )
        yield from self._update(want, replace(have, metadata={**have.metadata, **marks}))

    def _moves(self, want: DesiredCustomer, held: list[Held], have: ObservedCustomer | None) -> list[Change]:
        if not held or (have and self._holders.refusal(have)):
            return []
        ours = [
            (subject, holder)
            for subject, holder in held
            if is_managed(holder.metadata, self._owner_id) and not self._holders.frozen(holder)
        ]
        moves = moves_to(want, ours) if self._options.allow_move else []
        retired = retirements_for(want, ours, self._options.kept) if self._options.allow_retire else []
        return moves + retired

    def _all_held(
        self,
        want: DesiredCustomer,
        held: list[Held],
        moved: set[str],
    ) -> Iterator[Change]:
        for subject, holder in held:
            if subject.key not in moved:
                yield self._held(want, subject, holder)

    def _foreign(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        for subject in want.subjects:
            holder = have if have.carries(subject.key) else self._holders.of(subject.key)
            if holder is not None:
                yield self._held(want, subject, holder)
                continue
            reason = (
                f"customer {customer_name(have)} belongs to {owner_of(have)}, so nothing is changed there and"
                f" the usage of {subject.principal} stays unattributed. Attach the subject by hand, or use"
                f" another customer key{self._adoption_hint(have)}"
            )
            yield _blocked(want, [subject], reason, have)

    def _adoption_hint(self, have: ObservedCustomer) -> str:
        if self._options.adopt or not is_adoptable(have.metadata):
            return ""
        return "; or allow with --adopt that syncd takes it over, with our marks (its name stays)"

    def _held(self, want: DesiredCustomer, subject: DesiredSubject, holder: ObservedCustomer) -> Change:
        """Report a subject that is on another customer than the one we want, or on one that is not ours."""
        if not is_managed(holder.metadata, self._owner_id):
            whose = f"{customer_name(holder)}, which belongs to {owner_of(holder)}"
            reason = f"already attributed to {whose}; left alone"
            return Change(ChangeKind.UNMANAGED, holder.key, (subject.key,), reason, holder.id)
        frozen = self._holders.frozen(holder)
        reason = held_reason(want, subject, holder, self._options.kept, frozen)
        return _blocked(want, [subject], reason, holder)

    def _entity_changes(
        self, want: DesiredCustomer, subjects: list[DesiredSubject], have: ObservedCustomer | None
    ) -> Iterator[Change]:
        if self._holders.entities is not None:
            yield from entity_changes(want, subjects, have, self._holders.entities, self._owner_id)


def _unnamed(want: DesiredCustomer) -> DesiredCustomer:
    """Leave the name of an adopted customer to the people who gave it.

    The display names of its subject entities too: servers with the subject hook copy them onto the customer.
    """
    subjects = tuple(replace(subject, display_name=None) for subject in want.subjects)
    return replace(want, name_follows_source=False, subjects=subjects)


def _key_reason(want: DesiredCustomer, in_the_way: ObservedCustomer) -> str:
    if in_the_way.id == want.key:
        return f"its key {want.key!r} is the id of customer {customer_name(in_the_way)}. Use another key"
    return (
        f"its key {want.key!r} is a subject of customer {customer_name(in_the_way)}, and the metering"
        " API refuses a key that is another customer's subject. Take the subject off that customer,"
        " or use another key"
    )


def _blocked(
    want: DesiredCustomer, subjects: list[DesiredSubject], reason: str, customer: ObservedCustomer | None
) -> Change:
    keys = tuple(subject.key for subject in subjects)
    return Change(ChangeKind.BLOCKED, want.key, keys, reason, customer.id if customer else None)
