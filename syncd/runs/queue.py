"""Run queue of the daemon: runs one at a time, merges equal requests, and remembers the latest runs."""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

import structlog

from syncd.core.changes import Outcome
from syncd.core.errors import QueueFullError, SyncdError
from syncd.runs.options import RunOptions
from syncd.runs.run import FINISHED, Run, RunObserver, RunState

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


class Shared(Protocol):
    """Requested runs that several daemons share: `syncd.runs.requests.Requests`."""

    def add(self, run: Run) -> Run:
        """Record a request and return its run."""

    def get(self, run_id: str) -> Run | None:
        """Return a requested run that has not begun."""


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
        shared: Shared | None = None,
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
