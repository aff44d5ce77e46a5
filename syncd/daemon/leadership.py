"""Leadership: which of several daemons that share a state in PostgreSQL does the runs.

All serve the API and the dashboard. The leader has the lease `leader`, does the scheduled runs and those that
people request of any daemon, and sends notifications. The lease decides who begins runs; what keeps two from
writing at once is the lease `writer` of each run (`syncd.runs.lock`). A daemon whose state is a file leads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import structlog

from syncd.core.errors import StateError
from syncd.runs.history import History
from syncd.runs.queue import Requests
from syncd.runs.run import FINISHED, Run, RunState
from syncd.state.database import State
from syncd.state.lease import Holder, Lease, LeaseName, holder_of

_log = structlog.get_logger("syncd.daemon.leadership")

_LOOK_SECONDS = 1.0
_LATEST = 50
"""Recorded runs among which a follower looks for the last one that counts."""


class Leadership:
    """Tries to become the leader and to stay it; `work` is the body of its thread.

    `elected` is called when this daemon begins to lead, and `requested` with each run that people request.
    """

    def __init__(self, state: State, stopping: threading.Event) -> None:
        self.elected: Callable[[], object] = lambda: None
        self.requested: Callable[[Run], object] = lambda _run: None
        self._state = state
        self._history = History(state)
        self._stopping = stopping
        self._woken = threading.Event()
        self._lease = None if state.where.url is None else Lease(state, LeaseName.LEADER, "syncd run")
        self.requests = None if self._lease is None else Requests(state, self._woken.set)
        self._leads = self._lease is None
        self._leader: Holder | None = None
        self._problem: str | None = None

    def leads(self) -> bool:
        """Return whether this daemon does the runs."""
        return self._leads and (self._lease is None or self._lease.may_be_held)

    def describe(self) -> dict[str, object]:
        """Return who leads, for GET /v1/status; nothing if no other daemon could."""
        if self._lease is None:
            return {}
        leader = None if self._leader is None else self._leader.to_json()
        return {"leads": self.leads(), "leader": leader}

    def begin(self) -> None:
        """Look once before anything else: a single daemon leads at once."""
        try:
            self._look()
        except StateError as error:
            self._failed(error)

    def work(self) -> None:
        """Look every second, until stopped; not at all if no other daemon could lead."""
        while self._lease is not None and not self._stopping.is_set():
            try:
                if self._look():
                    self.elected()
                self._take_requests()
            except StateError as error:
                self._failed(error)
            except Exception:
                # Without this thread nobody would take requests, and nothing would notice a lost lease.
                _log.exception("leadership_crashed")
            self._woken.wait(_LOOK_SECONDS)
            self._woken.clear()

    def wake(self) -> None:
        """End the wait of `work`, once `stopping` is set."""
        self._woken.set()

    def resign(self) -> None:
        """Let another daemon lead, once `work` has ended and no run is under way."""
        if self._lease is not None:
            self._lease.release()
            self._leads = False

    def last_recorded(self) -> dict[str, Any] | None:
        """Return the last real run of any daemon that has ended."""
        runs = self._history.runs(_LATEST)
        return next((run for run in runs if not run["dry_run"] and run["state"] in FINISHED), None)

    def recorded_status(self) -> dict[str, object]:
        """Return what GET /v1/status says of runs, from the history: the leader does them."""
        runs = self._history.runs(_LATEST)
        current = next((run for run in runs if run["state"] == RunState.RUNNING), None)
        good = (RunState.SUCCEEDED, RunState.BLOCKED)
        success = next((run for run in runs if not run["dry_run"] and run["state"] in good), None)
        return {
            "state": "running" if current else "idle",
            "current": current,
            "last": next((run for run in runs if run["state"] in FINISHED), None),
            "last_success": success and success["finished_at"],
            "next_run": None,
        }

    def last_planned(self) -> dict[str, Any] | None:
        """Return the latest run of any daemon that has a plan, with that; None if no other could lead."""
        if self._lease is None:
            return None
        for run in self._history.runs(_LATEST):
            found = self._history.run(run["id"]) if run["planned"] is not None else None
            if found is not None and found["plan"] is not None:
                del found["results"]
                return found
        return None

    def _look(self) -> bool:
        """Return whether this daemon has begun to lead just now."""
        if self._lease is None or self._stopping.is_set():
            return False
        if self._leads and self._lease.is_held:
            return False
        if self._leads:
            self._leads = False
            _log.warning("leadership_lost", consequence="another syncd does the next runs")
        got = self._lease.try_acquire()
        self._leader, self._problem = holder_of(self._state, LeaseName.LEADER), None
        if got:
            self._leads = True
            _log.info("leadership_acquired", term=self._lease.term)
        return got

    def _take_requests(self) -> None:
        if self.requests is None or self._lease is None or not self._leads:
            return
        for run in self.requests.take(self._lease.term):
            self.requested(run)

    def _failed(self, error: StateError) -> None:
        self._leader = None
        if self._problem != str(error):
            self._problem = str(error)
            _log.error("leadership_unknown", error=str(error))
