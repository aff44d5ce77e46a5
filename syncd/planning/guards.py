"""Guards: limits that stop a whole plan before its first change, or turn its removals into reports.

The idea and the numbers are octoDNS's: a plan that updates or removes more than 30 % of what exists is
more often caused by a broken source than intended. The message names the numbers, the limit and the flag.

- Updates are managed customers that exist and change, as a share of all managed customers. A subject entity
  that is missing, or that only the server has written, completes a creation: it is no update.
- Removals are subjects that are marked, detached, moved or deleted, as a share of all subjects on managed
  customers. A mark is harmless, but it reveals a broken source 40 days early.
- Fewer than `min_changes` of a kind pass, whatever their share.
- `max_changes` caps all changes of one run; only the setting lifts it, no flag does.
- Removals depend on the clock (grace periods count from marks). If the clock differs from the metering
  API's Date header by more than `max_clock_skew`, they become reports.
- If a source returns no principals, removals become reports as well, and one blocked change says why.

A run may have a scope: then its plan has only the changes of some principals, and never a removal. All
sources are still read in full. Otherwise shared subjects, keys in use and group members would be unknown, and
a scoped run would reach a different state from a full one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from openmeter_plugin.units import plural
from syncd.core.changes import REMOVALS, Change, ChangeKind, Plan, ordered
from syncd.core.errors import ScopeError, UnsafePlanError
from syncd.core.model import ObservedState, Principal
from syncd.core.ownership import is_managed
from syncd.core.policy import without_removals
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules

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
        ChangeKind.DELETE_CUSTOMER,
    }
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings below `guards`."""

    max_update_percent: int = 30
    max_removal_percent: int = 30
    min_changes: int = 10
    max_changes: int | None = None
    max_clock_skew: timedelta | None = timedelta(minutes=5)


def has_removals(plan: Plan) -> bool:
    """Return whether the plan marks, detaches or deletes orphans."""
    return any(change.kind in REMOVALS for change in plan.changes)


def clock_distrust_reason(skew: timedelta | None, bound: timedelta) -> str | None:
    """Return why this machine's clock cannot be trusted for removals; None if it can.

    `skew` is how far it is ahead of the metering API's clock; None if the API sends no time.
    """
    if skew is None:
        return (
            "the metering API sends no Date header, so this machine's clock cannot be checked. Have the proxy"
            " in between pass the header on, or set guards.max_clock_skew to null"
        )
    if abs(skew) <= bound:
        return None
    return (
        f"this machine's clock is {_rounded(abs(skew))} {'ahead of' if skew > timedelta(0) else 'behind'} the"
        f" metering API's, and the limit is {bound} (guards.max_clock_skew). Synchronize it with NTP"
    )


def _rounded(period: timedelta) -> timedelta:
    return timedelta(seconds=round(period.total_seconds()))


def withhold_for_clock(plan: Plan, why: str) -> Plan:
    """Turn removals into reports: a wrong clock would end grace periods too soon."""
    changes = ordered(without_removals(plan.changes, "left alone while the clock cannot be trusted"))
    note = f"nothing is marked, detached or deleted: {why}"
    return replace(plan, changes=changes, notes=(*plan.notes, note))


def withhold_for_empty_sources(plan: Plan, empty_sources: Sequence[str]) -> Plan:
    """Turn removals into reports if a source is empty: it is more likely broken than really empty.

    The reason is a blocked change, so that the run ends as one that a person has to look at.
    """
    orphaned = [c for c in plan.changes if c.kind in REMOVALS or c.kind is ChangeKind.ORPHANED]
    if not empty_sources or not orphaned:
        return plan
    number = len({change.customer_id or change.subject_keys for change in orphaned})
    reason = (
        f"{' and '.join(empty_sources)} returned no principals, and no source names"
        f" {plural(number, 'customer or subject', 'customers or subjects')} that syncd manages, so nothing is"
        " marked, detached or deleted. If the source is meant to be empty, set its may_be_empty, or pass"
        " --allow-empty for one run"
    )
    changes = without_removals(plan.changes, "left alone while a source is empty")
    return replace(plan, changes=ordered([*changes, Change(ChangeKind.BLOCKED, None, (), reason)]))


