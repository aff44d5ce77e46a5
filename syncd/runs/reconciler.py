"""Reconciler: reads the sources, maps, observes, plans, checks the plan and applies it.

A dry run ends before it applies. A source that cannot be read ends the run before it plans.
"""

from __future__ import annotations

import contextvars
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace

import structlog

from syncd.apply.executor import Report, apply_plan
from syncd.config.settings import Config
from syncd.core.changes import DELETIONS, Outcome, Plan, Status, count
from syncd.core.errors import ApplyStoppedError, StoppedError
from syncd.core.model import DesiredState, ObservedState, Principal
from syncd.core.policy import Policy
from syncd.http.client import ApiClient
from syncd.mapping.desired_state import desired_state
from syncd.mapping.limits import within_limits
from syncd.mapping.rules import MappingRules
from syncd.metering.base import Inspector, MeteringTarget
from syncd.metering.deletion import ApiInspector, ApiRemover
from syncd.planning.deletion_checks import check_deletions
from syncd.planning.guards import (
    Limits,
    clock_distrust_reason,
    has_removals,
    require_safe,
    unsafe_reason,
    withhold_for_clock,
    withhold_for_empty_sources,
)
from syncd.planning.orphans import Grace
from syncd.planning.plan import PlanOptions, make_plan
from syncd.planning.plan_file import require_same
from syncd.planning.scope import Scope, restricted
from syncd.runs.clock import Now, Stopwatch, clock_skew, utc_now
from syncd.runs.factory import metering_endpoint, retry_of, rules_of, sources_of, target_of
from syncd.runs.stopping import Stop
from syncd.runs.unbilled import with_usage
from syncd.sources.base import Readings, Source


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause Python's cycle collector while both states are read and compared, then freeze what was created.

    Hundreds of thousands of values are created to stay, none of them in a cycle, but each pass of the
    collector visits all of them: a third of the time of a plan for 100,000 principals. Objects that an
    earlier call froze are unfrozen first. Reference counting still frees unused memory at once.
    """
    enabled = gc.isenabled()
    gc.unfreeze()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


_log = structlog.get_logger("syncd.runs.reconciler")

_MAX_WARNINGS = 20


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of one run: its scope, and the guards and policies that the operator lifted.

    With `reviewed`, the run applies exactly that plan or fails.
    """

    dry_run: bool = False
    force: bool = False
    allow_empty: bool = False
    allow_move: bool = False
    allow_retire: bool = False
    adopt: bool = False
    scope: Scope = field(default_factory=Scope)
    reviewed: Plan | None = None

    def reviewable(self) -> dict[str, object]:
        """Return the options that affect a plan, for its file."""
        options = self.to_json().items()
        return {name: value for name, value in options if name not in ("dry_run", "force", "reviewed")}

    def as_reviewed(self, options: Mapping[str, object]) -> RunOptions:
        """Return these options combined with those that a plan file was made with."""
        source, principal = options.get("source"), options.get("principal")
        return replace(
            self,
            allow_empty=options.get("allow_empty") is True,
            allow_move=options.get("allow_move") is True,
            allow_retire=options.get("allow_retire") is True,
            adopt=options.get("adopt") is True,
            scope=Scope(str(source) if source else None, str(principal) if principal else None),
        )

    def to_json(self) -> dict[str, object]:
        """Return the options as in the history."""
        return {
            "dry_run": self.dry_run,
            "force": self.force,
            "allow_empty": self.allow_empty,
            "allow_move": self.allow_move,
            "allow_retire": self.allow_retire,
            "adopt": self.adopt,
            "source": self.scope.source,
            "principal": self.scope.principal,
            "reviewed": self.reviewed is not None,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """The plan and outcomes of a run; a dry run has no outcomes."""

    plan: Plan
    outcomes: tuple[Outcome, ...] = ()

    @property
    def blocked(self) -> bool:
        """Return whether a change was blocked, which a person has to resolve."""
        return any(outcome.status is Status.BLOCKED for outcome in self.outcomes)

    def to_json(self) -> dict[str, object]:
        """Return the result as ``syncd apply --json`` prints it."""
        return {
            "plan": self.plan.to_json(),
            "summary": count(self.outcomes),
            "outcomes": [outcome.to_json() for outcome in self.outcomes],
        }


@dataclass(frozen=True, slots=True)
class PlanRules:
    """The settings that affect a plan."""

    mapping: MappingRules
    policy: Policy
    grace: Grace = field(default_factory=Grace)


def run(
    config: Config,
    options: RunOptions,
    *,
    readings: Readings | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
    now: Now = utc_now,
    on_plan: Callable[[Plan], None] = lambda _plan: None,
    report: Report = lambda _outcomes: None,
) -> Result:
    """Do one run with this configuration; raises SyncdError.

    `on_plan` receives the plan before it is checked and applied. `now` is this machine's clock.
    A daemon passes the same `readings` to all its runs, so that unchanged sources are not read again.
    """
    watch = Stopwatch(now)
    waits = config.policy_options
    grace = Grace(watch.start, waits.detach_after, waits.delete_after)
    rules = PlanRules(rules_of(config), config.policy, grace)
    limits = Limits(**config.guards.model_dump())
    stop = Stop(should_stop)
    sources = sources_of(config, sleep, stop)
    retry = retry_of(config, sleep, stop)
    with (
        closing(target_of(config, sleep, stop)) as target,
        ApiClient(metering_endpoint(config), retry) as client,
    ):
        inspector = ApiInspector(client, config.metering.dialect)
        try:
            with gc_paused():
                plan, observed = plan_changes(
                    sources, target, rules, options, readings or Readings(), inspector
                )
        except StoppedError as error:
            raise ApplyStoppedError(f"stopped by request before its first change ({error})", ()) from None
        if limits.max_clock_skew is not None and has_removals(plan):
            ahead = clock_skew(metering_endpoint(config), watch)
            if why := clock_distrust_reason(ahead, limits.max_clock_skew):
                plan = withhold_for_clock(plan, why)
        plan = with_usage(plan, target, observed, watch.start)
        if options.dry_run and (why := unsafe_reason(plan, observed, limits, force=options.force)):
            plan = plan.noting(f"apply would stop: {why}")
        on_plan(plan)
        if options.dry_run:
            return Result(plan)
        if options.reviewed is not None:
            require_same(options.reviewed, plan)
        require_safe(plan, observed, limits, force=options.force)
        remover = ApiRemover(client, config.metering.dialect)
        stop.applying = True
        outcomes = apply_plan(
            plan,
            target,
            remover=remover,
            concurrency=config.metering.concurrency,
            should_stop=should_stop,
            report=report,
        )
        return Result(plan, outcomes)


def plan_changes(
    sources: Sequence[Source],
    target: MeteringTarget,
    rules: PlanRules,
    options: RunOptions,
    readings: Readings,
    inspector: Inspector,
) -> tuple[Plan, ObservedState]:
    """Read sources and metering API concurrently, and plan; raises SourceError or ApiError."""
    with ThreadPoolExecutor(1, thread_name_prefix="syncd-observe") as executor:
        # In the same context, so that log lines carry the run id.
        observing = executor.submit(contextvars.copy_context().run, target.observe)
        principals, empty = _read_sources(sources, readings)
        desired = desired_state(principals, rules.mapping)
        observed = observing.result()
    desired = within_limits(desired, observed, rules.mapping)
    _log.debug("metering_read", customers=len(observed.customers))
    plan = _plan_with_deletion_checks(desired, observed, principals, rules, options, inspector)
    for note in _warning_notes(desired.warnings):
        plan = plan.noting(note)
    if not options.allow_empty and rules.policy == "sync":
        plan = withhold_for_empty_sources(plan, empty)
    return restricted(plan, options.scope, principals, rules.mapping), observed


def _read_sources(sources: Sequence[Source], readings: Readings) -> tuple[list[Principal], list[str]]:
    """Return the principals of all sources, and the names of empty sources."""
    principals: list[Principal] = []
    empty: list[str] = []
    for source in sources:
        found = readings.read(source)
        _log.debug("source_read", source=source.name, principals=len(found))
        principals.extend(found)
        if not found:
            empty.append(source.name)
    return principals, empty


def _plan_with_deletion_checks(
    desired: DesiredState,
    observed: ObservedState,
    principals: Sequence[Principal],
    rules: PlanRules,
    options: RunOptions,
    inspector: Inspector,
) -> Plan:
    """Plan, check the customers that the plan deletes, and plan again if some of them have to stay."""

    def make(allowed: PlanOptions) -> Plan:
        owner_id = rules.mapping.owner_id
        return make_plan(desired, observed, owner_id=owner_id, policy=rules.policy, options=allowed)

    allowed = PlanOptions(options.adopt, options.allow_move, rules.grace, options.allow_retire)
    plan = make(allowed)
    if not any(change.kind in DELETIONS for change in plan.changes):
        return plan
    checks = check_deletions(plan, inspector, principals, rules.mapping)
    return checks.with_details(
        make(replace(allowed, undeletable=checks.undeletable)) if checks.undeletable else plan
    )


def _warning_notes(warnings: Sequence[str]) -> list[str]:
    rest = len(warnings) - _MAX_WARNINGS
    more = [f"and {rest} more details are left out"] if rest > 0 else []
    return [*warnings[:_MAX_WARNINGS], *more]
