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
key, `allow_retire` has the customer make room for it (`syncd.moves`).

What is gone from the sources is the business of `syncd.orphans`, what a policy allows of `syncd.policy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta

from syncd.at_rest import at_rest
from syncd.changes import Change, ChangeKind, Plan, State, ordered
from syncd.entities import entity_changes
from syncd.model import DesiredCustomer, DesiredSubject, DesiredWorld, ObservedCustomer, ObservedWorld
from syncd.moves import Held, customer_name, held_reason, moves_to, principals_of, retirements_for
from syncd.orphans import Grace, orphan_changes
from syncd.ownership import ADOPTED, is_adoptable, is_ours, owner_of
from syncd.policy import POLICIES, Policy

_NEVER = timedelta(days=36500)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the planner may plan beyond the policy's own; `kept` must not be deleted: id -> why."""

    adopt: bool = False
    allow_move: bool = False
    grace: Grace = field(default_factory=Grace)
    allow_retire: bool = False
    kept: Mapping[str, str] = field(default_factory=dict)


def make_plan(
    desired: DesiredWorld,
    observed: ObservedWorld,
    *,
    owner_id: str,
    policy: Policy,
    options: PlanOptions | None = None,
) -> Plan:
    """Return what has to be done so that the metering API has what the sources ask for."""
    options = options or PlanOptions()
    grace = options.grace
    if policy == "create-only":
        options = replace(options, adopt=False, allow_move=False, allow_retire=False)
    if policy != "sync":
        grace = Grace(grace.now, _NEVER)
    planner = _Planner(observed, owner_id, options)
    changes = [
        change
        for customer in desired.customers
        if not at_rest(customer, planner.by_key.get(customer.key), planner.entities, owner_id)
        for change in planner.customer(customer)
    ]
    changes += [
        Change(ChangeKind.BLOCKED, problem.customer_key, problem.subject_keys, problem.reason)
        for problem in desired.problems
    ]
    changes += orphan_changes(desired, planner.after_moves(), owner_id, grace, options.kept)
    return Plan(owner_id, policy, ordered(POLICIES[policy](changes)))


class _Planner:
    """The observed world, indexed, and the rules for one customer at a time."""

    def __init__(self, observed: ObservedWorld, owner_id: str, options: PlanOptions) -> None:
        self._observed = observed
        self._owner_id = owner_id
        self._options = options
        self._leaving: dict[str, set[str]] = {}
        self._retired: set[str] = set()
        self.by_key = {customer.key: customer for customer in observed.customers if customer.key}
        self._by_subject = {key: customer for customer in observed.customers for key in customer.subject_keys}
        entities = observed.subjects
        self.entities = None if entities is None else {subject.key: subject for subject in entities}

    def customer(self, want: DesiredCustomer) -> Iterator[Change]:
        have = self.by_key.get(want.key)
        if have is None:
            yield from self._create(want)
        elif is_ours(have.metadata, self._owner_id):
            yield from self._update(want, have)
        elif self._options.adopt and is_adoptable(have.metadata):
            yield from self._adopt(want, have)
        else:
            yield from self._foreign(want, have)

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

    def _holder(self, subject_key: str) -> ObservedCustomer | None:
        """Return the customer that usage of this subject goes to today: by subject key, else by key."""
        return self._by_subject.get(subject_key) or self.by_key.get(subject_key)

    def _create(self, want: DesiredCustomer) -> Iterator[Change]:
        free: list[DesiredSubject] = []
        held: list[Held] = []
        for subject in want.subjects:
            holder = self._holder(subject.key)
            if holder is None:
                free.append(subject)
            else:
                held.append((subject, holder))
        moves = self._moves(want, held, None)
        moved = {key for move in moves for key in move.subject_keys}
        in_the_way = None if want.key in moved else self._holder(want.key)
        if in_the_way is not None:
            moved = set()
        else:
            yield from self._leave(moves)
        yield from self._all_held(want, held, moved)
        moved |= {subject.key for subject in free}
        free = [subject for subject in want.subjects if subject.key in moved]
        if not free:
            return
        if in_the_way is not None:
            reason = (
                f"its key {want.key!r} is a subject of customer {customer_name(in_the_way)}, and the metering"
                " API refuses a key that is another customer's subject. Take the subject off that customer,"
                " or use another key"
            )
            yield _blocked(want, free, reason, in_the_way)
            return
        keys = tuple(subject.key for subject in free)
        yield Change(
            ChangeKind.CREATE_CUSTOMER,
            want.key,
            keys,
            f"new: {principals_of(free)}",
            after=State(want.name, keys, {**want.details.metadata, **want.marks}, want.details),
        )
        yield from self._entity_changes(want, free, None)

    def _update(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        if ADOPTED in have.metadata:
            want = _unnamed(want)
        attached, missing, held = [], [], []
        carried = {*have.subject_keys, have.key}
        for subject in want.subjects:
            if subject.key in carried:
                attached.append(subject)
            elif (holder := self._holder(subject.key)) is None:
                missing.append(subject)
            else:
                held.append((subject, holder))
        moves = self._moves(want, held, have)
        yield from self._leave(moves)
        moved = {key for move in moves for key in move.subject_keys}
        yield from self._all_held(want, held, moved)
        moved |= {subject.key for subject in missing}
        missing = [subject for subject in want.subjects if subject.key in moved]
        if missing:
            change = self._attach(want, have, missing)
            yield change
            if change.actionable:
                attached += missing
        if want.name_follows_source and want.name != have.name:
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
        keys = tuple(subject.key for subject in missing)
        return Change(
            ChangeKind.ATTACH_SUBJECTS,
            want.key,
            keys,
            f"new in this customer: {principals_of(missing)}",
            have.id,
            State(subject_keys=have.subject_keys),
            State(subject_keys=have.subject_keys + keys),
        )

    def _adopt(self, want: DesiredCustomer, have: ObservedCustomer) -> Iterator[Change]:
        marks = {**want.marks, ADOPTED: "true"}
        yield Change(
            ChangeKind.ADOPT_CUSTOMER,
            want.key,
            tuple(subject.key for subject in want.subjects),
            f"made by hand with the key that we would give it: {principals_of(list(want.subjects))}."
            " It gets our marks; its name stays",
            have.id,
            State(metadata={name: have.metadata[name] for name in marks if name in have.metadata}),
            State(metadata=marks),
        )
        yield from self._update(want, replace(have, metadata={**have.metadata, **marks}))

    def _moves(self, want: DesiredCustomer, held: list[Held], have: ObservedCustomer | None) -> list[Change]:
        if not held or (have and have.active_subscription):
            return []
        ours = [pair for pair in held if is_ours(pair[1].metadata, self._owner_id)]
        moves = moves_to(want, ours) if self._options.allow_move else []
        retired = retirements_for(want, ours, self._options.kept) if self._options.allow_retire else []
        return moves + retired

    def _leave(self, moves: list[Change]) -> list[Change]:
        for move in moves:
            self._leaving.setdefault(move.customer_id or "", set()).update(move.subject_keys)
            if move.kind is ChangeKind.RETIRE_CUSTOMER:
                self._retired.add(move.customer_id or "")
        return moves

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
            holder = have if have.carries(subject.key) else self._holder(subject.key)
            if holder is not None:
                yield self._held(want, subject, holder)
                continue
            reason = (
                f"customer {customer_name(have)} belongs to {owner_of(have)}, so nothing is changed there and"
                f" the usage of {subject.principal} stays unattributed. Attach the subject by hand, or use"
                " another customer key"
            )
            yield _blocked(want, [subject], reason, have)

    def _held(self, want: DesiredCustomer, subject: DesiredSubject, holder: ObservedCustomer) -> Change:
        """Report a subject that is on another customer than the one we want, or on one that is not ours."""
        if not is_ours(holder.metadata, self._owner_id):
            whose = f"{customer_name(holder)}, which belongs to {owner_of(holder)}"
            reason = f"already attributed to {whose}; left alone"
            return Change(ChangeKind.UNMANAGED, holder.key, (subject.key,), reason, holder.id)
        reason = held_reason(want, subject, holder, self._options.kept)
        return _blocked(want, [subject], reason, holder)

    def _entity_changes(
        self, want: DesiredCustomer, subjects: list[DesiredSubject], have: ObservedCustomer | None
    ) -> Iterator[Change]:
        if self.entities is not None:
            yield from entity_changes(want, subjects, have, self.entities, self._owner_id)


def _unnamed(want: DesiredCustomer) -> DesiredCustomer:
    """Leave the name of an adopted customer to the people who gave it.

    The display names of its subject entities too: servers with the subject hook copy them onto the customer.
    """
    subjects = tuple(replace(subject, display_name=None) for subject in want.subjects)
    return replace(want, name_follows_source=False, subjects=subjects)


def subscription_reason(have: ObservedCustomer) -> str:
    """Say why the subject keys of a paying customer cannot change, and what to do."""
    return (
        f"customer {customer_name(have)} has an active subscription ({have.active_subscription}); the"
        " metering API refuses to change its subject keys, not even their order. Attach the subject by hand"
        " between two subscriptions, or send this usage under a subject that the customer carries already"
    )


def _blocked(
    want: DesiredCustomer, subjects: list[DesiredSubject], reason: str, customer: ObservedCustomer | None
) -> Change:
    keys = tuple(subject.key for subject in subjects)
    return Change(ChangeKind.BLOCKED, want.key, keys, reason, customer.id if customer else None)
