"""Views of runs and plans for the templates. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from syncd.core.changes import Change, ChangeKind, Plan, Status
from syncd.dashboard.diffs import Results
from syncd.dashboard.text import moment
from syncd.runs.options import described
from syncd.runs.run import FINISHED, Run, RunState

Level = Literal["ok", "warning", "problem", "busy", "none"]

DONE: Final = frozenset({str(Status.DONE), str(Status.UNCHANGED)})
"""Outcomes of a change that is made."""
_GUARD_NOTE: Final = "apply would stop: "
_NOT_OVERRIDABLE: Final = "guards.max_changes"


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in a list; `outcome` is its result in words."""

    id: str
    trigger: str
    dry_run: bool
    state: str
    level: Level
    outcome: str
    requested_at: datetime | None
    started_at: datetime | None
    seconds: float | None
    error: str | None
    options: tuple[str, ...]

    @property
    def title(self) -> str:
        """Return the heading."""
        return "Dry run" if self.dry_run else "Run"

    @property
    def is_finished(self) -> bool:
        """Return whether the run has ended."""
        return RunState(self.state) in FINISHED


def run_line(summary: Mapping[str, Any], now: datetime) -> RunLine:
    """Return the line of a run from its summary (`Run.summary`), of the daemon or the history."""
    started, finished = moment(summary["started_at"]), moment(summary["finished_at"])
    state = RunState(summary["state"])
    end = finished or (now if state is RunState.RUNNING else None)
    level, outcome = _outcome(summary, state)
    return RunLine(
        summary["id"],
        summary["trigger"],
        bool(summary["dry_run"]),
        str(state),
        level,
        outcome,
        moment(summary["requested_at"]),
        started,
        (end - started).total_seconds() if end and started else None,
        summary["error"],
        described(summary.get("options") or {}),
    )


def _outcome(summary: Mapping[str, Any], state: RunState) -> tuple[Level, str]:
    planned = summary["planned"] or {}
    blocked = planned.get(str(ChangeKind.BLOCKED), 0)
    if state in (RunState.QUEUED, RunState.RUNNING):
        return "busy", "queued" if state is RunState.QUEUED else "running"
    if state is RunState.FAILED:
        return "problem", "failed"
    if summary["dry_run"]:
        to_do = sum(planned.get(str(kind), 0) for kind in ChangeKind if Change(kind, None, (), "").actionable)
        if not to_do and not blocked:
            return "ok", "in sync"
        return "warning", ", ".join(_nonzero(("to do", to_do), ("blocked", blocked)))
    outcomes = summary["outcomes"] or {}
    failed = outcomes.get(str(Status.BLOCKED), 0) + outcomes.get(str(Status.SKIPPED), 0)
    done = outcomes.get(str(Status.DONE), 0)
    text = ", ".join(_nonzero(("done", done), ("blocked", failed))) or "nothing to do"
    return ("warning" if failed else "ok"), text


def _nonzero(*counts: tuple[str, int]) -> list[str]:
    return [f"{count:,} {name}" for name, count in counts if count]


@dataclass(frozen=True, slots=True)
class Drift:
    """Changes of the latest plan of all principals that its run has not made."""

    run_id: str
    at: datetime
    to_do: int
    blocked: int
    applying: bool

    @property
    def level(self) -> Level:
        """Return the level to show."""
        if self.applying:
            return "busy"
        return "warning" if self.to_do or self.blocked else "ok"


def latest_full_run(runs: Iterable[Run]) -> Run | None:
    """Return the latest run with a plan of all principals; `runs` are sorted latest first."""
    return next((run for run in runs if run.plan is not None and run.options.scope.whole), None)


def drift(run: Run | None) -> Drift | None:
    """Return the drift that remains after this run, or None without a plan."""
    if run is None or run.plan is None:
        return None
    untried, failed = _remaining(run, run.plan)
    at = run.finished_at or run.started_at or run.requested_at
    applying = run.state is RunState.RUNNING and not run.dry_run
    blocked = [change for change in run.plan.of(ChangeKind.BLOCKED) if not change.settled]
    return Drift(run.id, at, len(untried), len(blocked) + len(failed), applying)


def _remaining(run: Run, plan: Plan) -> tuple[list[Change], list[Change]]:
    """Return the changes that were not tried, and those that failed."""
    results = Results.of_outcomes(run.outcomes)
    untried: list[Change] = []
    failed: list[Change] = []
    for change in plan.actionable:
        result = results.of(change)
        if result is None:
            untried.append(change)
        elif result.status not in DONE:
            failed.append(change)
    return untried, failed


@dataclass(frozen=True, slots=True)
class ApplyForm:
    """The form that applies a dry run's plan. `guard` would stop the run, unless `can_force` and forced."""

    run_id: str
    changes: int
    guard: str | None
    can_force: bool


def apply_form(line: RunLine, plan: Plan | None) -> ApplyForm | None:
    """Return the form for a successful dry run whose plan has changes."""
    if (
        plan is None
        or not line.dry_run
        or RunState(line.state) is not RunState.SUCCEEDED
        or not plan.actionable
    ):
        return None
    found = next((note for note in plan.notes if note.startswith(_GUARD_NOTE)), None)
    guard = found.removeprefix(_GUARD_NOTE) if found else None
    return ApplyForm(
        line.id, len(plan.actionable), guard, guard is not None and _NOT_OVERRIDABLE not in guard
    )


def page_of(total: int, number: int, size: int) -> Pages:
    """Return the position of a page in a list; a number beyond the end means the last page."""
    last = max(1, -(-total // size))
    return Pages(min(max(1, number), last), last, size, total)


@dataclass(frozen=True, slots=True)
class Pages:
    """Page `number` of `last`; `size` entries each, `total` entries in all."""

    number: int
    last: int
    size: int
    total: int

    def cut(self, entries: Sequence[Any]) -> Sequence[Any]:
        """Return the entries of this page."""
        return entries[(self.number - 1) * self.size : self.number * self.size]

    @property
    def place(self) -> str:
        """Return which entries these are: ``26 to 50 of 1,204``."""
        first = (self.number - 1) * self.size + 1 if self.total else 0
        return f"{first:,} to {min(self.number * self.size, self.total):,} of {self.total:,}"
