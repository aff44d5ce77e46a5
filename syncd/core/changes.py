"""The plan, an ordered list of changes, and the outcome of each change once it is applied.

A change carries its reason and the state before and after.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from syncd.core.model import NO_DETAILS, CustomerDetails
from syncd.core.ownership import is_blank_subject
from syncd.core.unbilled import UnbilledUsage

PLAN_VERSION = 2
"""Version of the JSON shape of a plan."""


class ChangeKind(StrEnum):
    """Kinds of changes, in the order in which they are applied. The last three are only reported."""

    ADOPT_CUSTOMER = "adopt-customer"
    """Add ownership metadata, and nothing else, to a customer that a person created with the very key."""
    UNMARK_ORPHANED = "unmark-orphaned"
    MOVE_SUBJECTS = "move-subjects"
    """Remove subjects from one managed customer; a later creation or attachment adds them to the other."""
    DETACH_SUBJECTS = "detach-subjects"
    CREATE_CUSTOMER = "create-customer"
    ATTACH_SUBJECTS = "attach-subjects"
    RENAME_CUSTOMER = "rename-customer"
    UPSERT_SUBJECT = "upsert-subject"
    MARK_ORPHANED = "mark-orphaned"
    DELETE_CUSTOMER = "delete-customer"
    DELETE_SUBJECT = "delete-subject"
    """Delete the subject entity of a subject that no customer carries any more."""
    BLOCKED = "blocked"
    """Wanted, but not allowed or not possible; drift that a person has to resolve."""
    UNMANAGED = "unmanaged"
    """Already done by someone else; counts as in sync."""
    ORPHANED = "orphaned"
    """Managed, but no source names it any more; left alone, or still within its grace period."""


REPORTED_ONLY = frozenset({ChangeKind.BLOCKED, ChangeKind.UNMANAGED, ChangeKind.ORPHANED})
REMOVALS = frozenset(
    {
        ChangeKind.MARK_ORPHANED,
        ChangeKind.DETACH_SUBJECTS,
        ChangeKind.DELETE_CUSTOMER,
        ChangeKind.DELETE_SUBJECT,
    }
)
"""Changes caused by a missing principal; a source that is empty or only partly read causes none."""

_RANK = {kind: rank for rank, kind in enumerate(ChangeKind)}


class Cause(StrEnum):
    """Why changes are blocked, where one cause can block many; the others have a reason of their own."""

    SUBSCRIPTION = "subscription"
    NOT_MANAGED = "not-managed"
    ELSEWHERE = "elsewhere"
    """A managed customer carries the subject; a move is possible."""
    ADOPTED = "adopted"
    POLICY = "policy"

    @property
    def heading(self) -> str:
        """Return what is the case."""
        return _TITLES[self]

    @property
    def cure(self) -> str:
        """Return what a person can do."""
        return _CURES[self]


_TITLES = {
    Cause.SUBSCRIPTION: "Active subscription: the customer's subjects cannot change",
    Cause.NOT_MANAGED: "The customer belongs to someone else",
    Cause.ELSEWHERE: "Another customer has the subject",
    Cause.ADOPTED: "An adopted customer has the subject, and keeps it",
    Cause.POLICY: "The policy create-only changes no customer that exists",
}
_CURES = {
    Cause.SUBSCRIPTION: "Attach the subject by hand between two subscriptions, or send this usage under a"
    " subject that the customer carries, such as its key.",
    Cause.NOT_MANAGED: "Attach the subject by hand, or use another customer key. A customer without an owner"
    " can be adopted with --adopt; it keeps its name.",
    Cause.ELSEWHERE: "Pass --allow-move, or move the subject by hand. Usage that is not invoiced yet moves"
    " too.",
    Cause.ADOPTED: "Move the subject by hand.",
    Cause.POLICY: "Use the policy upsert-only, or attach the subjects by hand.",
}


@dataclass(frozen=True, slots=True)
class EntityState:
    """The fields of an entity that a change concerns; None means "not part of this change"."""

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
    """Usage that a change moves, removes, or (if blocked) leaves unbilled: `events` since `since`."""

    events: int | float
    since: str

    def to_json(self) -> dict[str, object]:
        """Return it as a part of a plan."""
        return {"events": self.events, "since": self.since}


@dataclass(frozen=True, slots=True)
class Change:
    """One step of a plan.

    `subject_keys` are the subjects that change, not all of the customer's. `customer_id` is the id
    in the metering API, None for a customer that does not exist yet. `to_customer_key` is set for moves.
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
    settled: bool = False
    """Blocked by decision: a subscription, or a customer that syncd does not manage."""
    names: tuple[str, ...] = ()
    """The principals of the subjects, in their order, as far as they are known."""
    cause: Cause | None = None
    fact: str = ""
    """With `cause`: what is particular to this change, such as the subscription."""

    @property
    def actionable(self) -> bool:
        """Return whether applying the plan writes anything for it."""
        return self.kind not in REPORTED_ONLY

    @property
    def is_drift(self) -> bool:
        """Return whether it is to do, or blocked in a way that a person has to resolve."""
        return self.actionable or (self.kind is ChangeKind.BLOCKED and not self.settled)

    @property
    def is_first_upsert(self) -> bool:
        """Return whether it writes a subject entity that is missing or that only the server has written.

        OpenMeter creates a blank entity with each customer, so this completes a creation, perhaps one of an
        interrupted run. It is no update of what exists.
        """
        if self.kind is not ChangeKind.UPSERT_SUBJECT:
            return False
        before = self.before
        return before is None or is_blank_subject(self.subject_keys[0], before.name, before.metadata or {})

    def to_json(self) -> dict[str, object]:
        """Return the change as in ``syncd plan --output json``."""
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
        if self.settled:
            document["settled"] = True
        if self.names:
            document["names"] = list(self.names)
        if self.cause is not None:
            document["cause"] = str(self.cause)
            document["fact"] = self.fact
        return document

    def identity(self) -> dict[str, object]:
        """Return what makes two changes equal: all but words, usage, and the time in ``orphaned-at``."""
        document = self.to_json()
        for name in ("reason", "usage", "names", "cause", "fact"):
            document.pop(name, None)
        if self.kind is ChangeKind.MARK_ORPHANED and self.after:
            document["after"] = {"metadata": sorted(self.after.metadata or ())}
        return document


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered changes; those that are only reported come last.

    `notes` explain why changes were withheld (an empty source, a guard). `unbilled` is the usage that no
    customer is charged for, None if it was not looked up.
    """

    owner_id: str
    policy: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    unbilled: UnbilledUsage | None = field(default=None, compare=False)

    @property
    def actionable(self) -> tuple[Change, ...]:
        """Return the changes that applying makes, in order."""
        return tuple(change for change in self.changes if change.actionable)

    def of(self, kind: ChangeKind) -> tuple[Change, ...]:
        """Return the changes of one kind, in order."""
        return tuple(change for change in self.changes if change.kind is kind)

    def noting(self, note: str) -> Plan:
        """Return the plan with one more note."""
        return replace(self, notes=(*self.notes, note))

    @property
    def in_sync(self) -> bool:
        """Return whether nothing is to do and nothing is blocked.

        What is unmanaged, orphaned, or blocked by decision (`Change.settled`) counts as in sync.
        """
        return not any(change.is_drift for change in self.changes)

    def summary(self) -> dict[str, int]:
        """Return the number of changes of each kind, zero included."""
        counts = Counter(change.kind for change in self.changes)
        return {str(kind): counts[kind] for kind in ChangeKind}

    def checksum(self) -> str:
        """Return a digest of the actionable changes; what a plan only reports does not matter."""
        identity = [self.owner_id, self.policy, [change.identity() for change in self.actionable]]
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    def to_json(self) -> dict[str, object]:
        """Return the plan as ``syncd plan --output json`` prints it."""
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
    """Return the changes sorted by kind; the order within a kind stays."""
    # Customers come before subject entities: a server with the subject hook creates a customer of its
    # own for a subject that has none yet. Changes that free a subject come before those that take it.
    return tuple(sorted(changes, key=lambda change: _RANK[change.kind]))


class Status(StrEnum):
    """How applying one change ended."""

    DONE = "done"
    UNCHANGED = "unchanged"
    """The wanted state was already there at the time of writing."""
    BLOCKED = "blocked"
    SKIPPED = "skipped"
    """The change depends on one that was blocked."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A change, its status, and (unless done) the reason."""

    change: Change
    status: Status
    detail: str = ""

    def to_json(self) -> dict[str, object]:
        """Return the outcome as in ``syncd apply --output json``."""
        return {"status": str(self.status), "detail": self.detail, "change": self.change.to_json()}


def count(outcomes: tuple[Outcome, ...]) -> dict[str, int]:
    """Return the number of outcomes of each status, zero included."""
    counts = Counter(outcome.status for outcome in outcomes)
    return {str(status): counts[status] for status in Status}
