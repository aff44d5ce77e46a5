"""Run history: the trigger and options of each run, its plan, each change and its outcome.

Each change is written before it is made, as *begun*, and its outcome replaces that afterwards. So the
history of a killed process shows what was done and what may have been. Equal plans are stored once. The
next reader or writer closes a killed run as failed.

Runs are ordered by insertion, not by time, because clocks may be set. They expire by the time between runs:
a clock that is wrong by more than `MAX_RUN_GAP` expires no run, not even at the start of syncd, and one
that is wrong by less ages runs by at most that much.

`DirectoryRecorder` records what runs observe, for the pages: customers, and the names behind their subjects.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, or_, select, update

from syncd.apply.executor import REFUSED
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.errors import LockedError
from syncd.core.model import ObservedCustomer
from syncd.customers.directory import Directory
from syncd.http.json import encode_json
from syncd.mapping.claims import subjects_of
from syncd.mapping.rules import MappingRules
from syncd.runs.ignored import IgnoredSubjects
from syncd.runs.passes import BothSides
from syncd.runs.run import Run, RunObserver
from syncd.state import tables
from syncd.state.database import WRITER, State, upserting

Document = dict[str, Any]

_INTERRUPTED = (
    "interrupted: its process ended before the run did; the changes made until then are below, and the next"
    " run continues"
)
_UNKNOWN = "begun, but its outcome is not recorded: it may have been made or not"
_MADE = (str(Status.DONE), str(Status.UNCHANGED))
_BY_SUBJECT = frozenset({ChangeKind.UPSERT_SUBJECT, ChangeKind.DELETE_SUBJECT})
_REFUSAL_PERIOD = timedelta(days=1)

MIN_RUNS = 100
"""Number of latest runs that never expire."""
MAX_RUN_GAP = timedelta(days=8)
"""Longer than a weekly schedule. A longer time between two runs may mean that a clock was set."""


class History:
    """The runs of a state; thread-safe. All methods raise StateError."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.ignored = IgnoredSubjects(state)

    def save(self, run: Document, plan: Plan | None = None) -> None:
        """Insert or update a run (`Run.summary`), and its plan once there is one.

        Raises LockedError if the run has been closed, because its process seemed to be gone.
        """
        digest, packed = _packed(plan) if plan else (None, None)
        row = {name: run[name] for name in ("id", "requested_at", "finished_at", "dry_run", "state")}
        closed = select(tables.runs.c.id).where(
            tables.runs.c.id == run["id"], tables.runs.c.finished_at.is_not(None)
        )
        with self.state.writing() as connection:
            if connection.execute(closed).first() is not None:
                raise _closed(run["id"])
            if packed:
                added = upserting(connection, tables.plans).on_conflict_do_nothing()
                connection.execute(added, {"hash": digest, "document": packed})
            saved = upserting(connection, tables.runs)
            saved = saved.on_conflict_do_update(
                index_elements=["id"],
                set_={
                    "finished_at": saved.excluded.finished_at,
                    "state": saved.excluded.state,
                    "document": saved.excluded.document,
                    "plan": func.coalesce(saved.excluded.plan, tables.runs.c.plan),
                },
            )
            connection.execute(saved, {**row, "plan": digest, "document": json.dumps(run)})

    def begin(self, run_id: str, changes: Sequence[Change]) -> None:
        """Insert changes that are about to be made; raises LockedError if the run has been closed."""
        now = datetime.now(UTC).isoformat()
        rows = {
            label: {"run": run_id, "change": label, "at": now, "document": _encoded(one.to_json())}
            for label, one in ((_label(one), one) for one in changes)
        }
        if not rows:
            return
        runs = tables.runs.c
        open_run = select(runs.id).where(runs.id == run_id, runs.finished_at.is_(None))
        with self.state.writing() as connection:
            if connection.execute(open_run).first() is None:
                raise _closed(run_id)
            begun = upserting(connection, tables.begun)
            begun = begun.on_conflict_do_update(
                index_elements=["run", "change"],
                set_={"at": begun.excluded.at, "document": begun.excluded.document},
            )
            connection.execute(begun, list(rows.values()))

    def record(self, run_id: str, first: int, outcomes: Sequence[Outcome]) -> None:
        """Insert outcomes of changes, numbered from `first`, which then are no longer begun: all or none."""
        if not outcomes:
            return
        now = datetime.now(UTC).isoformat()
        rows = [
            {
                "run": run_id,
                "number": number,
                "at": now,
                "kind": str(outcome.change.kind),
                "customer_key": outcome.change.customer_key,
                "status": str(outcome.status),
                "document": _encoded(outcome.to_json()),
            }
            for number, outcome in enumerate(outcomes, first)
        ]
        begun = tables.begun.c
        ended = delete(tables.begun).where(begun.run == run_id, begun.change == bindparam("label"))
        with self.state.writing() as connection:
            connection.execute(insert(tables.changes), rows)
            connection.execute(ended, [{"label": _label(outcome.change)} for outcome in outcomes])

    def close_interrupted(self, *, unless_locked: bool = False) -> list[str]:
        """Mark runs as failed whose process is gone. Call it with the write lock, before planning.

        `unless_locked`, which a state in PostgreSQL has, needs no lock: no writer may begin meanwhile.
        """
        ended = datetime.now(UTC).isoformat()
        runs, changes = tables.runs.c, tables.changes.c
        open_runs = select(runs.id, runs.document).where(runs.state == "running", runs.dry_run.is_(False))
        closed: list[str] = []
        with self.state.writing() as connection:
            if unless_locked and not connection.scalar(select(func.pg_try_advisory_xact_lock(*WRITER))):
                return []
            for run_id, text in connection.execute(open_runs).all():
                counted = select(changes.status, func.count()).where(changes.run == run_id)
                by_status = connection.execute(counted.group_by(changes.status)).all()
                done: Counter[str] = Counter(dict(by_status))
                ending = {
                    "state": "failed",
                    "finished_at": ended,
                    "error": _INTERRUPTED,
                    "outcomes": {str(status): done[str(status)] for status in Status},
                }
                document = json.dumps({**json.loads(text), **ending})
                connection.execute(
                    update(tables.runs)
                    .where(runs.id == run_id)
                    .values(state="failed", finished_at=ended, document=document)
                )
                closed.append(run_id)
        return closed

    def prune(self, keep: timedelta, *, at_least: int = MIN_RUNS) -> None:
        """Delete runs that are older than `keep` (`count_expired`), except the latest `at_least`."""
        runs = tables.runs.c
        with self.state.writing() as connection:
            # Sorted here: the index alone answers this, while the table would read the documents too.
            found = connection.execute(select(runs.number, runs.requested_at))
            rows = sorted((number, text) for number, text in found)
            requested = [datetime.fromisoformat(text) for _, text in rows]
            expired = min(count_expired(requested, keep), len(rows) - at_least)
            if expired > 0:
                last = rows[expired - 1][0]
                connection.execute(delete(tables.runs).where(runs.number <= last, runs.state != "running"))
            used = select(runs.plan).where(runs.plan.is_not(None))
            connection.execute(delete(tables.plans).where(tables.plans.c.hash.not_in(used)))

    def runs(self, limit: int, offset: int = 0) -> list[Document]:
        """Return the latest runs, newest first, without the first `offset`."""
        latest = select(tables.runs.c.document).order_by(tables.runs.c.number.desc())
        with self.state.reading() as connection:
            found = connection.execute(latest.limit(limit).offset(offset)).scalars().all()
        return [json.loads(text) for text in found]

    def progress(self, run_id: str) -> int:
        """Return how many changes of a run are recorded so far."""
        counted = select(func.count()).select_from(tables.changes).where(tables.changes.c.run == run_id)
        with self.state.reading() as connection:
            return connection.execute(counted).scalar_one()

    def run(self, run_id: str) -> Document | None:
        """Return a run by its id or a prefix of it, with its plan and changes."""
        if not run_id:
            return None
        runs, plans, changes, begun = tables.runs.c, tables.plans.c, tables.changes.c, tables.begun.c
        found = (
            select(runs.id, runs.document, plans.document)
            .select_from(tables.runs.outerjoin(tables.plans))
            .where(func.substr(runs.id, 1, len(run_id)) == run_id)
            .order_by(runs.number.desc())
            .limit(1)
        )
        with self.state.reading() as connection:
            row = connection.execute(found).first()
            if row is None:
                return None
            identity, document, packed = row
            made = connection.execute(
                select(changes.at, changes.document).where(changes.run == identity).order_by(changes.number)
            ).all()
            under_way = connection.execute(
                select(begun.at, begun.document).where(begun.run == identity).order_by(begun.at, begun.change)
            ).all()
        plan = json.loads(zlib.decompress(packed)) if packed else None
        results = [{"at": at, **json.loads(text)} for at, text in made]
        # The outcome of these is not known: the process ended first, or is at work on them.
        results += [
            {"at": at, "status": "begun", "detail": _UNKNOWN, "change": json.loads(text)}
            for at, text in under_way
        ]
        return {**json.loads(document), "plan": plan, "results": results}

    def changes_of(self, customer_key: str, limit: int) -> list[Document]:
        """Return the latest changes of a customer that runs made or tried, newest first.

        Subject entities that were written are left out: each follows a change of its customer.
        """
        changes = tables.changes.c
        wanted = select(changes.run, changes.at, changes.document).where(
            changes.customer_key == customer_key,
            or_(changes.kind != str(ChangeKind.UPSERT_SUBJECT), changes.status.not_in(_MADE)),
        )
        with self.state.reading() as connection:
            rows = connection.execute(wanted.order_by(changes.at.desc(), changes.number.desc()).limit(limit))
            return [{"run": row.run, "at": row.at, **json.loads(row.document)} for row in rows]

    def refused_deletions(self, customers: Iterable[ObservedCustomer], now: datetime) -> dict[str, str]:
        """Return why the metering API refused to delete these customers, by id.

        A refusal holds while the customer is as it was then, and at most for `_REFUSAL_PERIOD`: an open
        invoice, which v3 does not show, becomes final without a trace on the customer.
        """
        refused = tables.refused_deletions.c
        with self.state.reading() as connection:
            rows = connection.execute(
                select(refused.customer, refused.state, refused.at, refused.reason)
            ).all()
        if not rows:
            return {}
        there = {customer.id: customer for customer in customers}
        return {
            identity: reason
            for identity, state, at, reason in rows
            if identity in there
            and _state_of(there[identity]) == state
            and abs(now - datetime.fromisoformat(at)) < _REFUSAL_PERIOD
        }

    def remember_refused_deletions(
        self, outcomes: Iterable[Outcome], customers: Iterable[ObservedCustomer], now: datetime
    ) -> None:
        """Keep the reasons of deletions that the metering API refused, and forget those of others."""
        tried = [outcome for outcome in outcomes if outcome.change.kind is ChangeKind.DELETE_CUSTOMER]
        if not tried:
            return
        there = {customer.id: customer for customer in customers}
        refused = tables.refused_deletions
        with self.state.writing() as connection:
            for outcome in tried:
                identity = outcome.change.customer_id or ""
                connection.execute(delete(refused).where(refused.c.customer == identity))
                if outcome.status is Status.BLOCKED and outcome.detail.startswith(REFUSED):
                    row = {
                        "customer": identity,
                        "state": _state_of(there[identity]),
                        "at": now.isoformat(),
                        "reason": outcome.detail,
                    }
                    connection.execute(insert(refused), row)


