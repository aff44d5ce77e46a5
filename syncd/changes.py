"""The plan: an ordered list of changes, each with its reason and the state before and after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class ChangeKind(StrEnum):
    """What a change is. The first four are carried out, the last three only reported."""

    CREATE_CUSTOMER = "create-customer"
    ATTACH_SUBJECTS = "attach-subjects"
    RENAME_CUSTOMER = "rename-customer"
    UPSERT_SUBJECT = "upsert-subject"
    BLOCKED = "blocked"
    """Wanted, but must not or cannot be done; drift that a person has to end."""
    UNMANAGED = "unmanaged"
    """Done already by someone else; a clean result."""
    ORPHANED = "orphaned"
    """Ours, but no source names it any more; left alone."""


REPORTED_ONLY = frozenset({ChangeKind.BLOCKED, ChangeKind.UNMANAGED, ChangeKind.ORPHANED})


@dataclass(frozen=True, slots=True)
class State:
    """What of an entity a change is about; None stands for "not part of this change"."""

    name: str | None = None
    subject_keys: tuple[str, ...] | None = None
    metadata: Mapping[str, object] | None = None

    def to_json(self) -> dict[str, object]:
        """Return the parts that are set."""
        parts: dict[str, object] = {}
        if self.name is not None:
            parts["name"] = self.name
        if self.subject_keys is not None:
            parts["subject_keys"] = list(self.subject_keys)
        if self.metadata is not None:
            parts["metadata"] = dict(self.metadata)
        return parts


@dataclass(frozen=True, slots=True)
class Change:
    """One step of a plan.

    `subject_keys` are the subjects it is about, not all of the customer's. `customer_id` is the id
    in the metering API, None for a customer that does not exist yet.
    """

    kind: ChangeKind
    customer_key: str | None
    subject_keys: tuple[str, ...]
    reason: str
    customer_id: str | None = None
    before: State | None = None
    after: State | None = None

    @property
    def actionable(self) -> bool:
        """Tell whether applying the plan does something about it."""
        return self.kind not in REPORTED_ONLY

    def to_json(self) -> dict[str, object]:
        """Return the change as it stands in ``syncd plan --json``."""
        return {
            "kind": str(self.kind),
            "customer_key": self.customer_key,
            "customer_id": self.customer_id,
            "subject_keys": list(self.subject_keys),
            "reason": self.reason,
            "before": self.before.to_json() if self.before else None,
            "after": self.after.to_json() if self.after else None,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered changes; those that are only reported come last."""

    owner_id: str
    policy: str
    changes: tuple[Change, ...]

    @property
    def actionable(self) -> tuple[Change, ...]:
        """Return the changes that applying carries out, in order."""
        return tuple(change for change in self.changes if change.actionable)

    def of(self, kind: ChangeKind) -> tuple[Change, ...]:
        """Return the changes of one kind, in order."""
        return tuple(change for change in self.changes if change.kind is kind)

    @property
    def in_sync(self) -> bool:
        """Tell whether there is nothing to do and nothing blocked; unmanaged and orphaned are clean."""
        return not any(change.actionable or change.kind is ChangeKind.BLOCKED for change in self.changes)

    def summary(self) -> dict[str, int]:
        """Return the number of changes of each kind, zero included."""
        counts = Counter(change.kind for change in self.changes)
        return {str(kind): counts[kind] for kind in ChangeKind}

    def to_json(self) -> dict[str, object]:
        """Return the plan as ``syncd plan --json`` prints it; `version` counts up when its shape changes."""
        return {
            "version": 1,
            "owner_id": self.owner_id,
            "policy": self.policy,
            "in_sync": self.in_sync,
            "summary": self.summary(),
            "changes": [change.to_json() for change in self.changes],
        }
