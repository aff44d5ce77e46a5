"""Leases: rights that one process at a time has, by an advisory lock of PostgreSQL in a session of its own.

Two exist: `leader` (who does the runs of several daemons) and `writer` (who changes customers just now). The
server ends the session, and with it the lock, at once if the process is gone, and `IDLE_SECONDS` after its
last heartbeat if it is frozen or cut off. A process that wakes up then must not act on a right that it no
longer has, so it proves its lease before each act (`Lease.require`): by a heartbeat that the server answered
at most `PROOF_SECONDS` ago, else by another one now.

A session may also end while its process continues, for instance when the server restarts. The next holder of
`writer` therefore waits until every proof of the one before is too old, unless that one gave its lease back.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from sqlalchemy import Connection, func, select, text, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from syncd.core.errors import LockedError
from syncd.state import tables
from syncd.state.database import IDLE_SECONDS, LEADER, WRITER, State, upserting

PROOF_SECONDS: Final = 4.0
"""How long a heartbeat proves a lease. Less than `IDLE_SECONDS`: proofs end before the lock does."""
_BEAT_SECONDS: Final = 1.0
_ANSWER_SECONDS: Final = 5.0
"""How long a proof may take."""


class LeaseName(Enum):
    """What there is one holder of; the value is the key of its lock."""

    WRITER = WRITER
    LEADER = LEADER


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has a lease."""

    who: str
    host: str
    pid: int
    since: str
    term: int

    def __str__(self) -> str:
        """Return the process as messages name it."""
        return f"{self.who} on {self.host} (process {self.pid}, since {self.since})"

    def to_json(self) -> dict[str, object]:
        """Return the holder as in GET /v1/status."""
        return {"who": self.who, "host": self.host, "pid": self.pid, "since": self.since, "term": self.term}


def now() -> float:
    """Return the seconds of a clock that also runs while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """A lease that this process has, or tries to get. `require` may be called by any thread."""

    def __init__(self, state: State, name: LeaseName, who: str) -> None:
        self._state = state
        self._name = name
        self._key = name.name.lower()
        self._who = who
        self._session: Connection | None = None
        self._session_use = threading.Lock()
        self._condition = threading.Condition()
        self._proven = 0.0
        self._asked = False
        self._problem: str | None = "it was never got"
        self.term = 0
        self.wait = 0.0
        """Seconds for which the holder before may still act."""
        self.waited = False
        """Whether they are over, so that the next holder need not wait for this one."""

    @property
    def is_held(self) -> bool:
        """Return whether nothing is known that has ended the lease."""
        return self._problem is None

    @property
    def may_be_held(self) -> bool:
        """Return whether the server may still keep the lease: not after a silence as long as it allows."""
        return self.is_held and now() < self._proven + IDLE_SECONDS

    def try_acquire(self) -> bool:
        """Try once to get the lease; raises StateError if the database cannot be used."""
        with self._state.errors_named():
            try:
                if self._session is None:
                    self._session = self._open()
                began = now()
                got = self._session.execute(select(func.pg_try_advisory_lock(*self._name.value)))
                if not got.scalar():
                    return False
                self._enter(self._session)
            except SQLAlchemyError:
                self._close()
                raise
        self._proven, self._problem, self.waited = began, None, self.wait == 0
        threading.Thread(target=self._beat, name=f"syncd-lease-{self._key}", daemon=True).start()
        return True

    def require(self) -> None:
        """Return if the lease is proven at this moment; raises LockedError if it is lost."""
        if self._problem is None and now() < self._proven + PROOF_SECONDS:
            return
        with self._condition:
            self._asked = True
            self._condition.notify_all()
            proven = self._condition.wait_for(
                lambda: self._problem is not None or now() < self._proven + PROOF_SECONDS, _ANSWER_SECONDS
            )
            if proven and self._problem is None:
                return
            problem = self._problem or f"{self._state.where} does not answer"
        raise LockedError(
            f"this syncd may no longer write, so it changed nothing more: it was silent for too long, or the"
            f" connection to the database ended ({problem}). The next run continues"
        )

    def release(self) -> None:
        """Give the lease back."""
        with self._condition:
            held, self._problem = self._problem is None, "it was given back"
            self._condition.notify_all()
        # A session whose statement has no answer is left to its thread, and to the server.
        if self._session_use.acquire(timeout=_ANSWER_SECONDS):
            try:
                if held and self.waited and self._session is not None:
                    leases = tables.leases
                    own = (leases.c.name == self._key) & (leases.c.term == self.term)
                    with suppress(SQLAlchemyError):
                        self._session.execute(update(leases).where(own).values(released=True))
                self._close()
            finally:
                self._session_use.release()

    def _open(self) -> Connection:
        session = self._state.session()
        # Before the lock is asked for: nobody may get it and then be silent.
        session.execute(text(f"SET idle_session_timeout = '{IDLE_SECONDS}s'"))
        session.execute(text(f"SET statement_timeout = '{_ANSWER_SECONDS:.0f}s'"))
        return session

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with suppress(SQLAlchemyError):
                session.close()

    def _enter(self, session: Connection) -> None:
        """Write down who has the lease, in the session that has it: one that was ended cannot."""
        leases, name = tables.leases, self._key
        before = session.execute(
            select(leases.c.term, leases.c.released).where(leases.c.name == name)
        ).first()
        self.term = before.term + 1 if before else 1
        self.wait = 0.0 if before is None or before.released else PROOF_SECONDS
        row = {
            "name": name,
            "term": self.term,
            "holder": json.dumps({"who": self._who, "host": socket.gethostname(), "pid": os.getpid()}),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "released": False,
        }
        entered = upserting(session, leases)
        entered = entered.on_conflict_do_update(
            index_elements=["name"],
            set_={column: entered.excluded[column] for column in ("term", "holder", "since", "released")},
        )
        session.execute(entered, row)

    def _beat(self) -> None:
        """Send heartbeats until the lease ends."""
        while self.is_held:
            with self._condition:
                self._condition.wait_for(lambda: self._asked or not self.is_held, _BEAT_SECONDS)
                self._asked = False
            began = now()
            with self._session_use:
                problem = self._heartbeat()
            with self._condition:
                if problem is None:
                    self._proven = began
                elif self.is_held:
                    self._problem = problem
                self._condition.notify_all()

    def _heartbeat(self) -> str | None:
        """Return why there can be none, if so."""
        if self._session is None:
            return "its session is closed"
        try:
            self._session.execute(text("SELECT 1"))
        except SQLAlchemyError as error:
            self._close()
            said = str(error.orig if isinstance(error, DBAPIError) else error).strip()
            return self._state.where.without_secrets(said)
        return None


def holder_of(state: State, name: LeaseName) -> Holder | None:
    """Return who has a lease now, None if nobody has."""
    leases = tables.leases.c
    query = select(leases.holder, leases.since, leases.term).where(leases.name == name.name.lower())
    with state.reading() as connection:
        if not _is_locked(connection, name) or (row := connection.execute(query).first()) is None:
            return None
    found: dict[str, Any] = json.loads(row.holder)
    return Holder(found["who"], found["host"], found["pid"], row.since, row.term)


def _is_locked(connection: Connection, name: LeaseName) -> bool:
    class_id, object_id = name.value
    query = text(
        "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = :class_id"
        " AND objid = :object_id AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    found = connection.execute(query, {"class_id": class_id, "object_id": object_id}).first()
    return found is not None
