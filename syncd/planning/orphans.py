"""What is ours in the metering API but named by no source any more: marked, then detached, then deleted.

These are the changes of policy ``sync``; the other policies turn them into reports (`syncd.core.policy`).

=============================  =====================================================================
a customer of ours             then
=============================  =====================================================================
no source names it at all      mark; after `detach_after` detach the subjects that are ours; after
                               `delete_after` (never by default) delete it
a source names it              mark each subject of ours that is gone; after `detach_after` detach it
a source names it *again*      take the mark back, so that the grace period starts anew another time
=============================  =====================================================================

Keys that a `Problem` is about are in doubt, not gone. With an active subscription the server refuses:
blocked. An adopted customer loses nothing, and one that carries subjects of other people is not deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from syncd.core import lifecycle_metadata
from syncd.core.changes import Change, ChangeKind, EntityState
from syncd.core.model import DesiredState, ObservedCustomer, ObservedState
from syncd.core.ownership import ADOPTED, is_managed

NOTHING_KEPT: Mapping[str, str] = {}
_OUR_PREFIXES = ("consumer:", "application:")


@dataclass(frozen=True, slots=True)
class Grace:
    """How long what is gone stays; `delete_after` None deletes no customer, both count from the mark."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    detach_after: timedelta = timedelta(days=40)
    delete_after: timedelta | None = None


def orphan_changes(
    desired: DesiredState,
    observed: ObservedState,
    owner_id: str,
    grace: Grace,
    kept: Mapping[str, str] = NOTHING_KEPT,
    frozen: Collection[str] = frozenset(),
) -> Iterator[Change]:
    """Yield what becomes of each customer and subject of ours that no source names.

    `kept` names customers that must not be deleted: id -> why. Of those whose id is `frozen` nothing is said:
    the metering API refuses any change of them, which the plan reports already.
    """
    lifecycle = _Lifecycle(desired, observed, owner_id, grace, kept)
    ours = (customer for customer in observed.customers if is_managed(customer.metadata, owner_id))
    moving = [customer for customer in ours if customer.id not in frozen and not lifecycle.at_rest(customer)]
    for customer in sorted(moving, key=lambda c: (c.key or "", c.id)):
        yield from lifecycle.customer(customer)
    yield from lifecycle.entities()