def unsafe_reason(plan: Plan, observed: ObservedState, limits: Limits, *, force: bool = False) -> str | None:
    """Return why this plan must not be applied; None if it may."""
    total = len(plan.actionable)
    if limits.max_changes is not None and total > limits.max_changes:
        return (
            f"the plan has {plural(total, 'change')}, and guards.max_changes allows {limits.max_changes} in"
            " one run. If this is intended, raise that setting"
        )
    if force:
        return None
    managed = [customer for customer in observed.customers if is_managed(customer.metadata, plan.owner_id)]
    subjects = sum(len(customer.subject_keys) for customer in managed)
    updates, removals = _updated(plan.actionable), _removed(plan.actionable)
    return _too_many(
        "updates", len(updates), len(managed), "customers", limits.max_update_percent, limits
    ) or _too_many("removals", len(removals), subjects, "subjects", limits.max_removal_percent, limits)


def require_safe(plan: Plan, observed: ObservedState, limits: Limits, *, force: bool = False) -> None:
    """Raise UnsafePlanError if the plan must not be applied."""
    if why := unsafe_reason(plan, observed, limits, force=force):
        raise UnsafePlanError(why)


def _updated(changes: Iterable[Change]) -> set[str]:
    return {
        change.customer_id
        for change in changes
        if change.kind in _UPDATES and change.customer_id and not change.is_first_upsert
    }


def _removed(changes: Iterable[Change]) -> set[tuple[str | None, str]]:
    """Return the removed subjects; a customer without subjects counts as one."""
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
        f"too many {what}: {number} of {existing} {of} ({share}). The limit is {percent} %"
        f" (guards.max_{what[:-1]}_percent), checked from {limits.min_changes} {what} upwards"
        f" (guards.min_changes). Review `syncd plan`; if this is intended, pass --force"
    )


@dataclass(frozen=True, slots=True)
class Scope:
    """Selects principals by source (its name in messages), by id, username or custom_id, or by both."""

    source: str | None = None
    principal: str | None = None

    @property
    def whole(self) -> bool:
        """Return whether all principals are selected."""
        return self.source is None and self.principal is None

    def select(self, principals: Iterable[Principal]) -> list[Principal]:
        """Return the selected principals; raises ScopeError if there are none."""
        principals = list(principals)
        found = [
            principal
            for principal in principals
            if (self.source is None or self._named(principal.source))
            and (
                self.principal is None
                or self.principal in (principal.id, principal.username, principal.custom_id)
            )
        ]
        if not found:
            what = [f"source {self.source}"] * (self.source is not None)
            what += [f"principal {self.principal}"] * (self.principal is not None)
            sources = sorted({principal.source.partition(" ")[0] for principal in principals})
            known = f". The sources with principals: {', '.join(sources)}" if self.source and sources else ""
            raise ScopeError(f"no principal matches {' and '.join(what)}{known}")
        return found

    def _named(self, source: str) -> bool:
        return self.source is not None and (source == self.source or source.startswith(f"{self.source} "))


def restricted(plan: Plan, scope: Scope, principals: Sequence[Principal], rules: MappingRules) -> Plan:
    """Return the plan with only the changes of the selected principals."""
    if scope.whole:
        return plan
    wanted = desired_state(scope.select(principals), rules)
    subjects = {subject.key for customer in wanted.customers for subject in customer.subjects}
    subjects |= {key for problem in wanted.problems for key in problem.subject_keys}
    # A principal that gets no subject at all is recognized by the reason of its problem.
    reasons = {problem.reason for problem in wanted.problems}
    customers = {customer.key for customer in wanted.customers}

    def concerns(change: Change) -> bool:
        if change.kind in REMOVALS or change.kind is ChangeKind.ORPHANED:
            return False
        if change.subject_keys:
            return not subjects.isdisjoint(change.subject_keys)
        return change.customer_key in customers or change.reason in reasons

    note = "limited to the selected principals; nothing is marked, detached or deleted"
    return replace(plan, changes=tuple(filter(concerns, plan.changes)), notes=(*plan.notes, note))
