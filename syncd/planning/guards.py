"""What stops a run before its first change: too much at once, and sources that are suddenly empty.

The idea and the numbers are octoDNS's: a plan that updates or removes more than 30 % of what is there
is more often a broken source than a decision. The message names the numbers, the limit and the flag.

- Updates are customers of ours that exist and change; the share is that of all customers of ours.
- Removals are subjects that are marked, detached, moved or deleted; the share is that of all subjects
  on customers of ours. A mark harms nobody, but it is where a broken source shows 40 days early.
- Fewer than `min_changes` of a kind pass whatever their share.
- `max_changes` is a cap on all changes of one run that no flag lifts, only the setting.
- Removals go by the clock (grace periods count from marks), so a clock that the metering API's Date
  contradicts by more than `max_clock_skew` turns them into reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from syncd.core.changes import REMOVALS, Change, ChangeKind, Plan, ordered
from syncd.core.errors import UnsafePlanError
from syncd.core.model import ObservedState
from syncd.core.ownership import is_managed
from syncd.core.policy import without_removals

_UPDATES = frozenset(
    {
        ChangeKind.ADOPT_CUSTOMER,
        ChangeKind.ATTACH_SUBJECTS,
        ChangeKind.RENAME_CUSTOMER,
        ChangeKind.UPSERT_SUBJECT,
    }
)
_REMOVALS = frozenset(
    {
        ChangeKind.MARK_ORPHANED,
        ChangeKind.DETACH_SUBJECTS,
        ChangeKind.MOVE_SUBJECTS,
        ChangeKind.RETIRE_CUSTOMER,
        ChangeKind.DELETE_CUSTOMER,
    }
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings `guards`."""

    max_update_percent: int = 30
    max_removal_percent: int = 30
    min_changes: int = 10
    max_changes: int | None = None
    max_clock_skew: timedelta | None = timedelta(minutes=5)


def removes(plan: Plan) -> bool:
    """Tell whether the plan marks, detaches or deletes what is gone."""
    return any(change.kind in REMOVALS for change in plan.changes)


def clock_in_doubt(skew: timedelta | None, bound: timedelta) -> str | None:
    """Return why this machine's clock must not decide about removals, None where it may.

    `skew` is how far it is ahead of the metering API's, None where that one does not tell the time.
    """
    if skew is None:
        return (
            "the metering API does not tell the time (no Date header), so this machine's clock is in doubt."
            " Have the proxy in between pass it on, or set guards.max_clock_skew to null"
        )
    if abs(skew) <= bound:
        return None
    return (
        f"this machine's clock is {_whole(abs(skew))} {'ahead of' if skew > timedelta(0) else 'behind'} the"
        f" metering API's, and the limit is {bound} (guards.max_clock_skew). Set it by NTP"
    )


def _whole(period: timedelta) -> timedelta:
    return timedelta(seconds=round(period.total_seconds()))


def withhold_for_clock(plan: Plan, why: str) -> Plan:
    """Turn removals into reports while the clock is in doubt: a wrong one ends grace periods too soon."""
    changes = ordered(without_removals(plan.changes, "left alone while the clock is in doubt"))
    note = f"nothing is marked, detached or deleted: {why}"
    return replace(plan, changes=changes, notes=(*plan.notes, note))


def withhold_removals(plan: Plan, empty_sources: Sequence[str]) -> Plan:
    """Turn removals into reports while a source is empty: a source that lost everything is a broken one."""
    if not empty_sources:
        return plan
    changes = ordered(without_removals(plan.changes, "left alone while a source is empty"))
    note = (
        f"{' and '.join(empty_sources)} named nobody at all, so nothing is marked, detached or deleted."
        " If that is right, pass --allow-empty"
    )
    return replace(plan, changes=changes, notes=(*plan.notes, note))


def danger(plan: Plan, observed: ObservedState, limits: Limits, *, force: bool = False) -> str | None:
    """Return why this plan must not be applied, None where it may."""
    total = len(plan.actionable)
    if limits.max_changes is not None and total > limits.max_changes:
        return (
            f"the plan has {total} changes, and guards.max_changes allows {limits.max_changes} in one run."
            " Raise that setting if this is right"
        )
    if force:
        return None
    ours = [customer for customer in observed.customers if is_managed(customer.metadata, plan.owner_id)]
    subjects = sum(len(customer.subject_keys) for customer in ours)
    updates, removals = _updated(plan.actionable), _removed(plan.actionable)
    return _too_many(
        "updates", len(updates), len(ours), "customers", limits.max_update_percent, limits
    ) or _too_many("removals", len(removals), subjects, "subjects", limits.max_removal_percent, limits)


def require_safe(plan: Plan, observed: ObservedState, limits: Limits, *, force: bool = False) -> None:
    """Raise UnsafePlanError where the plan must not be applied."""
    if why := danger(plan, observed, limits, force=force):
        raise UnsafePlanError(why)


def _updated(changes: Iterable[Change]) -> set[str]:
    return {change.customer_id for change in changes if change.kind in _UPDATES and change.customer_id}


def _removed(changes: Iterable[Change]) -> set[tuple[str | None, str]]:
    """Return the subjects concerned; a customer without subjects counts as one."""
    return {
        (change.customer_id, key)
        for change in changes
        if change.kind in _REMOVALS
        for key in change.subject_keys or ("",)
    }


def _too_many(what: str, number: int, existing: int, of: str, percent: int, limits: Limits) -> str | None:
    if number < limits.min_changes or number * 100 <= existing * percent:
        return None
    share = f"{number * 100 / existing:.1f} %" if existing else "all"
    return (
        f"too many {what}: {number} of {existing} {of} ({share}), and the limit is"
        f" {percent} % (guards.max_{what[:-1]}_percent) from {limits.min_changes} {what} on"
        f" (guards.min_changes). Look at `syncd plan`; if this is right, pass --force"
    )
