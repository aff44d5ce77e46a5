"""Unbilled usage of the latest plan by cause: the subjects, their names and what to do. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from typing import Final

from syncd.core.changes import Cause, Change, ChangeKind, Plan
from syncd.core.unbilled import Fate, IgnoredSubject, UnbilledSubject
from syncd.dashboard.diffs import Results
from syncd.dashboard.text import moment
from syncd.dashboard.views import DONE, Level
from syncd.runs.options import option_for
from syncd.runs.run import Run

_BLOCKED: Final = frozenset({"blocked", "settled"})
_OPEN: Final = frozenset({"blocked", "unknown"})


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
    """The option of a run that allows to attribute them."""
    count: int
    events: int | float
    rows: tuple[UnbilledRow, ...]
    preview: bool = False
    """Whether a run, with `option` if there is one, can attribute them."""
    keys: tuple[str, ...] = ()
    """All of them."""


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
            option = option_for(rows[0].reason) if rows[0].status in _BLOCKED else None
            events = sum(subject.events for subject in every)
            preview = option is not None or rows[0].status == "planned"
            keys = tuple(subject.key for subject in every)
            found.append(
                UnbilledGroup(heading, rows[0].cure, option, len(every), events, rows, preview, keys)
            )
        return tuple(found)

    def with_ignored(self, ignored: Mapping[str, str]) -> UnbilledView:
        """Return it with these subjects ignored (key -> why), and no others."""
        aside: dict[str, IgnoredSubject | UnbilledRow] = {one.key: one for one in self.ignored}
        aside |= {one.key: one for one in self.subjects}
        kept = tuple(
            IgnoredSubject(key, one.events, one.tokens, ignored[key])
            for key, one in aside.items()
            if key in ignored
        )
        rows = tuple(one for one in self.subjects if one.key not in ignored)
        again = tuple(
            UnbilledRow(one.key, one.events, one.tokens, "unknown", _UNKNOWN, _PENDING)
            for one in self.ignored
            if one.key not in ignored
        )
        return replace(self, subjects=rows + again, ignored=kept)

    def count(self, status: str) -> int:
        """Return the number of subjects with a status."""
        return sum(1 for subject in self.subjects if subject.status == status)

    @property
    def level(self) -> Level:
        """Return the level to show; what the next run attributes, or a decision blocks, is no warning."""
        return "warning" if any(subject.status in _OPEN for subject in self.subjects) else "ok"


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
_PENDING: Final = "No longer ignored; the next plan says why it is unbilled"
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
            status: Fate = "settled" if change.settled else "blocked"
            if key not in reasons or status == "blocked":
                reasons[key] = _Reason(status, change.reason, change, change.cause)
    for change in (*plan.of(ChangeKind.CREATE_CUSTOMER), *plan.of(ChangeKind.ATTACH_SUBJECTS)):
        result = results.of(change)
        for key in change.subject_keys:
            if result is None:
                text = f"The next run attributes it to customer {change.customer_key}: {change.reason}."
                reasons[key] = _Reason("planned", text, change)
            else:
                done = result.status in DONE
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
