"""Run queue of the daemon: runs one at a time, merges equal requests, and remembers the latest runs.

While several daemons share a state, people's requests are in the state: any daemon accepts them, the leader
does them. A request stays until its run has ended, so that each daemon can answer for it, and a new leader
does what the one before had accepted but not begun.
"""

from __future__ import annotations

import json
import threading
import uuid
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog
from sqlalchemy import delete, exists, insert, or_, select, update

from syncd.core.changes import Outcome
from syncd.core.errors import QueueFullError, SyncdError
from syncd.planning.plan_file import from_json
from syncd.runs.history import History
from syncd.runs.options import TABLE, RunOptions
from syncd.runs.run import FINISHED, Run, RunObserver, RunState
from syncd.state import tables
from syncd.state.database import State

_log = structlog.get_logger("syncd.runs.queue")

_MAX_WAITING = 100
SCHEDULE = "schedule"
"""The trigger of runs that the daemon starts by itself."""


class Reconcile(Protocol):
    """Does a run: `syncd.runs.reconciler.Reconciler.reconcile` with the configuration of that moment."""

    def __call__(self, run: Run, *, should_stop: Callable[[], bool], on_update: Callable[[Run], None]) -> Run:
        """Do one run, telling `on_update` how it goes; raises SyncdError."""


