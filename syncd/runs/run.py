"""A run as a value: its trigger and options, its state, its plan and outcomes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status, count
from syncd.core.errors import (
    ApiError,
    ApplyStoppedError,
    LockedError,
    PlanFileError,
    SourceError,
    StateError,
    SyncdError,
    UnsafePlanError,
)
from syncd.core.unbilled import UnbilledUsage
from syncd.mapping.rules import MappingRules
from syncd.runs.options import RunOptions
from syncd.runs.passes import BothSides


class RunState(StrEnum):
    """State of a run."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    BLOCKED = "blocked"
    """Finished, but some changes were blocked and need a person."""
    FAILED = "failed"


_ATTRIBUTING = frozenset({ChangeKind.CREATE_CUSTOMER, ChangeKind.ATTACH_SUBJECTS})
_MADE = frozenset({Status.DONE, Status.UNCHANGED})
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

    @property
    def blocked(self) -> bool:
        """Return whether a change was blocked, which a person has to resolve."""
        return any(one.status is Status.BLOCKED and not one.change.settled for one in self.outcomes)

    @property
    def made_plan(self) -> Plan:
        """Return the plan of a run that has got as far."""
        if self.plan is None:
            raise ValueError(f"run {self.id} has no plan")
        return self.plan

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

    @property
    def unbilled(self) -> UnbilledUsage | None:
        """Return the unbilled usage as it is now: without the subjects that the run has attributed."""
        if self.plan is None or self.plan.unbilled is None:
            return None
        attributed = {
            key
            for outcome in self.outcomes
            if outcome.change.kind in _ATTRIBUTING and outcome.status in _MADE
            for key in outcome.change.subject_keys
        }
        return self.plan.unbilled.without(attributed)

    def _unbilled(self) -> dict[str, object] | None:
        if self.unbilled is None:
            return None
        figures = self.unbilled.to_json()
        del figures["details"], figures["ignored"]
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


_FAILURES: tuple[tuple[type[SyncdError], str], ...] = (
    (UnsafePlanError, "guard"),
    (SourceError, "source"),
    (ApiError, "metering"),
    (LockedError, "lock"),
    (StateError, "history"),
    (PlanFileError, "review"),
)


def failure_kind(error: BaseException) -> str:
    """Return the kind of the error that ended a run, as in `Run.failure`."""
    if isinstance(error, ApplyStoppedError):
        causes = {ApiError: "metering", LockedError: "lock"}
        return next((kind for type_, kind in causes.items() if isinstance(error.__cause__, type_)), "stopped")
    return next((kind for type_, kind in _FAILURES if isinstance(error, type_)), "other")


class RunObserver:
    """Observer of run events, called from one thread at a time: the history, the metrics, a terminal.

    A SyncdError of any method but `finished` ends the run.
    """

    def started(self, run: Run) -> None:
        """Handle the start of a run."""

    def observed(self, run: Run, read: BothSides, rules: MappingRules) -> None:
        """Handle both states as they were read, before the plan goes through its passes."""

    def planned(self, run: Run) -> None:
        """Handle the plan, before the first change."""

    def begun(self, run: Run, changes: Sequence[Change]) -> None:
        """Handle changes that begin now, before any of them is made."""

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """Handle outcomes of some changes, in any thread."""

    def finished(self, run: Run) -> None:
        """Handle the end of the run."""
