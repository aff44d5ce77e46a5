"""Orphans: managed customers and subjects that no source names any more; marked, detached, then deleted.

Only policy ``sync`` makes these changes; the other policies report them (`syncd.core.policy`).

=============================  =====================================================================
a managed customer             then
=============================  =====================================================================
no source names it             mark; after `detach_after` detach the managed subjects; after
                               `delete_after` (never by default) delete it
a source names it              mark each orphaned subject; after `detach_after` detach it
a source names it *again*      remove the mark, so that the next grace period starts from zero
=============================  =====================================================================

Keys named in a `Problem` are uncertain and so not orphaned. An active subscription blocks the change,
because the server would refuse it. Nothing is detached from an adopted customer, and a customer that
carries subjects that syncd did not attach is not deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from syncd.core.changes import Change, ChangeKind, EntityState
from syncd.core.model import DesiredState, ObservedCustomer, ObservedState
from syncd.core.ownership import (
    ADOPTED,
    CLEARED,
    LIFECYCLE_KEYS,
    ORPHANED_AT,
    customer_orphaned_since,
    is_managed,
    newly_orphaned,
    orphaned_subjects,
    subject_digest,
    timestamp,
)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a customer must not be deleted; `settled` if the deletion waits for billing, by design."""

    reason: str
    settled: bool = True


_ALL_DELETABLE: Mapping[str, Obstacle] = {}