class ReportedOutcomes(RunObserver):
    """Keeps the outcomes of the run under way, for the record of one that is abandoned."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def started(self, run: Run) -> None:  # noqa: ARG002 - as all observers are called
        """Forget those of the run before."""
        self.outcomes = []

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:  # noqa: ARG002
        """Keep them."""
        self.outcomes += outcomes


class RunQueue:
    """Queue, worker and memory of runs. `request`, `get` and `status` are thread-safe.

    What people request goes to `shared` if there is that; the leader then takes it from there (`enqueue`).
    """

    def __init__(
        self,
        reconcile: Reconcile,
        stopping: threading.Event,
        *,
        remember: int = 50,
        shared: Requests | None = None,
    ) -> None:
        self._shared = shared
        self._reconcile = reconcile
        self._stopping = stopping
        self._remember = remember
        self._changed = threading.Condition()
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._queue: deque[str] = deque()
        self._current: str | None = None
        self._last_success: datetime | None = None

    def request(self, trigger: str, options: RunOptions | None = None) -> Run:
        """Queue a run and return it; a queued run with the same options serves this request too."""
        options = options or RunOptions()
        if self._shared is not None and trigger != SCHEDULE:
            return self._shared.add(Run(uuid.uuid4().hex, trigger, options, datetime.now(UTC)))
        with self._changed:
            for queued in self._queue:
                if self._runs[queued].options == options:
                    return self._runs[queued]
            if len(self._queue) >= _MAX_WAITING:
                raise QueueFullError(f"{_MAX_WAITING} different runs are already queued; try again later")
            run = Run(uuid.uuid4().hex, trigger, options, datetime.now(UTC))
            self._append(run)
            return run

    def enqueue(self, run: Run) -> None:
        """Queue a run that was requested of any daemon."""
        with self._changed:
            self._append(run)

    def _append(self, run: Run) -> None:
        self._runs[run.id] = run
        self._queue.append(run.id)
        self._changed.notify_all()

    def get(self, run_id: str) -> Run | None:
        """Return a run that is still remembered, or that waits for the leader."""
        with self._changed:
            run = self._runs.get(run_id)
        return self._shared.get(run_id) if run is None and self._shared is not None else run

    def last_planned(self) -> Run | None:
        """Return the latest run that has a plan."""
        with self._changed:
            return next((run for run in reversed(self._runs.values()) if run.plan), None)

    def last_real(self) -> Run | None:
        """Return the latest finished run that was not a dry run.

        A run that refused an outdated reviewed plan does not count, because nothing is wrong with the daemon.
        """
        with self._changed:
            real = (run for run in reversed(self._runs.values()) if not run.dry_run)
            return next((run for run in real if run.state in FINISHED and run.failure != "review"), None)

    def recent(self) -> tuple[Run, ...]:
        """Return the remembered runs, newest first."""
        with self._changed:
            return tuple(reversed(self._runs.values()))

    def status(self) -> dict[str, object]:
        """Return the status of the queue, as in GET /v1/status, without the schedule."""
        with self._changed:
            finished = [run for run in self._runs.values() if run.state in FINISHED]
            return {
                "state": "running" if self._current else "idle",
                "queued": len(self._queue),
                "current": self._runs[self._current].summary() if self._current else None,
                "last": finished[-1].summary() if finished else None,
                "last_success": self._last_success.isoformat() if self._last_success else None,
            }

    def stop(self) -> None:
        """Set `stopping`: the current run ends at its next change, no other starts, and `work` returns."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def abandon(self, outcomes: Sequence[Outcome] = ()) -> Run | None:
        """End the run that is still under way, which waits for an answer, as failed; call `stop` before.

        `outcomes` are those reported so far. Returns that run, None if there is none.
        """
        with self._changed:
            if self._current is None:
                return None
            abandoned = replace(
                self._runs[self._current],
                state=RunState.FAILED,
                finished_at=datetime.now(UTC),
                error="stopped by request while it waited for an answer",
                failure="stopped",
                outcomes=tuple(outcomes),
            )
        self._on_update(abandoned)
        return abandoned

    def work(self) -> None:
        """Run the queue, one run after the other, until `stop`."""
        while run := self._next():
            with structlog.contextvars.bound_contextvars(run=run.id, trigger=run.trigger):
                self._do(run)

    def _next(self) -> Run | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping.is_set() or bool(self._queue))
            if self._stopping.is_set():
                return None
            self._current = self._queue.popleft()
            return self._update(self._current, state=RunState.RUNNING, started_at=datetime.now(UTC))

    def _do(self, run: Run) -> None:
        _log.info("run_started", dry_run=run.dry_run)
        try:
            self._reconcile(run, should_stop=self._stopping.is_set, on_update=self._on_update)
        except SyncdError:
            pass  # the run has it
        except Exception:
            # An internal error in one run must not end the daemon.
            _log.exception("run_crashed")

    def _on_update(self, run: Run) -> None:
        with self._changed:
            if self._runs[run.id].state in FINISHED:
                return  # abandoned in the meantime
            self._runs[run.id] = run
            if run.state not in FINISHED:
                return
            self._current = None
            if run.state is not RunState.FAILED and not run.dry_run:
                self._last_success = run.finished_at
            while len(self._runs) > self._remember:
                oldest = next(iter(self._runs))
                if self._runs[oldest].state not in FINISHED:
                    break
                del self._runs[oldest]
        level = _log.error if run.state is RunState.FAILED else _log.info
        level("run_finished", **_logged(run))

    def _update(self, run_id: str, **fields: object) -> Run:
        run = replace(self._runs[run_id], **fields)  # type: ignore[arg-type]
        self._runs[run_id] = run
        return run


def _logged(run: Run) -> dict[str, object]:
    """Return the summary of a run for the log, without the counts that are zero: fifteen in most runs."""
    kept = {name: value for name, value in run.summary().items() if name not in {"id", "trigger"}}
    for name in ("planned", "outcomes", "unbilled", "options"):
        counts = kept[name]
        if isinstance(counts, dict):
            kept[name] = {key: count for key, count in counts.items() if count}
    return kept


