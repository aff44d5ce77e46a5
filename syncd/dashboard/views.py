"""Views of runs and plans for the templates. Pure: no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from typing import Any, Final, Literal

from syncd.core.changes import Cause, Change, ChangeKind, Plan, Status
from syncd.core.unbilled import Fate, IgnoredSubject, UnbilledSubject
from syncd.dashboard.diffs import Results
from syncd.dashboard.text import moment
from syncd.runs.options import described, hint_for
from syncd.runs.run import FINISHED, Run, RunState

Level = Literal["ok", "warning", "problem", "busy", "none"]

_DONE: Final = frozenset({str(Status.DONE), str(Status.UNCHANGED)})
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
    return Drift(run.id, at, len(untried), len(run.plan.of(ChangeKind.BLOCKED)) + len(failed), applying)


def _remaining(run: Run, plan: Plan) -> tuple[list[Change], list[Change]]:
    """Return the changes that were not tried, and those that failed."""
    results = Results.of_outcomes(run.outcomes)
    untried: list[Change] = []
    failed: list[Change] = []
    for change in plan.actionable:
        result = results.of(change)
        if result is None:
            untried.append(change)
        elif result.status not in _DONE:
            failed.append(change)
    return untried, failed


@dataclass(frozen=True, slots=True)
class UnbilledRow:
    """A subject with unbilled usage, and the reason.

    `name` is that of its principal and `customer` the one it is meant for, as far as they are known; `fact`
    is what is particular to it within its group.
    """

    key: str
    events: int | float
    tokens: int | float
    status: Fate
    reason: str
    heading: str
    cure: str = ""
    fact: str = ""
    name: str | None = None
    customer: str | None = None


@dataclass(frozen=True, slots=True)
class UnbilledGroup:
    """Subjects that are unbilled for one cause, or a page's part of them; the figures are those of all."""

    heading: str
    cure: str
    option: str | None
    count: int
    events: int | float
    rows: tuple[UnbilledRow, ...]


@dataclass(frozen=True, slots=True)
class UnbilledView:
    """The unbilled usage of the latest plan that its run has not attributed since."""

    run_id: str
    at: datetime
    since: datetime | None
    looked_from: datetime | None
    subjects: tuple[UnbilledRow, ...]
    ignored: tuple[IgnoredSubject, ...] = ()

    @property
    def events(self) -> int | float:
        """Return the events of all subjects."""
        return sum(subject.events for subject in self.subjects)

    @property
    def tokens(self) -> int | float:
        """Return the tokens of all subjects."""
        return sum(subject.tokens for subject in self.subjects)

    @property
    def by_cause(self) -> tuple[UnbilledRow, ...]:
        """Return the subjects by cause: those with the most events first, what the next run fixes last."""
        events: Counter[str] = Counter()
        for subject in self.subjects:
            events[subject.heading] += int(subject.events)
        return tuple(
            sorted(self.subjects, key=lambda s: (s.status == "planned", -events[s.heading], s.heading))
        )

    def groups(self, shown: Sequence[UnbilledRow]) -> tuple[UnbilledGroup, ...]:
        """Return these rows of `by_cause` in their groups."""
        found = []
        for heading, several in groupby(shown, key=attrgetter("heading")):
            rows = tuple(several)
            every = [subject for subject in self.subjects if subject.heading == heading]
            option = hint_for(rows[0].reason) if rows[0].status == "blocked" else None
            events = sum(subject.events for subject in every)
            found.append(UnbilledGroup(heading, rows[0].cure, option, len(every), events, rows))
        return tuple(found)

    def count(self, status: str) -> int:
        """Return the number of subjects with a status."""
        return sum(1 for subject in self.subjects if subject.status == status)

    @property
    def level(self) -> Level:
        """Return the level to show: usage that the next run attributes is no warning."""
        return "warning" if any(subject.status != "planned" for subject in self.subjects) else "ok"


def unbilled(run: Run | None) -> UnbilledView | None:
    """Return the unbilled usage after this run, or None if it is unknown."""
    if run is None or run.plan is None or run.plan.unbilled is None:
        return None
    plan, unbilled = run.plan, run.plan.unbilled
    reasons = _reasons(run, plan)
    found = tuple(
        described for subject in unbilled.subjects if (described := _described(subject, reasons)) is not None
    )
    at = run.finished_at or run.started_at or run.requested_at
    since, looked_from = moment(unbilled.since), moment(unbilled.looked_from)
    return UnbilledView(run.id, at, since, looked_from, found, unbilled.ignored)


_UNKNOWN: Final = (
    "No source names this subject: its consumer was deleted, its Kong is not among the sources, or plugin and"
    " syncd name subjects differently (`syncd doctor` checks this)."
)
_OTHER: Final = "Blocked for a reason of its own"
_PLANNED: Final = "Fixed by the next run"
_UNNAMED: Final = "No source names the subject"
_UNNAMED_CURE: Final = (
    "The consumer was deleted, its Kong is not among the sources, or plugin and syncd name subjects"
    " differently, which syncd doctor checks."
)


@dataclass(frozen=True, slots=True)
class _Reason:
    """Why a subject is unbilled: the change that is about it, and its status."""

    status: Fate
    text: str
    change: Change
    blocked_by: Cause | None = None

    def row(self, subject: UnbilledSubject) -> UnbilledRow:
        """Return the row of a subject."""
        change, cause = self.change, self.blocked_by
        names = dict(zip(change.subject_keys, change.names, strict=False))
        heading = _PLANNED if self.status == "planned" else cause.heading if cause else _OTHER
        return UnbilledRow(
            subject.key,
            subject.events,
            subject.tokens,
            self.status,
            self.text,
            heading,
            cause.cure if cause else "",
            "" if self.status == "planned" else change.fact if cause else self.text,
            names.get(subject.key),
            change.customer_key,
        )


_Reasons = Mapping[str, _Reason | None]


def _reasons(run: Run, plan: Plan) -> _Reasons:
    """Return the reason by subject; None for subjects that the run has attributed."""
    results = Results.of_outcomes(run.outcomes)
    reasons: dict[str, _Reason | None] = {}
    for change in plan.of(ChangeKind.BLOCKED):
        for key in change.subject_keys:
            reasons.setdefault(key, _Reason("blocked", change.reason, change, change.cause))
    for change in (*plan.of(ChangeKind.CREATE_CUSTOMER), *plan.of(ChangeKind.ATTACH_SUBJECTS)):
        result = results.of(change)
        for key in change.subject_keys:
            if result is None:
                text = f"The next run attributes it to customer {change.customer_key}: {change.reason}."
                reasons[key] = _Reason("planned", text, change)
            else:
                done = result.status in _DONE
                reasons[key] = None if done else _Reason("blocked", result.detail, change)
    return reasons


def _described(subject: UnbilledSubject, reasons: _Reasons) -> UnbilledRow | None:
    if subject.key not in reasons:
        return UnbilledRow(
            subject.key,
            subject.events,
            subject.tokens,
            "unknown",
            _UNKNOWN,
            _UNNAMED,
            _UNNAMED_CURE,
        )
    reason = reasons[subject.key]
    return None if reason is None else reason.row(subject)


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
