"""One run: read all sources, map, observe, plan, check, and apply if asked.

A source that cannot be read ends the run before anything was looked at, let alone changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog

from syncd.apply import Report, apply_plan
from syncd.changes import Plan
from syncd.config import Config
from syncd.guards import Limits, danger, require_safe, withhold_removals
from syncd.http import ApiClient
from syncd.mapping import MappingRules, desired_world, within_limits
from syncd.model import ObservedWorld, Principal
from syncd.orphans import Grace
from syncd.outcome import Outcome, Status, count
from syncd.plan import PlanOptions, make_plan
from syncd.plan_file import require_same
from syncd.policy import Policy
from syncd.removal import ApiRemover
from syncd.retry import Retry
from syncd.scope import Scope, restricted
from syncd.sources import Source
from syncd.sources.readings import Readings
from syncd.targets import MeteringTarget
from syncd.unbilled import with_usage
from syncd.wiring import metering_endpoint, rules_of, sources_of, target_of

_log = structlog.get_logger("syncd.runner")

_WARNINGS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What is asked of one run: its extent, and which guards a person has lifted."""

    dry_run: bool = False
    force: bool = False
    allow_empty: bool = False
    allow_move: bool = False
    adopt: bool = False
    scope: Scope = field(default_factory=Scope)

    def reviewable(self) -> dict[str, object]:
        """Return what decides a plan, for its file."""
        return {name: value for name, value in self.to_json().items() if name not in ("dry_run", "force")}

    def as_reviewed(self, options: Mapping[str, object]) -> RunOptions:
        """Return these options with those that a plan file was made with."""
        source, principal = options.get("source"), options.get("principal")
        return replace(
            self,
            allow_empty=options.get("allow_empty") is True,
            allow_move=options.get("allow_move") is True,
            adopt=options.get("adopt") is True,
            scope=Scope(str(source) if source else None, str(principal) if principal else None),
        )

    def to_json(self) -> dict[str, object]:
        """Return the options as they stand in the history."""
        return {
            "dry_run": self.dry_run,
            "force": self.force,
            "allow_empty": self.allow_empty,
            "allow_move": self.allow_move,
            "adopt": self.adopt,
            "source": self.scope.source,
            "principal": self.scope.principal,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What a run found and did; `outcomes` is empty for a dry run."""

    plan: Plan
    outcomes: tuple[Outcome, ...] = ()

    @property
    def blocked(self) -> bool:
        """Tell whether something is left for a person to do."""
        return any(outcome.status is Status.BLOCKED for outcome in self.outcomes)

    def to_json(self) -> dict[str, object]:
        """Return the result as ``syncd apply --json`` prints it."""
        return {
            "plan": self.plan.to_json(),
            "summary": count(self.outcomes),
            "outcomes": [outcome.to_json() for outcome in self.outcomes],
        }


@dataclass(frozen=True, slots=True)
class Rules:
    """What of the configuration decides a plan."""

    mapping: MappingRules
    policy: Policy
    grace: Grace = field(default_factory=Grace)


def run(
    config: Config,
    options: RunOptions,
    *,
    reviewed: Plan | None = None,
    readings: Readings | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
    on_plan: Callable[[Plan], None] = lambda _plan: None,
    report: Report = lambda _outcome: None,
) -> Result:
    """Do one run with what the configuration names; raises SyncdError.

    `on_plan` sees the plan before it is checked and applied. With `reviewed`, only that plan is applied.
    A daemon passes the same `readings` to all its runs: what has not changed is then not read again.
    """
    now = datetime.now(UTC)
    waits = config.policy_options
    rules = Rules(rules_of(config), config.policy, Grace(now, waits.detach_after, waits.delete_after))
    limits = Limits(**config.guards.model_dump())
    sources = sources_of(config, sleep)
    retry = Retry(attempts=config.metering.attempts, sleep=sleep)
    with (
        closing(target_of(config, sleep)) as target,
        ApiClient(metering_endpoint(config), retry) as client,
    ):
        plan, observed = plan_run(sources, target, rules, options, readings or Readings())
        plan = with_usage(plan, target, observed, now)
        if options.dry_run and (why := danger(plan, observed, limits, force=options.force)):
            plan = plan.noting(f"apply would stop: {why}")
        on_plan(plan)
        if options.dry_run:
            return Result(plan)
        if reviewed is not None:
            require_same(reviewed, plan)
        require_safe(plan, observed, limits, force=options.force)
        remover = ApiRemover(client, config.metering.dialect)
        return Result(plan, apply_plan(plan, target, remover=remover, should_stop=should_stop, report=report))


def plan_run(
    sources: Sequence[Source],
    target: MeteringTarget,
    rules: Rules,
    options: RunOptions,
    readings: Readings,
) -> tuple[Plan, ObservedWorld]:
    """Read both sides and compare them; raises SourceError or ApiError."""
    principals: list[Principal] = []
    empty: list[str] = []
    for source in sources:
        found = readings.read(source)
        _log.debug("source_read", source=source.name, principals=len(found))
        principals.extend(found)
        if not found:
            empty.append(source.name)
    desired = desired_world(principals, rules.mapping)
    observed = target.observe()
    desired = within_limits(desired, observed, rules.mapping)
    _log.debug("metering_read", customers=len(observed.customers))
    plan = make_plan(
        desired,
        observed,
        owner_id=rules.mapping.owner_id,
        policy=rules.policy,
        options=PlanOptions(options.adopt, options.allow_move, rules.grace),
    )
    for note in _notes(desired.warnings):
        plan = plan.noting(note)
    if not options.allow_empty and rules.policy == "sync":
        plan = withhold_removals(plan, empty)
    return restricted(plan, options.scope, principals, rules.mapping), observed


def _notes(warnings: Sequence[str]) -> list[str]:
    rest = len(warnings) - _WARNINGS_SHOWN
    more = [f"and {rest} more details are left out"] if rest > 0 else []
    return [*warnings[:_WARNINGS_SHOWN], *more]
