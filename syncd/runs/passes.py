"""The passes over a plan, in the order in which they run: what a plan becomes before anybody sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice

from syncd.core.changes import ChangeKind, Plan
from syncd.core.errors import RefusedError, UnauthorizedError
from syncd.core.model import DesiredState, ObservedState, Principal
from syncd.core.policy import Policy
from syncd.mapping.rules import MappingRules
from syncd.metering.base import Inspection, Inspector
from syncd.planning import guards
from syncd.planning.guards import Limits, restricted
from syncd.planning.orphans import Grace, Obstacle
from syncd.planning.plan import PlanOptions, make_plan
from syncd.runs.options import RunOptions
from syncd.runs.unbilled import UsageReader, with_usage

_MAX_WARNINGS = 20
_MAX_DELETIONS = 100
"""Later deletions are left to the server, which refuses them itself: each check costs a few requests."""


@dataclass(frozen=True, slots=True)
class PlanRules:
    """The settings that affect a plan."""

    mapping: MappingRules
    policy: Policy
    grace: Grace = field(default_factory=Grace)
    limits: Limits = field(default_factory=Limits)
    may_be_empty: frozenset[str] = frozenset()
    """Names of the sources that may have nothing."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Subjects that are meant to be unbilled, with the reason of each."""


@dataclass(slots=True)
class BothSides:
    """What a run has read: all principals, the names of empty sources, and both states."""

    principals: Sequence[Principal]
    empty_sources: Sequence[str]
    desired: DesiredState
    observed: ObservedState

    def release(self) -> None:
        """Free the principals and the desired state, which the passes from `look_up_usage` on do not read."""
        self.principals, self.desired = (), DesiredState((), ())


@dataclass(frozen=True, slots=True)
class Situation:
    """What a run has read, and what its passes may still ask."""

    read: BothSides
    rules: PlanRules
    options: RunOptions
    inspector: Inspector
    usage: UsageReader
    clock_skew: Callable[[], timedelta | None]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Customers whose deletion the metering API refused before: id -> why."""

    @property
    def started(self) -> datetime:
        """Return when the run started."""
        return self.rules.grace.now

    def plan(self, undeletable: Mapping[str, Obstacle] | None = None) -> Plan:
        """Plan, without deleting the customers of `undeletable`: id -> why."""
        options, rules = self.options, self.rules
        refused = {identity: Obstacle(why) for identity, why in self.refused.items()}
        allowed = PlanOptions(
            options.adopt, options.allow_move, rules.grace, {**refused, **(undeletable or {})}
        )
        return make_plan(
            self.read.desired,
            self.read.observed,
            owner_id=rules.mapping.owner_id,
            policy=rules.policy,
            options=allowed,
        )


Pass = Callable[[Plan, Situation], Plan]


def keep_undeletable(plan: Plan, there: Situation) -> Plan:
    """Check the customers that the plan deletes, and plan again if some of them have to stay."""
    undeletable = check_deletions(plan, there.inspector)
    return there.plan(undeletable) if undeletable else plan


def check_deletions(plan: Plan, inspector: Inspector) -> dict[str, Obstacle]:
    """Inspect the customers that this plan deletes and return those that must stay: id -> why.

    Raises ApiError.
    """
    undeletable: dict[str, Obstacle] = {}
    for change in islice(plan.of(ChangeKind.DELETE_CUSTOMER), _MAX_DELETIONS):
        identity = change.customer_id or ""
        try:
            found = inspector.inspect(identity)
        except (RefusedError, UnauthorizedError) as error:
            why = f"its entitlements and subscriptions cannot be read ({error})"
            undeletable[identity] = Obstacle(why, settled=False)
            continue
        if found is not None and (obstacle := _obstacle(found)):
            undeletable[identity] = Obstacle(obstacle)
    return undeletable


def _obstacle(found: Inspection) -> str | None:
    """Return what rules out the deletion of a customer."""
    if found.entitlements:
        return f"it has entitlements ({', '.join(found.entitlements)})"
    if found.open_subscriptions:
        return f"it has a subscription that has not ended ({', '.join(found.open_subscriptions)})"
    if found.open_invoices:
        return f"it has an invoice that is not final ({', '.join(found.open_invoices)})"
    return None


def note_warnings(plan: Plan, there: Situation) -> Plan:
    """Name the details that customers are created without."""
    warnings = there.read.desired.warnings
    rest = len(warnings) - _MAX_WARNINGS
    more = [f"and {rest} more details are left out"] if rest > 0 else []
    return replace(plan, notes=(*plan.notes, *warnings[:_MAX_WARNINGS], *more))


def withhold_for_empty_sources(plan: Plan, there: Situation) -> Plan:
    """Remove nothing while a source is empty, and say so as a blocked change."""
    if there.options.allow_empty:
        return plan
    unexpected = [name for name in there.read.empty_sources if name not in there.rules.may_be_empty]
    return guards.withhold_for_empty_sources(plan, unexpected)


def restrict_to_scope(plan: Plan, there: Situation) -> Plan:
    """Keep the changes of the selected principals only."""
    return restricted(plan, there.options.scope, there.read.principals, there.rules.mapping)


def withhold_for_clock(plan: Plan, there: Situation) -> Plan:
    """Remove nothing if this machine's clock differs from the metering API's."""
    bound = there.rules.limits.max_clock_skew
    if bound is None or not guards.has_removals(plan):
        return plan
    why = guards.clock_distrust_reason(there.clock_skew(), bound)
    return guards.withhold_for_clock(plan, why) if why else plan


def settle_ignored(plan: Plan, there: Situation) -> Plan:
    """Count what is blocked for ignored subjects only as blocked by decision."""
    ignored = there.rules.ignored.keys()
    if not ignored:
        return plan
    changes = tuple(
        replace(change, settled=True)
        if change.kind is ChangeKind.BLOCKED and change.subject_keys and ignored >= {*change.subject_keys}
        else change
        for change in plan.changes
    )
    return replace(plan, changes=changes)


def look_up_usage(plan: Plan, there: Situation) -> Plan:
    """Add unbilled usage, and the usage that changes concern."""
    there.read.release()  # a third of the memory of a run
    return with_usage(plan, there.usage, there.read.observed, there.started, there.rules.ignored)


WOULD_STOP = "apply would stop: "
"""Begins the note of a dry run about a guard."""


def note_guards(plan: Plan, there: Situation) -> Plan:
    """Say in a dry run that a guard would stop the plan."""
    if not there.options.dry_run:
        return plan
    why = guards.unsafe_reason(plan, there.read.observed, there.rules.limits, force=there.options.force)
    return plan.noting(f"{WOULD_STOP}{why}") if why else plan


PASSES: tuple[Pass, ...] = (
    keep_undeletable,
    note_warnings,
    withhold_for_empty_sources,
    restrict_to_scope,
    withhold_for_clock,
    settle_ignored,
    look_up_usage,
    note_guards,
)
