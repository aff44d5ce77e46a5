"""Runs that people request while several daemons share a state: any of them accepts, the leader does them.

A request stays until its run has ended, so that each daemon can answer for it, and a new leader does what the
one before had accepted but not begun.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import delete, exists, insert, or_, select, update

from syncd.core.errors import QueueFullError
from syncd.planning.plan_file import from_json
from syncd.runs.history import History
from syncd.runs.options import TABLE, RunOptions
from syncd.runs.run import Run, RunState
from syncd.state import tables
from syncd.state.database import State

_log = structlog.get_logger("syncd.runs.requests")

_MAX_WAITING = 100


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
