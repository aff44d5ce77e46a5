"""The parts of syncd that are measured without a command around them; prints JSON.

python -m tests.bench.syncd_ours read CONFIG      seconds to read both sides and plan
python -m tests.bench.syncd_ours plan COUNT       seconds to map and plan so many principals in memory
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from syncd import log
from syncd.config import settings
from syncd.core.changes import Plan
from syncd.core.model import ObservedCustomer, ObservedState, Principal
from syncd.mapping.desired_state import desired_state
from syncd.mapping.rules import MappingRules
from syncd.planning.plan import make_plan
from syncd.runs import reconciler
from syncd.runs.factory import sources_of, target_of
from syncd.runs.options import RunOptions
from syncd.runs.passes import Situation, keep_undeletable
from syncd.sources.base import Readings
from tests.bench.syncd_apis import consumer_id


def read(path: Path) -> float:
    """Do what a run does until it has its plan, which must find nothing to do."""
    loaded = settings.load(path)
    with closing(target_of(loaded)) as target:
        rules = reconciler.plan_rules(loaded, datetime.now(UTC))
        started = time.perf_counter()
        with reconciler.gc_paused():
            both = reconciler.read_both_sides(sources_of(loaded), target, rules.mapping, Readings())
            there = Situation(both, rules, RunOptions(dry_run=True), target, target, lambda: None)
            plan = keep_undeletable(there.plan(), there)
        seconds = time.perf_counter() - started
    assert both.observed.customers
    assert plan.changes == ()
    return seconds


def plan(count: int) -> float:
    """Return the best of several times to map and plan: half are in sync, the other half new."""
    rules = MappingRules(owner_id="default", group_by="tag")
    identities = sorted(map(consumer_id, range(count)))
    principals = [Principal("consumer", identity, "kong", f"user-{identity}") for identity in identities]
    customers = tuple(
        ObservedCustomer(f"id-{want.key}", want.key, want.name, (want.subjects[0].key,), want.ownership)
        for want in desired_state(principals[::2], rules).customers
    )
    there = ObservedState(customers, None)

    def once() -> float:
        started = time.perf_counter()
        with reconciler.gc_paused():
            desired = desired_state(principals, rules)
            made: Plan = make_plan(desired, there, owner_id="default", policy="upsert-only")
        seconds = time.perf_counter() - started
        assert len(made.changes) == count // 2
        return seconds

    return min(once() for _ in range(5))


if __name__ == "__main__":
    log.configure(logging.WARNING)
    what, argument = sys.argv[1:]
    print(json.dumps(read(Path(argument)) if what == "read" else plan(int(argument))))
