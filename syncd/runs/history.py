"""Run history and audit log in SQLite: who asked for what when, the plan, each change and its answer.

Each change is written down as it happens, so that the log is true even where the process was killed.
Plans that say the same are stored once. A run that was killed is closed as failed by the next writer.

Runs are in the order in which they were written down, whatever time they tell: a clock may be set. They are
forgotten by the time that passed from run to run, so that a clock that is wrong by more than `LONGEST_PAUSE`
forgets nothing, already when syncd starts, and one that is wrong by less ages runs by so much at most.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from syncd.core.changes import Outcome, Plan
from syncd.core.errors import HistoryError
from syncd.http.client import encode_json
from syncd.runs.run import Run

_FILE = "history.sqlite3"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS plans (hash TEXT PRIMARY KEY, document BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
  id TEXT PRIMARY KEY, requested_at TEXT NOT NULL, finished_at TEXT, dry_run INTEGER NOT NULL,
  state TEXT NOT NULL, plan TEXT REFERENCES plans (hash), document TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS runs_by_time ON runs (requested_at);
CREATE TABLE IF NOT EXISTS changes (
  run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE, number INTEGER NOT NULL, at TEXT NOT NULL,
  kind TEXT NOT NULL, customer_key TEXT, status TEXT NOT NULL, document TEXT NOT NULL,
  PRIMARY KEY (run, number)
) WITHOUT ROWID;
"""

Document = dict[str, Any]

ALWAYS_KEPT = 100
"""So many of the latest runs stay, however old they are."""
LONGEST_PAUSE = timedelta(days=8)
"""Longer than a weekly schedule waits. A longer time from one run to the next may be a clock that was set."""


