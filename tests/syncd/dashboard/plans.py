"""Plans and runs in memory, for the pure views."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from syncd.core.changes import Change, ChangeKind, EntityState, Outcome, Plan
from syncd.core.unbilled import UnbilledSubject, UnbilledUsage
from syncd.planning.guards import Scope
from syncd.runs.options import RunOptions
from syncd.runs.run import Run, RunState

NOW = datetime(2026, 11, 22, 7, 0, tzinfo=UTC)
CREATE = Change(
    ChangeKind.CREATE_CUSTOMER, "a", ("s1",), "new: consumer alice", after=EntityState("A", ("s1",))
)
ATTACH = Change(ChangeKind.ATTACH_SUBJECTS, "b", ("s2",), "new in this customer", "2")
STUCK = Change(ChangeKind.BLOCKED, "c", ("s3",), "c has an active subscription", "3")
UNBILLED = UnbilledUsage(
    (
        UnbilledSubject("s1", 100, 5, "planned"),
        UnbilledSubject("s3", 20, 0, "blocked"),
        UnbilledSubject("gone", 3, 0, "unknown"),
    ),
    "2026-10-22T00:00:00Z",
    "2026-11-01T00:00:00Z",
)


def plan(*changes: Change, notes: tuple[str, ...] = (), unbilled: UnbilledUsage | None = None) -> Plan:
    return Plan("default", "upsert-only", changes, notes, unbilled)


def run(
    made: Plan | None,
    *outcomes: Outcome,
    dry: bool = False,
    state: RunState = RunState.SUCCEEDED,
    scope: Scope | None = None,
    error: str | None = None,
) -> Run:
    started = None if state is RunState.QUEUED else NOW - timedelta(seconds=9)
    finished = None if state in (RunState.QUEUED, RunState.RUNNING) else NOW - timedelta(seconds=5)
    chosen = scope or Scope()
    options = RunOptions(dry_run=dry, source=chosen.source, principal=chosen.principal)
    times = (NOW - timedelta(seconds=10), state, started, finished)
    return Run("r", "manual", options, *times, error, made, outcomes)