class Requests:
    """The requested runs of a shared state; thread-safe. All methods raise StateError."""

    def __init__(self, state: State, wake: Callable[[], None]) -> None:
        self._state = state
        self._wake = wake

    def add(self, run: Run) -> Run:
        """Record a request and return its run; one with the same options that waits already serves both."""
        requested = tables.requested_runs
        packed = _packed(run.options)
        waiting = select(requested.c.id, requested.c.options, requested.c.summary).where(
            requested.c.term.is_(None)
        )
        with self._state.writing() as connection:
            rows = connection.execute(waiting).all()
            for row in rows:
                if row.options == packed:
                    return _run(row.id, row.options, row.summary)
            if len(rows) >= _MAX_WAITING:
                raise QueueFullError(f"{_MAX_WAITING} different runs are already queued; try again later")
            summary = json.dumps({"trigger": run.trigger, "requested_at": run.requested_at.isoformat()})
            connection.execute(insert(requested), {"id": run.id, "options": packed, "summary": summary})
        self._wake()
        return run

    def get(self, run_id: str) -> Run | None:
        """Return a requested run, as queued; None once the history has it."""
        requested, runs = tables.requested_runs.c, tables.runs.c
        found = select(requested.id, requested.options, requested.summary).where(
            requested.id == run_id, ~exists().where(runs.id == requested.id)
        )
        with self._state.reading() as connection:
            row = connection.execute(found).first()
        return _readable(*row) if row else None

    def take(self, term: int) -> list[Run]:
        """Return the requests that no leader of this term or a later one has taken, and mark them as taken.

        Those of an earlier leader whose runs the history has are gone: they were cut off.
        """
        requested, runs = tables.requested_runs, tables.runs.c
        untaken = or_(requested.c.term.is_(None), requested.c.term < term)
        recorded = exists().where(runs.id == requested.c.id)
        with self._state.reading() as connection:
            if connection.execute(select(requested.c.id).where(untaken)).first() is None:
                return []
        with self._state.writing() as connection:
            connection.execute(delete(requested).where(requested.c.term < term, recorded))
            rows = connection.execute(
                select(requested.c.id, requested.c.options, requested.c.summary)
                .where(untaken)
                .order_by(requested.c.number)
            ).all()
            connection.execute(update(requested).where(untaken).values(term=term))
        return [run for row in rows if (run := _readable(*row)) is not None]

    def end(self, run_id: str) -> None:
        """Remove the request of a run that has ended."""
        with self._state.writing() as connection:
            connection.execute(delete(tables.requested_runs).where(tables.requested_runs.c.id == run_id))


def reviewed_in(history: History, run_id: str) -> RunOptions | None:
    """Return the options that apply the plan of a recorded dry run; None if it cannot be applied."""
    document = history.run(run_id)
    if document is None or document["id"] != run_id or not document["plan"]:
        return None
    if not document["dry_run"] or document["state"] != RunState.SUCCEEDED:
        return None
    try:
        plan = from_json(document["plan"])
    except ValueError:  # another version of syncd made it
        return None
    return RunOptions(reviewed=plan).as_reviewed(document.get("options") or {})


def _packed(options: RunOptions) -> bytes:
    given: dict[str, object] = {name: getattr(options, name) for name in TABLE}
    plan = options.reviewed.to_json() if options.reviewed else None
    document = {**given, "dry_run": options.dry_run, "reviewed": plan}
    return zlib.compress(json.dumps(document, sort_keys=True).encode(), level=1)


def _readable(run_id: str, packed: bytes, summary: str) -> Run | None:
    """Return a requested run; None if another version of syncd wrote options that this one does not know."""
    try:
        return _run(run_id, packed, summary)
    except (TypeError, ValueError, KeyError, zlib.error):
        consequence = "it waits for a leader of the version that accepted it; others go on"
        _log.error("request_unreadable", run=run_id, consequence=consequence)
        return None


def _run(run_id: str, packed: bytes, summary: str) -> Run:
    given: dict[str, Any] = json.loads(zlib.decompress(packed))
    plan = given.pop("reviewed")
    options = RunOptions(**given, reviewed=from_json(plan) if plan else None)
    asked = json.loads(summary)
    return Run(run_id, asked["trigger"], options, datetime.fromisoformat(asked["requested_at"]))
