"""What may be done: each policy takes the changes that would make the worlds alike and gives those allowed.

===============  ===========  ====================  ==================
a change         create-only  upsert-only           sync
===============  ===========  ====================  ==================
create           yes          yes                   yes
attach           blocked      yes                   yes
rename           no           yes                   yes
upsert subject   new ones     yes                   yes
adopt            no           with --adopt          with --adopt
move             blocked      with --allow-move     with --allow-move
retire           blocked      with --allow-retire   with --allow-retire
unmark           no           yes                   yes
mark, detach,    reported     reported              after their grace
delete           (orphaned)   (orphaned)            periods
===============  ===========  ====================  ==================

Whether moves, retirements and adoptions are planned at all is asked of the planner
(`syncd.planning.plan.PlanOptions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from syncd.core.changes import REMOVALS, Change, ChangeKind

Policy = Literal["create-only", "upsert-only", "sync"]
Changes = Sequence[Change]

_CREATE_ONLY_REASON = (
    "policy create-only never changes a customer that exists; use policy upsert-only to attach it"
)


def create_only(changes: Changes) -> list[Change]:
    """Only what does not exist yet is made."""
    kept: list[Change] = []
    withheld = {key for c in changes if c.kind is ChangeKind.ATTACH_SUBJECTS for key in c.subject_keys}
    for change in without_removals(changes):
        match change.kind:
            case ChangeKind.RENAME_CUSTOMER | ChangeKind.UNMARK_ORPHANED:
                continue
            case ChangeKind.UPSERT_SUBJECT if change.before or set(change.subject_keys) & withheld:
                continue
            case ChangeKind.ATTACH_SUBJECTS:
                reason = _CREATE_ONLY_REASON
                kept.append(replace(change, kind=ChangeKind.BLOCKED, reason=reason, before=None, after=None))
            case _:
                kept.append(change)
    return kept


def upsert_only(changes: Changes) -> list[Change]:
    """Everything but removals."""
    return without_removals(changes)


def sync(changes: Changes) -> list[Change]:
    """Everything."""
    return list(changes)


POLICIES: dict[Policy, Callable[[Changes], list[Change]]] = {
    "create-only": create_only,
    "upsert-only": upsert_only,
    "sync": sync,
}


def without_removals(changes: Changes, why: str = "left alone") -> list[Change]:
    """Turn what marks, detaches and deletes into one report for each customer."""
    gone: dict[str | None, list[Change]] = {}
    kept: list[Change] = []
    for change in changes:
        if change.kind in REMOVALS or change.kind is ChangeKind.ORPHANED:
            if change.kind is not ChangeKind.DELETE_SUBJECT:
                gone.setdefault(change.customer_id, []).append(change)
        else:
            kept.append(change)
    for reports in gone.values():
        first = reports[0]
        keys = tuple(dict.fromkeys(key for report in reports for key in report.subject_keys))
        reason = f"no source names it any more; {why}"
        kept.append(Change(ChangeKind.ORPHANED, first.customer_key, keys, reason, first.customer_id))
    return kept
