"""What the pages show, made from runs and plans. Pure: nothing here reads anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal

from syncd.core.changes import Change, ChangeKind, Plan, Status
from syncd.core.unbilled import Fate, UnbilledSubject
from syncd.dashboard.diffs import Results
from syncd.dashboard.text import moment
from syncd.runs.run import FINISHED, Run, RunState

Level = Literal["ok", "warning", "problem", "busy", "none"]

_DONE: Final = frozenset({str(Status.DONE), str(Status.UNCHANGED)})
_FOUND_BY_GUARD: Final = "apply would stop: "
_UNLIFTABLE: Final = "guards.max_changes"


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in a list. `outcome` says in words what came of it."""

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
        """Return what it is called."""
        return "Dry run" if self.dry_run else "Run"

    @property
    def is_finished(self) -> bool:
        """Tell whether it has ended."""
        return RunState(self.state) in FINISHED


def run_line(summary: Mapping[str, Any], now: datetime) -> RunLine:
    """Return the line of a run from its summary (`Run.summary`), of the daemon or of the history."""
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
        _options(summary.get("options") or {}),
    )


def _outcome(summary: Mapping[str, Any], state: RunState) -> tuple[Level, str]:
    planned = summary["planned"] or {}
    blocked = planned.get(str(ChangeKind.BLOCKED), 0)
    if state in (RunState.QUEUED, RunState.RUNNING):
        return "busy", "waits for its turn" if state is RunState.QUEUED else "running"
    if state is RunState.FAILED:
        return "problem", "failed"
    if summary["dry_run"]:
        to_do = sum(planned.get(str(kind), 0) for kind in ChangeKind if Change(kind, None, (), "").actionable)
        if not to_do and not blocked:
            return "ok", "in sync"
        return "warning", ", ".join(_some(("to do", to_do), ("blocked", blocked)))
    outcomes = summary["outcomes"] or {}
    stuck = outcomes.get(str(Status.BLOCKED), 0) + outcomes.get(str(Status.SKIPPED), 0)
    done = outcomes.get(str(Status.DONE), 0)
    said = ", ".join(_some(("done", done), ("blocked", stuck))) or "nothing to do"
    return ("warning" if stuck else "ok"), said


def _some(*counted: tuple[str, int]) -> list[str]:
    return [f"{count:,} {what}" for what, count in counted if count]


_OPTION_WORDS: Final = {
    "force": "guards lifted",
    "allow_empty": "empty sources allowed",
    "allow_move": "moves allowed",
    "allow_retire": "retirements allowed",
    "adopt": "adopts customers",
    "reviewed": "as reviewed",
}


def _options(options: Mapping[str, Any]) -> tuple[str, ...]:
    said = [words for name, words in _OPTION_WORDS.items() if options.get(name)]
    said += [f"{name} {options[name]}" for name in ("source", "principal") if options.get(name)]
    return tuple(said)


@dataclass(frozen=True, slots=True)
class Drift:
    """What is to do by the latest plan of all principals, less what its run has done."""

    run_id: str
    at: datetime
    to_do: int
    blocked: int
    applying: bool

    @property
    def level(self) -> Level:
        """Return how good that is."""
        if self.applying:
            return "busy"
        return "warning" if self.to_do or self.blocked else "ok"


def latest(runs: Iterable[Run]) -> Run | None:
    """Return the latest run that has a plan of all principals; `runs` come latest first."""
    return next((run for run in runs if run.plan is not None and run.options.scope.whole), None)


def drift(run: Run | None) -> Drift | None:
    """Return the drift that is left after this run, None where none has planned yet."""
    if run is None or run.plan is None:
        return None
    left, stuck = _left(run, run.plan)
    at = run.finished_at or run.started_at or run.requested_at
    applying = run.state is RunState.RUNNING and not run.dry_run
    return Drift(run.id, at, len(left), len(run.plan.of(ChangeKind.BLOCKED)) + len(stuck), applying)


def _left(run: Run, plan: Plan) -> tuple[list[Change], list[Change]]:
    """Return the changes that were not tried, and those that were tried in vain."""
    results = Results.of_outcomes(run.outcomes)
    left: list[Change] = []
    stuck: list[Change] = []
    for change in plan.actionable:
        result = results.of(change)
        if result is None:
            left.append(change)
        elif result.status not in _DONE:
            stuck.append(change)
    return left, stuck