class _Lifecycle:
    def __init__(
        self,
        desired: DesiredState,
        observed: ObservedState,
        owner_id: str,
        grace: Grace,
        kept: Mapping[str, str],
    ) -> None:
        self._grace = grace
        self._kept = kept
        self._observed = observed
        self._wanted_customers = {customer.key for customer in desired.customers}
        self._wanted = {subject.key for customer in desired.customers for subject in customer.subjects}
        self._wanted |= desired.known
        for problem in desired.problems:
            self._wanted |= set(problem.subject_keys)
            self._wanted_customers |= {problem.customer_key} if problem.customer_key else set()
        entities = observed.subjects or ()
        self._entities = {entity.key for entity in entities if is_managed(entity.metadata, owner_id)}
        self._freed: set[str] = set()

    def at_rest(self, customer: ObservedCustomer) -> bool:
        """Tell whether a source names it, all that is ours on it too, and no mark says otherwise."""
        if customer.key not in self._wanted_customers and self._wanted.isdisjoint(customer.subject_keys):
            return False
        if not lifecycle_metadata.LIFECYCLE_KEYS.isdisjoint(customer.metadata):
            return False
        return self._wanted.issuperset(customer.subject_keys) or not self._ours_of(customer)

    def customer(self, customer: ObservedCustomer) -> Iterator[Change]:
        named = customer.key in self._wanted_customers
        if ADOPTED in customer.metadata:
            yield from self._adopted(customer)
        elif named or self._wanted.intersection(customer.subject_keys):
            yield from self._living(customer)
        else:
            yield from self._gone(customer)

    def entities(self) -> Iterator[Change]:
        """Yield the subject entities of ours that are gone and that no customer carries (after this plan)."""
        if not self._entities - self._wanted:
            return
        held = {
            key for customer in self._observed.customers for key in (*customer.subject_keys, customer.key)
        }
        for key in sorted(self._entities - self._wanted - (held - self._freed)):
            yield Change(
                ChangeKind.DELETE_SUBJECT, None, (key,), "no source names it and no customer carries it"
            )

    def _ours_of(self, customer: ObservedCustomer) -> tuple[str, ...]:
        # Subject keys that people attached by hand are theirs; ours are known by their form or their entity.
        return tuple(
            key
            for key in customer.subject_keys
            if key not in self._wanted and (key in self._entities or key.startswith(_OUR_PREFIXES))
        )

    def _living(self, customer: ObservedCustomer) -> Iterator[Change]:
        gone = self._ours_of(customer)
        marks = lifecycle_metadata.orphaned_subjects(customer.metadata)
        since = {
            key: marks[lifecycle_metadata.subject_digest(key)][1]
            for key in gone
            if lifecycle_metadata.subject_digest(key) in marks
        }
        fresh = lifecycle_metadata.newly_orphaned(
            customer.metadata, [k for k in gone if k not in since], self._grace.now
        )
        newly = {value.rpartition("-")[2] for value in fresh.values()}
        marked = tuple(key for key in gone if lifecycle_metadata.subject_digest(key) in newly)
        due = tuple(key for key in gone if key in since and self._over(since[key], self._grace.detach_after))
        stale = {
            slot: lifecycle_metadata.CLEARED
            for name, (slot, _) in marks.items()
            if name not in {lifecycle_metadata.subject_digest(key) for key in gone}
        }
        if lifecycle_metadata.customer_orphaned_since(customer.metadata):
            stale[lifecycle_metadata.ORPHANED_AT] = lifecycle_metadata.CLEARED
        if stale:
            yield _marking(ChangeKind.UNMARK_ORPHANED, customer, (), "a source names it again", stale)
        if marked:
            yield _marking(ChangeKind.MARK_ORPHANED, customer, marked, self._will_detach(marked), fresh)
        if due:
            freed = {
                marks[lifecycle_metadata.subject_digest(key)][0]: lifecycle_metadata.CLEARED for key in due
            }
            yield self._detach(customer, due, min(since[key] for key in due), freed)
        waiting = tuple(key for key in gone if key not in marked and key not in due)
        if waiting:
            yield self._waiting(
                customer, waiting, max((since[k] for k in waiting if k in since), default=None)
            )

    def _adopted(self, customer: ObservedCustomer) -> Iterator[Change]:
        """Report only: which of its subjects people attached themselves cannot be told."""
        if gone := self._ours_of(customer):
            reason = "no source names it any more; left alone, since people made this customer"
            yield Change(ChangeKind.ORPHANED, customer.key, gone, reason, customer.id)

    def _gone(self, customer: ObservedCustomer) -> Iterator[Change]:
        since = lifecycle_metadata.customer_orphaned_since(customer.metadata)
        ours = self._ours_of(customer)
        if since is None:
            metadata = {lifecycle_metadata.ORPHANED_AT: lifecycle_metadata.timestamp(self._grace.now)}
            reason = self._will_detach(ours)
            yield _marking(ChangeKind.MARK_ORPHANED, customer, customer.subject_keys, reason, metadata)
            return
        delete_after = self._grace.delete_after
        if delete_after is not None and self._over(since, delete_after) and ours == customer.subject_keys:
            yield self._delete(customer, since)
        elif ours and self._over(since, self._grace.detach_after):
            yield self._detach(customer, ours, since, {})
        else:
            yield self._waiting(customer, customer.subject_keys, since)

    def _over(self, since: datetime, period: timedelta) -> bool:
        return self._grace.now - since >= period

    def _detach(
        self, customer: ObservedCustomer, keys: tuple[str, ...], since: datetime, marks: dict[str, str]
    ) -> Change:
        if customer.active_subscription:
            return self._refused(customer, keys, f"{_paying(customer)}, so its subject keys cannot change")
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
            f"no source names it since {since:%Y-%m-%d}, more than {days} days ago (detach_after).{by_key}",
            customer.id,
            EntityState(
                None, customer.subject_keys, _marks_of(customer, marks or (lifecycle_metadata.ORPHANED_AT,))
            ),
            EntityState(None, rest, dict(marks)),
        )

    def _delete(self, customer: ObservedCustomer, since: datetime) -> Change:
        if customer.active_subscription:
            return self._refused(
                customer, customer.subject_keys, f"{_paying(customer)}, so it cannot be deleted"
            )
        if why := self._kept.get(customer.id):
            return self._refused(customer, customer.subject_keys, f"it is not deleted, since {why}")
        self._freed |= {*customer.subject_keys, customer.key or ""}
        return Change(
            ChangeKind.DELETE_CUSTOMER,
            customer.key,
            customer.subject_keys,
            f"no source names it since {since:%Y-%m-%d} (delete_after)",
            customer.id,
            EntityState(
                customer.name, customer.subject_keys, _marks_of(customer, (lifecycle_metadata.ORPHANED_AT,))
            ),
        )

    def _refused(self, customer: ObservedCustomer, keys: tuple[str, ...], why: str) -> Change:
        reason = f"no source names it any more, but {why}. End that, or name the principal again"
        return Change(ChangeKind.BLOCKED, customer.key, keys, reason, customer.id)

    def _waiting(self, customer: ObservedCustomer, keys: tuple[str, ...], since: datetime | None) -> Change:
        if since is None:
            reason = "no source names it any more; it is marked as soon as one of the 16 marks is free"
        else:
            reason = f"no source names it since {since:%Y-%m-%d}; {self._next(customer, keys, since)}"
        return Change(ChangeKind.ORPHANED, customer.key, keys, reason, customer.id)

    def _next(self, customer: ObservedCustomer, keys: tuple[str, ...], since: datetime) -> str:
        grace, ours = self._grace, self._ours_of(customer)
        if set(keys) & set(ours) and not self._over(since, grace.detach_after):
            return f"to be detached on {since + grace.detach_after:%Y-%m-%d}"
        if grace.delete_after is None:
            return "left alone"
        if ours != customer.subject_keys:
            return "kept, since it carries subjects that are not ours"
        return f"to be deleted on {since + grace.delete_after:%Y-%m-%d}"

    def _will_detach(self, keys: tuple[str, ...]) -> str:
        when = self._grace.now + self._grace.detach_after
        return (
            f"no source names it any more; to be detached on {when:%Y-%m-%d}"
            if keys
            else ("no source names it any more")
        )


def _paying(customer: ObservedCustomer) -> str:
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
