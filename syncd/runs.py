"""The daemon's runs: one at a time, at most one dry and one real waiting, the last ones remembered."""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol

import structlog

from syncd.changes import Plan
from syncd.errors import ApplyStoppedError, SyncdError
from syncd.outcome import Outcome, count
from syncd.runner import Result

_log = structlog.get_logger("syncd.runs")


class State(StrEnum):
    """Where a run is."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    BLOCKED = "blocked"
    """It went to its end, but something is left for a person to do."""
    FAILED = "failed"


FINISHED = frozenset({State.SUCCEEDED, State.BLOCKED, State.FAILED})


class Perform(Protocol):
    """What a run does: `syncd.runner.run` with a configuration."""

    def __call__(
        self, *, dry_run: bool, should_stop: Callable[[], bool], on_plan: Callable[[Plan], None]
    ) -> Result:
        """Do one run; raises SyncdError."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the daemon; times are UTC."""

    id: str
    trigger: str
    dry_run: bool
    requested_at: datetime
    state: State = State.QUEUED
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: str | None = None
    plan: Plan | None = None
    outcomes: tuple[Outcome, ...] = ()

    def summary(self) -> dict[str, object]:
        """Return the run without the single changes, as in GET /v1/status."""
        return {
            "id": self.id,
            "trigger": self.trigger,
            "dry_run": self.dry_run,
            "state": str(self.state),
            "requested_at": self.requested_at.isoformat(),
            "started_at": self.started_at.isoformat() if self.started_at else None,
            "finished_at": self.finished_at.isoformat() if self.finished_at else None,
            "error": self.error,
            "in_sync": self.plan.in_sync if self.plan else None,
            "planned": self.plan.summary() if self.plan else None,
            "outcomes": count(self.outcomes),
        }

    def to_json(self) -> dict[str, object]:
        """Return the run with its plan and all outcomes, as in GET /v1/syncs/{id}."""
        return {
            **self.summary(),
            "plan": self.plan.to_json() if self.plan else None,
            "results": [outcome.to_json() for outcome in self.outcomes],
        }


class Runs:
    """Queue, worker and memory of runs. `request`, `get` and `status` may be called from any thread."""

    def __init__(self, perform: Perform, stopping: threading.Event, *, remember: int = 50) -> None:
        self._perform = perform
        self._stopping = stopping
        self._remember = remember
        self._changed = threading.Condition()
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._queue: deque[str] = deque()
        self._current: str | None = None
        self._last_success: datetime | None = None

    def request(self, trigger: str, *, dry_run: bool) -> Run:
        """Queue a run and return it; one that waits already serves this request too."""
        with self._changed:
            for waiting in self._queue:
                if self._runs[waiting].dry_run == dry_run:
                    return self._runs[waiting]
            run = Run(uuid.uuid4().hex, trigger, dry_run, datetime.now(UTC))
            self._runs[run.id] = run
            self._queue.append(run.id)
            self._changed.notify_all()
            return run

    def get(self, run_id: str) -> Run | None:
        """Return a run that is still remembered."""
        with self._changed:
            return self._runs.get(run_id)

    def status(self) -> dict[str, object]:
        """Return what is going on: the shape of GET /v1/status without the schedule."""
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
        """Set `stopping`: the run in hand ends at its next change, no other starts, and `work` returns."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()

    def work(self) -> None:
        """Do the runs of the queue, one after the other, until `stop`."""
        while run := self._next():
            with structlog.contextvars.bound_contextvars(run=run.id, trigger=run.trigger):
                self._do(run)

    def _next(self) -> Run | None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping.is_set() or bool(self._queue))
            if self._stopping.is_set():
                return None
            self._current = self._queue.popleft()
            return self._update(self._current, state=State.RUNNING, started_at=datetime.now(UTC))

    def _do(self, run: Run) -> None:
        def keep_plan(plan: Plan) -> None:
            with self._changed:
                self._runs[run.id] = replace(self._runs[run.id], plan=plan)

        _log.info("sync_started", dry_run=run.dry_run)
        try:
            result = self._perform(dry_run=run.dry_run, should_stop=self._stopping.is_set, on_plan=keep_plan)
        except ApplyStoppedError as error:
            self._finish(run.id, state=State.FAILED, error=str(error), outcomes=error.outcomes)
        except SyncdError as error:
            self._finish(run.id, state=State.FAILED, error=str(error))
        except Exception:
            # One run that meets a mistake of ours must not end the daemon.
            _log.exception("sync_crashed")
            self._finish(run.id, state=State.FAILED, error="internal error; the daemon's log has the details")
        else:
            state = State.BLOCKED if result.blocked else State.SUCCEEDED
            self._finish(run.id, state=state, outcomes=result.outcomes)

    def _finish(
        self, run_id: str, *, state: State, error: str | None = None, outcomes: tuple[Outcome, ...] = ()
    ) -> None:
        with self._changed:
            self._current = None
            run = self._update(
                run_id, state=state, error=error, outcomes=outcomes, finished_at=datetime.now(UTC)
            )
            if state is not State.FAILED and not run.dry_run:
                self._last_success = run.finished_at
            while len(self._runs) > self._remember:
                oldest = next(iter(self._runs))
                if self._runs[oldest].state not in FINISHED:
                    break
                del self._runs[oldest]
        level = _log.error if state is State.FAILED else _log.info
        level("sync_finished", **{k: v for k, v in run.summary().items() if k not in {"id", "trigger"}})

    def _update(self, run_id: str, **fields: object) -> Run:
        run = replace(self._runs[run_id], **fields)  # type: ignore[arg-type]
        self._runs[run_id] = run
        return run
