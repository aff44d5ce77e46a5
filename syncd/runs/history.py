"""Run history in SQLite: the trigger and options of each run, its plan, each change and its outcome.

Each change is written before it is made, as *begun*, and its outcome replaces that afterwards. So the
history of a killed process shows what was done and what may have been. Equal plans are stored once. The
next reader or writer closes a killed run as failed.

The schema has a version (`PRAGMA user_version`). A newer syncd brings older files up to date when it opens
them (`_MIGRATIONS`); an older one refuses newer files.

Runs are ordered by insertion, not by time, because clocks may be set. They expire by the time between runs:
a clock that is wrong by more than `MAX_RUN_GAP` expires no run, not even at the start of syncd, and one
that is wrong by less ages runs by at most that much.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from syncd.apply.executor import REFUSED
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.errors import HistoryError
from syncd.core.model import ObservedCustomer
from syncd.http.client import encode_json
from syncd.runs.run import Run, RunObserver

_FILE = "history.sqlite3"
_MIGRATIONS = (
    # 1: as files without a version have it, so its statements do nothing there.
    """
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
""",
    # 2: changes that have begun, and deletions that the metering API refused.
    """
CREATE TABLE begun (
  run TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE, change TEXT NOT NULL, at TEXT NOT NULL,
  document TEXT NOT NULL, PRIMARY KEY (run, change)
) WITHOUT ROWID;
CREATE TABLE refused_deletions (
  customer TEXT PRIMARY KEY, state TEXT NOT NULL, at TEXT NOT NULL, reason TEXT NOT NULL
) WITHOUT ROWID;
""",
)
"""Scripts that lead from one version of the schema to the next; never edit one that was released."""

Document = dict[str, Any]

_INTERRUPTED = (
    "interrupted: its process ended before the run did; the changes made until then are below, and the next"
    " run continues"
)
_UNKNOWN = "begun, but its outcome is not recorded: it may have been made or not"
_BY_SUBJECT = frozenset({ChangeKind.UPSERT_SUBJECT, ChangeKind.DELETE_SUBJECT})
_REFUSAL_PERIOD = timedelta(days=1)

MIN_RUNS = 100
"""Number of latest runs that never expire."""
MAX_RUN_GAP = timedelta(days=8)
"""Longer than a weekly schedule. A longer time between two runs may mean that a clock was set."""


class History:
    """The history of one state directory; thread-safe. All methods raise HistoryError."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / _FILE
        self._lock = threading.Lock()
        with self._access():
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate()

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise HistoryError(
                f"the history {self._path} (daemon.state_dir) was written by a newer syncd: its schema has"
                f" version {version}, and this syncd knows {len(_MIGRATIONS)}. Use that syncd, or another"
                " daemon.state_dir"
            )
        if version == len(_MIGRATIONS):
            return
        # In one transaction: two processes may open an old file at once, and either may be killed.
        steps = "".join(_MIGRATIONS[version:])
        try:
            self._db.executescript(
                f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {len(_MIGRATIONS)}; COMMIT;"
            )
        except sqlite3.OperationalError:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            (now,) = self._db.execute("PRAGMA user_version").fetchone()
            if now != len(_MIGRATIONS):  # else another process was faster
                raise

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def save(self, run: Document, plan: Plan | None = None) -> None:
        """Insert or update a run (`Run.summary`), and its plan once there is one."""
        digest, packed = _packed(plan) if plan else (None, None)
        row = (run["id"], run["requested_at"], run["finished_at"], run["dry_run"], run["state"])
        with self._access(), self._db:
            if packed:
                self._db.execute("INSERT OR IGNORE INTO plans VALUES (?, ?)", (digest, packed))
            self._db.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                " finished_at = excluded.finished_at, state = excluded.state, document = excluded.document,"
                " plan = coalesce(excluded.plan, plan)",
                (*row, digest, json.dumps(run)),
            )

    def begin(self, run_id: str, changes: Sequence[Change]) -> None:
        """Insert changes that are about to be made."""
        now = datetime.now(UTC).isoformat()
        rows = [(run_id, _label(one), now, encode_json(one.to_json()).decode()) for one in changes]
        with self._access(), self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?)", rows)

    def record(self, run_id: str, first: int, outcomes: Sequence[Outcome]) -> None:
        """Insert outcomes of changes, numbered from `first`, which then are no longer begun: all or none."""
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
        with self._access(), self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            ended = [(run_id, _label(outcome.change)) for outcome in outcomes]
            self._db.executemany("DELETE FROM begun WHERE run = ? AND change = ?", ended)

    def close_interrupted(self) -> list[str]:
        """Mark runs as failed whose process is gone. Call it with the write lock, before planning."""
        ended = datetime.now(UTC).isoformat()
        closed: list[str] = []
        with self._access(), self._db:
            rows = self._db.execute("SELECT id, document FROM runs WHERE state = 'running' AND NOT dry_run")
            for run_id, text in rows.fetchall():
                done = Counter(
                    dict(
                        self._db.execute(
                            "SELECT status, count(*) FROM changes WHERE run = ? GROUP BY status", (run_id,)
                        ).fetchall()
                    )
                )
                outcomes = {str(status): done[str(status)] for status in Status}
                ending = {
                    "state": "failed",
                    "finished_at": ended,
                    "error": _INTERRUPTED,
                    "outcomes": outcomes,
                }
                document = {**json.loads(text), **ending}
                self._db.execute(
                    "UPDATE runs SET state = 'failed', finished_at = ?, document = ? WHERE id = ?",
                    (ended, json.dumps(document), run_id),
                )
                closed.append(run_id)
        return closed

    def prune(self, keep: timedelta, *, at_least: int = MIN_RUNS) -> None:
        """Delete runs that are older than `keep` (`count_expired`), except the latest `at_least`."""
        with self._access(), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            # The index alone answers this; the table would read the documents too.
            select = "SELECT rowid, requested_at FROM runs INDEXED BY runs_by_time"
            rows = sorted(self._db.execute(select).fetchall())
            requested = [datetime.fromisoformat(text) for _, text in rows]
            expired = min(count_expired(requested, keep), len(rows) - at_least)
            if expired > 0:
                last = rows[expired - 1][0]
                self._db.execute("DELETE FROM runs WHERE rowid <= ? AND state <> 'running'", (last,))
            self._db.execute(
                "DELETE FROM plans WHERE hash NOT IN (SELECT plan FROM runs WHERE plan IS NOT NULL)"
            )

    def runs(self, limit: int, offset: int = 0) -> list[Document]:
        """Return the latest runs, newest first, without the first `offset`."""
        select = "SELECT document FROM runs ORDER BY rowid DESC LIMIT ? OFFSET ?"
        with self._access():
            return [json.loads(text) for (text,) in self._db.execute(select, (limit, offset)).fetchall()]

    def progress(self, run_id: str) -> int:
        """Return how many changes of a run are recorded so far."""
        with self._access():
            row = self._db.execute("SELECT count(*) FROM changes WHERE run = ?", (run_id,)).fetchone()
            return int(row[0])

    def run(self, run_id: str) -> Document | None:
        """Return a run by its id or a prefix of it, with its plan and changes."""
        with self._access():
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
            begun = self._db.execute(
                "SELECT at, document FROM begun WHERE run = ? ORDER BY at, change", (row[0],)
            ).fetchall()
        plan = json.loads(zlib.decompress(row[2])) if row[2] else None
        results = [{"at": at, **json.loads(text)} for at, text in changes]
        # The outcome of these is not known: the process ended first, or is at work on them.
        results += [
            {"at": at, "status": "begun", "detail": _UNKNOWN, "change": json.loads(text)}
            for at, text in begun
        ]
        return {**json.loads(row[1]), "plan": plan, "results": results}

    def refused_deletions(self, customers: Iterable[ObservedCustomer], now: datetime) -> dict[str, str]:
        """Return why the metering API refused to delete these customers, by id.

        A refusal holds while the customer is as it was then, and at most for `_REFUSAL_PERIOD`: an open
        invoice, which v3 does not show, becomes final without a trace on the customer.
        """
        with self._access():
            rows = self._db.execute("SELECT customer, state, at, reason FROM refused_deletions").fetchall()
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
        with self._access(), self._db:
            self._db.execute("BEGIN")
            for outcome in tried:
                identity = outcome.change.customer_id or ""
                self._db.execute("DELETE FROM refused_deletions WHERE customer = ?", (identity,))
                if outcome.status is Status.BLOCKED and outcome.detail.startswith(REFUSED):
                    row = (identity, _state_of(there[identity]), now.isoformat(), outcome.detail)
                    self._db.execute("INSERT INTO refused_deletions VALUES (?, ?, ?, ?)", row)

    @contextmanager
    def _access(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except (sqlite3.Error, OSError) as error:
            raise HistoryError(
                f"the history {self._path} (daemon.state_dir) cannot be used: {error}"
            ) from None


@contextmanager
def existing_history(state_dir: Path) -> Iterator[History | None]:
    """Open the history if there is one that can be used; a dry run needs none and creates none."""
    try:
        history = History(state_dir) if (state_dir / _FILE).exists() else None
    except (HistoryError, OSError):
        history = None
    try:
        yield history
    finally:
        if history is not None:
            history.close()


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
