"""One run: read all sources, map, observe, plan, and apply if asked.

A source that cannot be read ends the run before anything was looked at, let alone changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import structlog

from syncd.apply import Report, apply_plan
from syncd.changes import Plan
from syncd.config import Config
from syncd.mapping import MappingRules, desired_world
from syncd.model import Principal
from syncd.outcome import Outcome, Status, count
from syncd.plan import Policy, make_plan
from syncd.sources import Source
from syncd.targets import MeteringTarget
from syncd.wiring import rules_of, sources_of, target_of

_log = structlog.get_logger("syncd.runner")


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


def run(
    config: Config,
    *,
    dry_run: bool,
    should_stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
    on_plan: Callable[[Plan], None] = lambda _plan: None,
    report: Report = lambda _outcome: None,
) -> Result:
    """Do one run with what the configuration names; raises SyncdError.

    `on_plan` sees the plan before it is applied.
    """
    sources = sources_of(config, sleep)
    with closing(target_of(config, sleep)) as target:
        plan = plan_run(sources, target, rules_of(config), config.policy)
        on_plan(plan)
        if dry_run:
            return Result(plan)
        return Result(plan, apply_plan(plan, target, should_stop=should_stop, report=report))


def plan_run(sources: Sequence[Source], target: MeteringTarget, rules: MappingRules, policy: Policy) -> Plan:
    """Read both sides and compare them; raises SourceError or ApiError."""
    principals: list[Principal] = []
    for source in sources:
        found = source.read()
        _log.debug("source_read", source=source.name, principals=len(found))
        principals.extend(found)
    desired = desired_world(principals, rules)
    observed = target.observe()
    _log.debug("metering_read", customers=len(observed.customers))
    return make_plan(desired, observed, owner_id=rules.owner_id, policy=policy)