def _closed(run_id: str) -> LockedError:
    return LockedError(
        f"run {run_id} was closed by another syncd, because this one seemed to be gone; it changes nothing"
        " more"
    )


def count_expired(requested: Sequence[datetime], keep: timedelta) -> int:
    """Return how many of the first runs are older than `keep`.

    `requested` are the times at which the runs were requested, in order of insertion. The age of a run is
    the time from it to the last run, without gaps between two runs of more than `MAX_RUN_GAP` forwards or
    backwards.
    """
    age, expired = timedelta(0), 0
    for index in range(len(requested) - 2, -1, -1):
        step = requested[index + 1] - requested[index]
        if abs(step) <= MAX_RUN_GAP:
            age += step
        if age <= keep:
            expired = 0
        elif not expired:
            expired = index + 1
    return expired


def _encoded(document: object) -> str:
    return encode_json(document).decode()


def _label(change: Change) -> str:
    """Return what identifies a change within its run."""
    subject = change.subject_keys[0] if change.kind in _BY_SUBJECT else None
    parts = (str(change.kind), change.customer_id, change.customer_key, change.to_customer_key, subject)
    return json.dumps(parts)


def _state_of(customer: ObservedCustomer) -> str:
    """Return a digest of a customer, by which a change of it shows."""
    fields = (customer.name, customer.subject_keys, dict(customer.metadata), customer.active_subscription)
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _packed(plan: Plan) -> tuple[str, bytes]:
    """Return the hash of a plan and the packed plan, without usage, which differs in each run."""
    changes = tuple([replace(change, usage=None) if change.usage else change for change in plan.changes])
    document = replace(plan, changes=changes).to_json()
    del document["unbilled"]
    text = json.dumps(document, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest(), zlib.compress(text, level=1)


class HistoryRecorder(RunObserver):
    """Records runs in the history.

    If it cannot, the run ends before its next change. `keep` returns how long runs stay; it is called at the
    end of each run.
    """

    def __init__(self, history: History, keep: Callable[[], timedelta]) -> None:
        self._history = history
        self._keep = keep
        self._number = 0

    def started(self, run: Run) -> None:  # noqa: ARG002 - the signature of all observers
        """Reset the number of changes; the run itself is recorded with its plan, under the write lock."""
        self._number = 0

    def planned(self, run: Run) -> None:
        """Record the run and its plan before the first change."""
        self._history.save(run.summary(), run.plan)

    def begun(self, run: Run, changes: Sequence[Change]) -> None:
        """Record changes before they are made."""
        self._history.begin(run.id, changes)

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """Record outcomes; changes that the plan itself blocks are part of the plan."""
        done = [outcome for outcome in outcomes if outcome.change.actionable]
        if done:
            self._history.record(run.id, self._number + 1, done)
            self._number += len(done)

    def finished(self, run: Run) -> None:
        """Record the end of the run, and delete expired runs."""
        self._history.save(run.summary())
        self._history.prune(self._keep())


class DirectoryRecorder(RunObserver):
    """Keeps the directory up to date.

    A run that only previews what an option would do says nothing about the concerns of customers now.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def observed(self, run: Run, read: BothSides, rules: MappingRules) -> None:
        """Keep all customers, and the principals behind the subjects."""
        subjects = subjects_of(read.principals, rules)
        at = run.started_at or run.requested_at
        self._directory.observe(read.observed.customers, subjects, rules.owner_id, at)

    def finished(self, run: Run) -> None:
        """Keep what the run made of them, and their concerns."""
        if run.plan is None or not run.options.scope.whole:
            return
        if run.dry_run and (run.options.adopt or run.options.allow_move):
            return
        self._directory.settle(run.plan, run.outcomes, run.unbilled)
