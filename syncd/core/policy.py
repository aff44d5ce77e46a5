"""Policies: each takes the changes that would end all drift and returns those that it allows.

===============  ===========  ====================  ==================
a change         create-only  upsert-only           sync
===============  ===========  ====================  ==================
create           yes          yes                   yes
attach           blocked      yes                   yes
rename           no           yes                   yes
upsert subject   blank ones   yes                   yes
adopt            no           with --adopt          with --adopt
move             blocked      with --allow-move     with --allow-move
unmark           no           yes                   yes
mark, detach,    reported     reported              after their grace
delete           (orphaned)   (orphaned)            periods
===============  ===========  ====================  ==================

The planner decides whether moves and adoptions are planned at all
(`syncd.planning.plan.PlanOptions`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from syncd.core.changes import REMOVALS, Cause, Change, ChangeKind

Policy = Literal["create-only", "upsert-only", "sync"]
Changes = Sequence[Change]

_CREATE_ONLY_REASON = (
    "policy create-only never changes a customer that exists; use policy upsert-only to attach it"
)


def create_only(changes: Changes) -> list[Change]:
    """Allow creations; block or drop changes to customers that exist."""
    allowed: list[Change] = []
    withheld = {key for c in changes if c.kind is ChangeKind.ATTACH_SUBJECTS for key in c.subject_keys}
    for change in without_removals(changes):
        match change.kind:
            case ChangeKind.RENAME_CUSTOMER | ChangeKind.UNMARK_ORPHANED:
                continue
            case ChangeKind.UPSERT_SUBJECT if (
                not change.is_first_upsert or set(change.subject_keys) & withheld
            ):
                continue
            case ChangeKind.ATTACH_SUBJECTS:
                reason = _CREATE_ONLY_REASON
                blocked = replace(
                    change,
                    kind=ChangeKind.BLOCKED,
                    reason=reason,
                    before=None,
                    after=None,
                    cause=Cause.POLICY,
                )
                allowed.append(blocked)
            case _:
                allowed.append(change)
    return allowed


def upsert_only(changes: Changes) -> list[Change]:
    """Allow everything but removals."""
    return without_removals(changes)


def sync(changes: Changes) -> list[Change]:
    """Allow everything."""
    return list(changes)


POLICIES: dict[Policy, Callable[[Changes], list[Change]]] = {
    "create-only": create_only,
    "upsert-only": upsert_only,
    "sync": sync,
}


def without_removals(changes: Changes, why: str = "left alone") -> list[Change]:
    """Replace all removals by one report for each customer; `why` ends its reason."""
    removals: dict[str | None, list[Change]] = {}
    allowed: list[Change] = []
    for change in changes:
        if change.kind in REMOVALS or change.kind is ChangeKind.ORPHANED:
            if change.kind is not ChangeKind.DELETE_SUBJECT:
                removals.setdefault(change.customer_id, []).append(change)
        else:
            allowed.append(change)
    for reports in removals.values():
        first = reports[0]
        keys = tuple(dict.fromkeys(key for report in reports for key in report.subject_keys))
        reason = f"no source names it any more; {why}"
        allowed.append(Change(ChangeKind.ORPHANED, first.customer_key, keys, reason, first.customer_id))
    return allowed