class History:
    """The log of one state directory; safe to use from any thread. All methods raise HistoryError."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / _FILE
        self._lock = threading.Lock()
        with self._told():
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def save(self, run: Document, plan: Plan | None = None) -> None:
        """Write a run as it is now (`Run.summary`), and its plan once there is one."""
        digest, packed = _packed(plan) if plan else (None, None)
        row = (run["id"], run["requested_at"], run["finished_at"], run["dry_run"], run["state"])
        with self._told(), self._db:
            if packed:
                self._db.execute("INSERT OR IGNORE INTO plans VALUES (?, ?)", (digest, packed))
            self._db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                " finished_at = excluded.finished_at, state = excluded.state, document = excluded.document,"
                " plan = coalesce(excluded.plan, plan)",
                (*row, digest, json.dumps(run)),
            )

    def record(self, run_id: str, first: int, outcomes: Sequence[Outcome]) -> None:
        """Write changes, numbered from `first`, and what became of them: all or none."""
        now = datetime.now(UTC).isoformat()
        rows = [
            (
                run_id,
                number,
                now,
                str(outcome.change.kind),
                outcome.change.customer_key,
                str(outcome.status),
                encode_json(outcome.to_json()).decode(),
            )
            for number, outcome in enumerate(outcomes, first)
        ]
        with self._told(), self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def close_interrupted(self) -> list[str]:
        """Mark runs as failed whose process is gone; for the holder of the write lock, before it plans."""
        ended = datetime.now(UTC).isoformat()
        closed: list[str] = []
        with self._told(), self._db:
            rows = self._db.execute("SELECT id, document FROM runs WHERE state = 'running' AND NOT dry_run")
            for run_id, text in rows.fetchall():
                error = "interrupted: its process ended before it did; what it had done until then is below"
                document = {**json.loads(text), "state": "failed", "finished_at": ended, "error": error}
                self._db.execute(
                    "UPDATE runs SET state = 'failed', finished_at = ?, document = ? WHERE id = ?",
                    (ended, json.dumps(document), run_id),
                )
                closed.append(run_id)
        return closed

    def prune(self, keep: timedelta, *, at_least: int = ALWAYS_KEPT) -> None:
        """Forget runs that are older than that (`outlived`), but for the latest `at_least`."""
        with self._told(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            # The index has all that is asked for, the table has the documents too.
            select = "SELECT rowid, requested_at FROM runs INDEXED BY runs_by_time"
            rows = sorted(self._db.execute(select).fetchall())
            asked = [datetime.fromisoformat(text) for _, text in rows]
            gone = min(outlived(asked, keep), len(rows) - at_least)
            if gone > 0:
                last = rows[gone - 1][0]
                self._db.execute("DELETE FROM runs WHERE rowid <= ? AND state <> 'running'", (last,))
            self._db.execute(
                "DELETE FROM plans WHERE hash NOT IN (SELECT plan FROM runs WHERE plan IS NOT NULL)"
            )

    def runs(self, limit: int, offset: int = 0) -> list[Document]:
        """Return the latest runs, the latest first, without the first `offset`."""
        select = "SELECT document FROM runs ORDER BY rowid DESC LIMIT ? OFFSET ?"
        with self._told():
            return [json.loads(text) for (text,) in self._db.execute(select, (limit, offset)).fetchall()]

    def progress(self, run_id: str) -> int:
        """Return how many changes of a run are written down so far."""
        with self._told():
            row = self._db.execute("SELECT count(*) FROM changes WHERE run = ?", (run_id,)).fetchone()
            return int(row[0])

    def run(self, run_id: str) -> Document | None:
        """Return a run by its id, or by the beginning of one, with its plan and changes."""
        with self._told():
            row = self._db.execute(
                "SELECT r.id, r.document, p.document FROM runs r LEFT JOIN plans p ON p.hash = r.plan"
                " WHERE substr(r.id, 1, length(?)) = ? ORDER BY r.rowid DESC LIMIT 1",
                (run_id, run_id),
            ).fetchone()
            if row is None or not run_id:
                return None
            changes = self._db.execute(
                "SELECT at, document FROM changes WHERE run = ? ORDER BY number", (row[0],)
            ).fetchall()
        plan = json.loads(zlib.decompress(row[2])) if row[2] else None
        results = [{"at": at, **json.loads(text)} for at, text in changes]
        return {**json.loads(row[1]), "plan": plan, "results": results}

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise HistoryError(
                f"the history {self._path} (daemon.state_dir) cannot be used: {error}"
            ) from None


def outlived(asked: Sequence[datetime], keep: timedelta) -> int:
    """Return how many of the first runs are older than `keep`, by the times at which runs were asked for.

    `asked` is in the order of the runs. The age of a run is the time from it to the last one, without
    steps of more than `LONGEST_PAUSE` from one run to the next, forth or back.
    """
    age, gone = timedelta(0), 0
    for place in range(len(asked) - 2, -1, -1):
        step = asked[place + 1] - asked[place]
        if abs(step) <= LONGEST_PAUSE:
            age += step
        if age <= keep:
            gone = 0
        elif not gone:
            gone = place + 1
    return gone


def _packed(plan: Plan) -> tuple[str, bytes]:
    """Return the plan and the name of its content; what changes with every look at usage is left out."""
    usual = tuple([replace(change, usage=None) if change.usage else change for change in plan.changes])
    document = replace(plan, changes=usual).to_json()
    del document["unbilled"]
    text = json.dumps(document, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest(), zlib.compress(text, level=1)


# MERGED: Writes what runs do into the history; where it cannot, the run ends before it changes anything more.


class HistoryRecorder:
    """An observer of runs (`syncd.runs.queue.Observer`); `keep` is asked each time how long runs stay."""

    def __init__(self, history: History, keep: Callable[[], timedelta]) -> None:
        self._history = history
        self._keep = keep
        self._number = 0

    def started(self, run: Run) -> None:  # noqa: ARG002 - as all observers are told
        """Begin a new list of changes; the run is written with its plan, under the write lock."""
        self._number = 0

    def planned(self, run: Run) -> None:
        """Write its plan down, before anything is done about it."""
        self._history.save(run.summary(), run.plan)

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        """Write changes down; what the plan itself blocks stands in the plan."""
        done = [outcome for outcome in outcomes if outcome.change.actionable]
        if done:
            self._history.record(run.id, self._number + 1, done)
            self._number += len(done)

    def finished(self, run: Run) -> None:
        """Write its end down, and forget what is too old."""
        self._history.save(run.summary())
        self._history.prune(self._keep())
