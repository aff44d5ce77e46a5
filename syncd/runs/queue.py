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

from syncd.apply.executor import Report
from syncd.core.changes import Outcome, Plan
from syncd.core.errors import (
    ApiError,
    ApplyStoppedError,
    HistoryError,
    LockedError,
    PlanFileError,
    QueueFullError,
    SourceError,
    SyncdError,
    UnsafePlanError,
)
from syncd.runs.reconciler import Result, RunOptions
from syncd.runs.run import FINISHED, Run, RunState

_log = structlog.get_logger("syncd.runs.queue")


_MAX_WAITING = 100
_FAILURES: tuple[tuple[type[SyncdError], str], ...] = (
    (UnsafePlanError, "guard"),
    (SourceError, "source"),
    (ApiError, "metering"),
    (LockedError, "lock"),
    (HistoryError, "history"),
    (PlanFileError, "review"),
)


def _failure_kind(error: SyncdError) -> str:
    if isinstance(error, ApplyStoppedError):
        return "metering" if isinstance(error.__cause__, ApiError) else "stopped"
    return next((kind for type_, kind in _FAILURES if isinstance(error, type_)), "other")


class RunObserver(Protocol):
    """Observer of run events, called from one thread at a time: the history and the metrics."""

    def started(self, run: Run) -> None:
        """Handle the start of a run; a SyncdError ends the run."""

    def planned(self, run: Run) -> None:
        """Handle the plan; a SyncdError ends the run before its first change."""

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """Handle outcomes of some changes, in any thread; a SyncdError ends the run."""

    def finished(self, run: Run) -> None:
        """Handle the end of the run."""


class Perform(Protocol):
    """Does a run: `syncd.runs.reconciler.run` with a configuration, under the write lock."""

    def __call__(
        self,
        options: RunOptions,
        *,
        should_stop: Callable[[], bool],
        on_plan: Callable[[Plan], None],
        report: Report,
    ) -> Result:
        """Do one run; raises SyncdError."""


class RunQueue:
    """Queue, worker and memory of runs. `request`, `get` and `status` are thread-safe."""

    def __init__(
        self,
        perform: Perform,
        stopping: threading.Event,
        *,
        remember: int = 50,
        observers: Sequence[RunObserver] = (),
    ) -> None:
        self._perform = perform
        self._observers = observers
        self._stopping = stopping
        self._remember = remember
        self._changed = threading.Condition()
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._queue: deque[str] = deque()
        self._current: str | None = None
        self._last_success: datetime | None = None
        self._reported: list[Outcome] = []

    def request(self, trigger: str, options: RunOptions | None = None) -> Run:
        """Queue a run and return it; a queued run with the same options serves this request too."""
        options = options or RunOptions()
        with self._changed:
            for queued in self._queue:
                if self._runs[queued].options == options:
                    return self._runs[queued]
            if len(self._queue) >= _MAX_WAITING:
                raise QueueFullError(f"{_MAX_WAITING} different runs are already queued; try again later")
            run = Run(uuid.uuid4().hex, trigger, options, datetime.now(UTC))
            self._runs[run.id] = run
            self._queue.append(run.id)
            self._changed.notify_all()
            return run

    def get(self, run_id: str) -> Run | None:
        """Return a run that is still remembered."""
        with self._changed:
            return self._runs.get(run_id)

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

    def abandon(self) -> None:
        """End the run that is still under way, which waits for an answer, as failed; call `stop` before."""
        with self._changed:
            current = self._current
        if current is not None:
            self._finish(
                current,
                state=RunState.FAILED,
                error="stopped by request while it waited for an answer",
                outcomes=tuple(self._reported),
                failure="stopped",
            )

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
        def record_plan(plan: Plan) -> None:
            with self._changed:
                planned = self._update(run.id, plan=plan)
            for observer in self._observers:
                observer.planned(planned)

        self._reported = []

        def record_outcomes(outcomes: Sequence[Outcome]) -> None:
            self._reported += outcomes
            for observer in self._observers:
                observer.changed(run, outcomes)

        _log.info("run_started", dry_run=run.dry_run)
        try:
            for observer in self._observers:
                observer.started(run)
            result = self._perform(
                run.options, should_stop=self._stopping.is_set, on_plan=record_plan, report=record_outcomes
            )
        except ApplyStoppedError as error:
            self._finish(
                run.id,
                state=RunState.FAILED,
                error=str(error),
                outcomes=error.outcomes,
                failure=_failure_kind(error),
            )
        except SyncdError as error:
            self._finish(run.id, state=RunState.FAILED, error=str(error), failure=_failure_kind(error))
        except Exception:
            # An internal error in one run must not end the daemon.
            _log.exception("run_crashed")
            said = "internal error; the daemon's log has the details"
            self._finish(run.id, state=RunState.FAILED, error=said, failure="other")
        else:
            state = RunState.BLOCKED if result.blocked else RunState.SUCCEEDED
            self._finish(run.id, state=state, outcomes=result.outcomes)

    def _finish(self, run_id: str, *, state: RunState, **fields: object) -> None:
        if self._runs[run_id].state in FINISHED:
            return  # abandoned meanwhile
        finished = replace(self._runs[run_id], state=state, finished_at=datetime.now(UTC), **fields)  # type: ignore[arg-type]
        self._notify_finished(finished)
        with self._changed:
            self._current = None
            run = self._update(run_id, state=state, finished_at=datetime.now(UTC), **fields)
            if state is not RunState.FAILED and not run.dry_run:
                self._last_success = run.finished_at
            while len(self._runs) > self._remember:
                oldest = next(iter(self._runs))
                if self._runs[oldest].state not in FINISHED:
                    break
                del self._runs[oldest]
        level = _log.error if state is RunState.FAILED else _log.info
        level("run_finished", **{k: v for k, v in run.summary().items() if k not in {"id", "trigger"}})

    def _notify_finished(self, run: Run) -> None:
        """Call the observers before the run shows as finished, so that its history is complete by then."""
        for observer in self._observers:
            try:
                observer.finished(run)
            except SyncdError as error:
                _log.error("run_record_failed", error=str(error))

    def _update(self, run_id: str, **fields: object) -> Run:
        run = replace(self._runs[run_id], **fields)  # type: ignore[arg-type]
        self._runs[run_id] = run
        return run