@dataclass(frozen=True, slots=True)
class Grace:
    """Grace periods of orphans, counted from the mark; with `delete_after` None no customer is deleted."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    detach_after: timedelta = timedelta(days=40)
    delete_after: timedelta | None = None


def orphan_changes(
    desired: DesiredState,
    observed: ObservedState,
    owner_id: str,
    grace: Grace,
    undeletable: Mapping[str, Obstacle] = _ALL_DELETABLE,
    unchangeable: Collection[str] = frozenset(),
) -> Iterator[Change]:
    """Yield the changes of managed customers and subjects that no source names.

    `undeletable` are customers that must stay: id -> why. Customers whose id is in `unchangeable` are left
    out: the metering API refuses any change of them, which the plan reports elsewhere.
    """
    lifecycle = _Lifecycle(desired, observed, owner_id, grace, undeletable)
    managed = (customer for customer in observed.customers if is_managed(customer.metadata, owner_id))
    affected = [
        customer
        for customer in managed
        if customer.id not in unchangeable and not lifecycle.is_unaffected(customer)
    ]
    for customer in sorted(affected, key=lambda c: (c.key or "", c.id)):
        yield from lifecycle.customer(customer)
    yield from lifecycle.entities()


class _Lifecycle:
    def __init__(
        self,
        desired: DesiredState,
        observed: ObservedState,
        owner_id: str,
        grace: Grace,
        undeletable: Mapping[str, Obstacle],
    ) -> None:
        self._grace = grace
        self._undeletable = undeletable
        self._observed = observed
        self._prefixes = desired.prefixes
        self._wanted_customers = {customer.key for customer in desired.customers}
        self._wanted = {subject.key for customer in desired.customers for subject in customer.subjects}
        self._wanted |= desired.known
        for problem in desired.problems:
            self._wanted |= set(problem.subject_keys)
            self._wanted_customers |= {problem.customer_key} if problem.customer_key else set()
        entities = observed.subjects or ()
        self._entities = {entity.key for entity in entities if is_managed(entity.metadata, owner_id)}
        self._freed: set[str] = set()

    def is_unaffected(self, customer: ObservedCustomer) -> bool:
        """Return whether a source names it and all its managed subjects, and it carries no mark."""
        if not self._is_named(customer):
            return False
        if not LIFECYCLE_KEYS.isdisjoint(customer.metadata):
            return False
        return self._wanted.issuperset(customer.subject_keys) or not self._managed_keys(customer)

    def customer(self, customer: ObservedCustomer) -> Iterator[Change]:
        if ADOPTED in customer.metadata:
            yield from self._adopted(customer)
        elif self._is_named(customer):
            yield from self._with_orphaned_subjects(customer)
        else:
            yield from self._orphaned(customer)

    def _is_named(self, customer: ObservedCustomer) -> bool:
        """Return whether a source names it or a subject that it pays for, its key included."""
        return (
            customer.key in self._wanted_customers
            or customer.key in self._wanted
            or not self._wanted.isdisjoint(customer.subject_keys)
        )

    def entities(self) -> Iterator[Change]:
        """Yield the deletions of orphaned subject entities that no customer carries after this plan."""
        if not self._entities - self._wanted:
            return
        held = {
            key for customer in self._observed.customers for key in (*customer.subject_keys, customer.key)
        }
        for key in sorted(self._entities - self._wanted - (held - self._freed)):
            yield Change(
                ChangeKind.DELETE_SUBJECT, None, (key,), "no source names it and no customer carries it"
            )

    def _managed_keys(self, customer: ObservedCustomer) -> tuple[str, ...]:
        """Return the orphaned keys that syncd attached; others were attached by people.

        These have a prefix of syncd's, an entity that it manages, or are the key of a customer that no source
        names. Where subjects are usernames and the API has no entities (v3), nothing else tells them from a
        person's.
        """
        own_key = None if self._is_named(customer) else customer.key
        return tuple(
            key
            for key in customer.subject_keys
            if key not in self._wanted
            and (key in self._entities or key.startswith(self._prefixes) or key == own_key)
        )

    def _with_orphaned_subjects(self, customer: ObservedCustomer) -> Iterator[Change]:
        orphaned = self._managed_keys(customer)
        marks = orphaned_subjects(customer.metadata)
        since = {key: marks[subject_digest(key)][1] for key in orphaned if subject_digest(key) in marks}
        fresh = newly_orphaned(customer.metadata, [k for k in orphaned if k not in since], self._grace.now)
        newly = {value.rpartition("-")[2] for value in fresh.values()}
        marked = tuple(key for key in orphaned if subject_digest(key) in newly)
        due = tuple(
            key for key in orphaned if key in since and self._has_passed(since[key], self._grace.detach_after)
        )
        stale = {
            slot: CLEARED
            for name, (slot, _) in marks.items()
            if name not in {subject_digest(key) for key in orphaned}
        }
        if customer_orphaned_since(customer.metadata):
            stale[ORPHANED_AT] = CLEARED
        if stale:
            yield _marking(ChangeKind.UNMARK_ORPHANED, customer, (), "a source names it again", stale)
        if marked:
            yield _marking(ChangeKind.MARK_ORPHANED, customer, marked, self._detach_notice(marked), fresh)
        if due:
            freed = {marks[subject_digest(key)][0]: CLEARED for key in due}
            yield self._detach(customer, due, min(since[key] for key in due), freed)
        waiting = tuple(key for key in orphaned if key not in marked and key not in due)
        if waiting:
            yield self._report(
                customer, waiting, max((since[k] for k in waiting if k in since), default=None)
            )

    def _adopted(self, customer: ObservedCustomer) -> Iterator[Change]:
        """Report only: syncd cannot know which of its subjects people attached themselves."""
        if orphaned := self._managed_keys(customer):
            reason = "no source names it any more; left alone, because this customer was created by hand"
            yield Change(ChangeKind.ORPHANED, customer.key, orphaned, reason, customer.id)

    def _orphaned(self, customer: ObservedCustomer) -> Iterator[Change]:
        since = customer_orphaned_since(customer.metadata)
        managed = self._managed_keys(customer)
        if since is None:
            metadata = {ORPHANED_AT: timestamp(self._grace.now)}
            reason = self._detach_notice(managed)
            yield _marking(ChangeKind.MARK_ORPHANED, customer, customer.subject_keys, reason, metadata)
            return
        delete_after = self._grace.delete_after
        if (
            delete_after is not None
            and self._has_passed(since, delete_after)
            and managed == customer.subject_keys
        ):
            yield self._delete(customer, since)
        elif managed and self._has_passed(since, self._grace.detach_after):
            yield self._detach(customer, managed, since, {})
        else:
            yield self._report(customer, customer.subject_keys, since)

    def _has_passed(self, since: datetime, period: timedelta) -> bool:
        return self._grace.now - since >= period

    def _detach(
        self, customer: ObservedCustomer, keys: tuple[str, ...], since: datetime, marks: dict[str, str]
    ) -> Change:
        if customer.active_subscription:
            return self._blocked(
                customer, keys, f"{_subscription_of(customer)}, so its subject keys cannot change"
            )
        self._freed |= set(keys) - {customer.key}
        leaving = set(keys)
        rest = tuple(key for key in customer.subject_keys if key not in leaving)
        days = self._grace.detach_after.days
        by_key = f" Usage under the customer's own key {customer.key!r} stays attributed." * (
            customer.key in keys
        )
        return Change(
            ChangeKind.DETACH_SUBJECTS,
            customer.key,
            keys,
            f"no source has named it since {since:%Y-%m-%d}, {days} or more days ago (detach_after).{by_key}",
            customer.id,
            EntityState(None, customer.subject_keys, _marks_of(customer, marks or (ORPHANED_AT,))),
            EntityState(None, rest, dict(marks)),
        )

    def _delete(self, customer: ObservedCustomer, since: datetime) -> Change:
        if customer.active_subscription:
            return self._blocked(
                customer, customer.subject_keys, f"{_subscription_of(customer)}, so it cannot be deleted"
            )
        if obstacle := self._undeletable.get(customer.id):
            why = f"syncd does not delete it: {obstacle.reason}"
            return self._blocked(customer, customer.subject_keys, why, settled=obstacle.settled)
        self._freed |= {*customer.subject_keys, customer.key or ""}
        return Change(
            ChangeKind.DELETE_CUSTOMER,
            customer.key,
            customer.subject_keys,
            f"no source has named it since {since:%Y-%m-%d} (delete_after)",
            customer.id,
            EntityState(customer.name, customer.subject_keys, _marks_of(customer, (ORPHANED_AT,))),
        )

    def _blocked(
        self, customer: ObservedCustomer, keys: tuple[str, ...], why: str, *, settled: bool = True
    ) -> Change:
        reason = (
            f"no source names it any more, but {why}. Resolve that, or add the principal to a source again"
        )
        return Change(ChangeKind.BLOCKED, customer.key, keys, reason, customer.id, settled=settled)

    def _report(self, customer: ObservedCustomer, keys: tuple[str, ...], since: datetime | None) -> Change:
        if since is None:
            reason = "no source names it any more; it is marked once one of the customer's 16 marks is free"
        else:
            reason = (
                f"no source has named it since {since:%Y-%m-%d}; {self._next_step(customer, keys, since)}"
            )
        return Change(ChangeKind.ORPHANED, customer.key, keys, reason, customer.id)

    def _next_step(self, customer: ObservedCustomer, keys: tuple[str, ...], since: datetime) -> str:
        grace, managed = self._grace, self._managed_keys(customer)
        if set(keys) & set(managed) and not self._has_passed(since, grace.detach_after):
            return f"it will be detached on {since + grace.detach_after:%Y-%m-%d}"
        if grace.delete_after is None:
            return "left alone"
        if managed != customer.subject_keys:
            return "not deleted, because it carries subjects that syncd does not manage"
        return f"it will be deleted on {since + grace.delete_after:%Y-%m-%d}"

    def _detach_notice(self, keys: tuple[str, ...]) -> str:
        when = self._grace.now + self._grace.detach_after
        return (
            f"no source names it any more; it will be detached on {when:%Y-%m-%d}"
            if keys
            else "no source names it any more"
        )


def _subscription_of(customer: ObservedCustomer) -> str:
    return f"it has an active subscription ({customer.active_subscription})"


def _marking(
    kind: ChangeKind,
    customer: ObservedCustomer,
    keys: tuple[str, ...],
    reason: str,
    metadata: dict[str, str],
) -> Change:
    before = EntityState(metadata=_marks_of(customer, metadata))
    return Change(kind, customer.key, keys, reason, customer.id, before, EntityState(metadata=dict(metadata)))


def _marks_of(customer: ObservedCustomer, names: Iterable[str]) -> dict[str, str]:
    return {name: customer.metadata[name] for name in names if name in customer.metadata}