@dataclass(frozen=True, slots=True)
class UnbilledRow:
    """A subject with usage that nobody pays for, and why."""

    key: str
    events: int | float
    tokens: int | float
    fate: Fate
    reason: str


@dataclass(frozen=True, slots=True)
class UnbilledView:
    """The unbilled usage that the latest plan found, less what its run has attributed since."""

    run_id: str
    at: datetime
    since: datetime | None
    looked_from: datetime | None
    subjects: tuple[UnbilledRow, ...]

    @property
    def events(self) -> int | float:
        """Return the events of all subjects."""
        return sum(subject.events for subject in self.subjects)

    @property
    def tokens(self) -> int | float:
        """Return the tokens of all subjects."""
        return sum(subject.tokens for subject in self.subjects)

    def count(self, fate: str) -> int:
        """Return the number of subjects of one fate."""
        return sum(1 for subject in self.subjects if subject.fate == fate)

    @property
    def level(self) -> Level:
        """Return how good that is: what the next run attributes is no reason to worry."""
        return "warning" if any(subject.fate != "planned" for subject in self.subjects) else "ok"


def unbilled(run: Run | None) -> UnbilledView | None:
    """Return the unbilled usage after this run, None where it is not known."""
    if run is None or run.plan is None or run.plan.unbilled is None:
        return None
    plan, unbilled = run.plan, run.plan.unbilled
    reasons = _reasons(run, plan)
    found = tuple(
        described for subject in unbilled.subjects if (described := _described(subject, reasons)) is not None
    )
    at = run.finished_at or run.started_at or run.requested_at
    return UnbilledView(run.id, at, moment(unbilled.since), moment(unbilled.looked_from), found)


_Reasons = Mapping[str, tuple[Fate, str] | None]
_UNKNOWN: Final = (
    "No source names this subject: its consumer is gone, its Kong is not among the sources, or plugin and"
    " syncd name subjects differently (`syncd doctor` tells)."
)


def _reasons(run: Run, plan: Plan) -> _Reasons:
    """Return fate and reason by subject; None for those that the run has given a customer."""
    results = Results.of_outcomes(run.outcomes)
    reasons: dict[str, tuple[Fate, str] | None] = {}
    for change in plan.of(ChangeKind.BLOCKED):
        for key in change.subject_keys:
            reasons.setdefault(key, ("blocked", change.reason))
    for change in (*plan.of(ChangeKind.CREATE_CUSTOMER), *plan.of(ChangeKind.ATTACH_SUBJECTS)):
        result = results.of(change)
        for key in change.subject_keys:
            if result is None:
                said = f"The next run puts it on customer {change.customer_key}: {change.reason}."
                reasons[key] = ("planned", said)
            else:
                reasons[key] = None if result.status in _DONE else ("blocked", result.detail)
    return reasons


def _described(subject: UnbilledSubject, reasons: _Reasons) -> UnbilledRow | None:
    found = reasons.get(subject.key, ("unknown", _UNKNOWN))
    if found is None:
        return None
    return UnbilledRow(subject.key, subject.events, subject.tokens, *found)


@dataclass(frozen=True, slots=True)
class Offer:
    """The form that applies what a dry run has shown. `guard` would stop it; `can_force` lifts that."""

    run_id: str
    changes: int
    guard: str | None
    can_force: bool


def offer(line: RunLine, plan: Plan | None) -> Offer | None:
    """Return the form for a dry run whose plan has something to do."""
    if (
        plan is None
        or not line.dry_run
        or RunState(line.state) is not RunState.SUCCEEDED
        or not plan.actionable
    ):
        return None
    found = next((note for note in plan.notes if note.startswith(_FOUND_BY_GUARD)), None)
    guard = found.removeprefix(_FOUND_BY_GUARD) if found else None
    return Offer(line.id, len(plan.actionable), guard, guard is not None and _UNLIFTABLE not in guard)


def page_of(total: int, number: int, size: int) -> Pages:
    """Return where a page of a list is; a number beyond the end is the last page."""
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
        """Say which entries these are: ``26 to 50 of 1,204``."""
        first = (self.number - 1) * self.size + 1 if self.total else 0
        return f"{first:,} to {min(self.number * self.size, self.total):,} of {self.total:,}"
