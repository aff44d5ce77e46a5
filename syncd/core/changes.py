"""The plan: an ordered list of changes, each with its reason and the state before and after."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from syncd.core.model import NO_DETAILS, CustomerDetails
from syncd.core.unbilled import UnbilledUsage

PLAN_VERSION = 2
"""Counts up when the shape of a plan as JSON changes."""


class ChangeKind(StrEnum):
    """What a change is, in the order in which changes are carried out; the last three are only reported."""

    ADOPT_CUSTOMER = "adopt-customer"
    """Our marks on a customer that people made with exactly our key; nothing else of it."""
    UNMARK_ORPHANED = "unmark-orphaned"
    MOVE_SUBJECTS = "move-subjects"
    """Off one customer of ours; a later creation or attachment puts them on the other."""
    RETIRE_CUSTOMER = "retire-customer"
    """Deletes a customer of ours whose own key is a subject that moves (`syncd.planning.moves`)."""
    DETACH_SUBJECTS = "detach-subjects"
    CREATE_CUSTOMER = "create-customer"
    ATTACH_SUBJECTS = "attach-subjects"
    RENAME_CUSTOMER = "rename-customer"
    UPSERT_SUBJECT = "upsert-subject"
    MARK_ORPHANED = "mark-orphaned"
    DELETE_CUSTOMER = "delete-customer"
    DELETE_SUBJECT = "delete-subject"
    """The subject entity of a subject that is on no customer any more."""
    BLOCKED = "blocked"
    """Wanted, but must not or cannot be done; drift that a person has to end."""
    UNMANAGED = "unmanaged"
    """Done already by someone else; a clean result."""
    ORPHANED = "orphaned"
    """Ours, but no source names it any more; left alone, or still within its grace period."""


REPORTED_ONLY = frozenset({ChangeKind.BLOCKED, ChangeKind.UNMANAGED, ChangeKind.ORPHANED})
REMOVALS = frozenset(
    {
        ChangeKind.MARK_ORPHANED,
        ChangeKind.DETACH_SUBJECTS,
        ChangeKind.DELETE_CUSTOMER,
        ChangeKind.DELETE_SUBJECT,
    }
)
"""What follows from a principal being gone; a source that is empty or only partly read causes none."""

DELETIONS = frozenset({ChangeKind.RETIRE_CUSTOMER, ChangeKind.DELETE_CUSTOMER})
"""What deletes a customer."""

_RANK = {kind: rank for rank, kind in enumerate(ChangeKind)}


@dataclass(frozen=True, slots=True)
class EntityState:
    """What of an entity a change is about; None stands for "not part of this change"."""

    name: str | None = None
    subject_keys: tuple[str, ...] | None = None
    metadata: Mapping[str, object] | None = None
    details: CustomerDetails = NO_DETAILS

    def to_json(self) -> dict[str, object]:
        """Return the parts that are set."""
        parts: dict[str, object] = {}
        if self.name is not None:
            parts["name"] = self.name
        if self.subject_keys is not None:
            parts["subject_keys"] = list(self.subject_keys)
        if self.metadata is not None:
            parts["metadata"] = dict(self.metadata)
        if details := self.details.to_json():
            parts["details"] = details
        return parts


@dataclass(frozen=True, slots=True)
class MovedUsage:
    """Usage that a change moves, takes away, or (blocked) leaves unbilled: `events` since that moment."""

    events: int | float
    since: str

    def to_json(self) -> dict[str, object]:
        """Return it as it stands in a plan."""
        return {"events": self.events, "since": self.since}


@dataclass(frozen=True, slots=True)
class Change:
    """One step of a plan.

    `subject_keys` are the subjects it is about, not all of the customer's. `customer_id` is the id
    in the metering API, None for a customer that does not exist yet. `to_customer_key` is set for moves
    and retirements.
    """

    kind: ChangeKind
    customer_key: str | None
    subject_keys: tuple[str, ...]
    reason: str
    customer_id: str | None = None
    before: EntityState | None = None
    after: EntityState | None = None
    to_customer_key: str | None = None
    usage: MovedUsage | None = None

    @property
    def actionable(self) -> bool:
        """Tell whether applying the plan does something about it."""
        return self.kind not in REPORTED_ONLY

    def to_json(self) -> dict[str, object]:
        """Return the change as it stands in ``syncd plan --json``."""
        document: dict[str, object] = {
            "kind": str(self.kind),
            "customer_key": self.customer_key,
            "customer_id": self.customer_id,
            "subject_keys": list(self.subject_keys),
            "reason": self.reason,
            "before": self.before.to_json() if self.before else None,
            "after": self.after.to_json() if self.after else None,
        }
        if self.to_customer_key is not None:
            document["to_customer_key"] = self.to_customer_key
        if self.usage is not None:
            document["usage"] = self.usage.to_json()
        return document

    def identity(self) -> dict[str, object]:
        """Return what makes two changes the same: all but words, usage, and the moment of a mark."""
        document = self.to_json()
        del document["reason"]
        document.pop("usage", None)
        if self.kind is ChangeKind.MARK_ORPHANED and self.after:
            document["after"] = {"metadata": sorted(self.after.metadata or ())}
        return document


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered changes; those that are only reported come last.

    `notes` tell what held changes back (an empty source, a guard). `unbilled` is the usage that no
    customer is charged for, None where it was not looked up.
    """

    owner_id: str
    policy: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    unbilled: UnbilledUsage | None = field(default=None, compare=False)

    @property
    def actionable(self) -> tuple[Change, ...]:
        """Return the changes that applying carries out, in order."""
        return tuple(change for change in self.changes if change.actionable)

    def of(self, kind: ChangeKind) -> tuple[Change, ...]:
        """Return the changes of one kind, in order."""
        return tuple(change for change in self.changes if change.kind is kind)

    def noting(self, note: str) -> Plan:
        """Return the plan with a further note."""
        return replace(self, notes=(*self.notes, note))

    @property
    def in_sync(self) -> bool:
        """Tell whether there is nothing to do and nothing blocked; unmanaged and orphaned are clean."""
        return not any(change.actionable or change.kind is ChangeKind.BLOCKED for change in self.changes)

    def summary(self) -> dict[str, int]:
        """Return the number of changes of each kind, zero included."""
        counts = Counter(change.kind for change in self.changes)
        return {str(kind): counts[kind] for kind in ChangeKind}

    def checksum(self) -> str:
        """Return the same text for two plans that would change the same, whatever they report."""
        identity = [self.owner_id, self.policy, [change.identity() for change in self.actionable]]
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    def to_json(self) -> dict[str, object]:
        """Return the plan as ``syncd plan --json`` prints it."""
        return {
            "version": PLAN_VERSION,
            "owner_id": self.owner_id,
            "policy": self.policy,
            "in_sync": self.in_sync,
            "checksum": self.checksum(),
            "notes": list(self.notes),
            "summary": self.summary(),
            "unbilled": self.unbilled.to_json() if self.unbilled else None,
            "changes": [change.to_json() for change in self.changes],
        }


def ordered(changes: list[Change]) -> tuple[Change, ...]:
    """Return the changes in the order of their kinds; within a kind as they were."""
    # Customers come before subject entities: a server with the subject hook makes a customer of its
    # own for a subject that has none yet. What frees a subject comes before what takes it.
    return tuple(sorted(changes, key=lambda change: _RANK[change.kind]))


# MERGED: What became of each change of a plan.


class Status(StrEnum):
    """What became of one change."""

    DONE = "done"
    UNCHANGED = "unchanged"
    """It was so already when we came to write it."""
    BLOCKED = "blocked"
    SKIPPED = "skipped"
    """It depends on a change that was blocked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A change, what became of it, and (unless done) why."""

    change: Change
    status: Status
    detail: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the outcome as it stands in ``syncd apply --json``."""
        return {"status": str(self.status), "detail": self.detail, "change": self.change.to_json()}


def count(outcomes: tuple[Outcome, ...]) -> dict[str, int]:
    """Return the number of outcomes of each status, zero included."""
    counts = Counter(outcome.status for outcome in outcomes)
    return {str(status): counts[status] for status in Status}
