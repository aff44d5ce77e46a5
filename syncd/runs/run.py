"""A run as a value: its trigger and options, its state, its plan and outcomes."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from syncd.core.changes import Outcome, Plan, count
from syncd.runs.reconciler import RunOptions


class RunState(StrEnum):
    """State of a run."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    BLOCKED = "blocked"
    """Finished, but some changes were blocked and need a person."""
    FAILED = "failed"


FINISHED = frozenset({RunState.SUCCEEDED, RunState.BLOCKED, RunState.FAILED})


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the daemon; times are UTC."""

    id: str
    trigger: str
    options: RunOptions
    requested_at: datetime
    state: RunState = RunState.QUEUED
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: str | None = None
    plan: Plan | None = None
    outcomes: tuple[Outcome, ...] = ()
    failure: str | None = None
    """Kind of error, for metrics: guard, source, metering, lock, history, review, stopped, other."""

    @property
    def dry_run(self) -> bool:
        """Return whether the run only plans."""
        return self.options.dry_run

    def summary(self) -> dict[str, object]:
        """Return the run without its changes, as in GET /v1/status."""
        return {
            "id": self.id,
            "trigger": self.trigger,
            "dry_run": self.dry_run,
            "options": self.options.to_json(),
            "state": str(self.state),
            "requested_at": self.requested_at.isoformat(),
            "started_at": self.started_at.isoformat() if self.started_at else None,
            "finished_at": self.finished_at.isoformat() if self.finished_at else None,
            "error": self.error,
            "in_sync": self.plan.in_sync if self.plan else None,
            "planned": self.plan.summary() if self.plan else None,
            "outcomes": count(self.outcomes),
            "unbilled": self._unbilled(),
        }

    def _unbilled(self) -> dict[str, object] | None:
        if self.plan is None or self.plan.unbilled is None:
            return None
        figures = self.plan.unbilled.to_json()
        del figures["details"]
        return figures

    def to_json(self) -> dict[str, object]:
        """Return the run with its plan and all outcomes, as in GET /v1/syncs/{id}."""
        return {
            **self.summary(),
            "plan": self.plan.to_json() if self.plan else None,
            "results": [outcome.to_json() for outcome in self.outcomes],
        }


def new_run(trigger: str, options: RunOptions) -> Run:
    """Return a run that starts now, without a queue."""
    now = datetime.now(UTC)
    return Run(uuid.uuid4().hex, trigger, options, now, RunState.RUNNING, now)
