"""Leases in a real PostgreSQL: one holder, also when processes are killed, frozen or cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from syncd.core.errors import LockedError
from syncd.runs.lock import write_lock
from syncd.state.database import State
from syncd.state.lease import PROOF_SECONDS, Lease, LeaseName, holder_of
from syncd.state.location import StateLocation
from tests.harness.postgres import Postgres
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow

HOLD = """
import pathlib, sys
from syncd.core.errors import LockedError
from syncd.runs.lock import write_lock
from syncd.state.database import State
from syncd.state.location import StateLocation
with State(StateLocation(pathlib.Path(), sys.argv[1])) as state, write_lock(state, "syncd apply") as permit:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            permit()
        except LockedError as error:
            print(f"lost: {error}", flush=True)
        else:
            print("permitted", flush=True)
"""


class Writer:
    """A process that holds the lock; says whether it may write."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert self.said() == "held"

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def may_write(self) -> str:
        self.ask()
        return self.said()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def writer(where: StateLocation) -> Iterator[Writer]:
    assert where.url is not None
    arguments = [sys.executable, "-c", HOLD, where.url]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Writer(process)
        finally:
            process.kill()


@pytest.fixture
def database(postgres: Postgres) -> StateLocation:
    return StateLocation(Path(), postgres.new_database())


def test_the_second_writer_is_told_who_writes(database: StateLocation) -> None:
    with writer(database) as first, State(database) as state:
        assert first.may_write() == "permitted"
        said = rf"another syncd is writing: syncd apply on \S+ \(process {first.process.pid}, since"
        with pytest.raises(LockedError, match=said), write_lock(state, "syncd run", patience=0):
            pass


def test_a_lease_that_was_given_back_is_free_at_once(database: StateLocation) -> None:
    with State(database) as state:
        begun = time.monotonic()
        for _ in range(3):
            with write_lock(state, "syncd apply", patience=0) as permit:
                permit()
            with pytest.raises(LockedError):
                permit()
        assert time.monotonic() - begun < PROOF_SECONDS


def test_the_writer_after_a_killed_one_waits_until_nothing_of_it_can_be_under_way(
    database: StateLocation,
) -> None:
    with writer(database) as first, State(database) as state:
        first.signal(signal.SIGKILL)
        first.process.wait()
        begun = time.monotonic()
        with write_lock(state, "syncd run", patience=10) as permit:
            assert PROOF_SECONDS <= time.monotonic() - begun < 10
            permit()


def test_a_frozen_writer_is_replaced_within_15_seconds_and_may_not_write_when_it_wakes_up(
    database: StateLocation,
) -> None:
    with writer(database) as first, State(database) as state:
        first.signal(signal.SIGSTOP)
        begun = time.monotonic()
        with write_lock(state, "syncd run", patience=20) as permit:
            assert time.monotonic() - begun < 15
            first.ask()
            first.signal(signal.SIGCONT)
            assert first.said().startswith("lost: this syncd may no longer write")
            permit()
            holder = holder_of(state, LeaseName.WRITER)
            assert holder is not None
            assert (holder.pid, holder.term) == (os.getpid(), 2)


def test_a_short_freeze_costs_nothing(database: StateLocation) -> None:
    with writer(database) as first:
        first.signal(signal.SIGSTOP)
        time.sleep(PROOF_SECONDS + 0.5)
        first.signal(signal.SIGCONT)
        assert first.may_write() == "permitted"


def test_a_writer_whose_session_was_ended_stops_before_the_next_may_begin(
    database: StateLocation, postgres: Postgres
) -> None:
    with writer(database) as first, State(database) as state:
        assert database.url is not None
        with psycopg.connect(database.url, autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        lost = threading.Event()

        def ask() -> None:
            while not lost.is_set():
                if first.may_write().startswith("lost"):
                    lost.set()

        asking = threading.Thread(target=ask)
        asking.start()
        with write_lock(state, "syncd run", patience=10):
            assert lost.is_set()
        asking.join()


def test_a_database_that_hangs_permits_nothing_and_hangs_nobody(
    database: StateLocation, postgres: Postgres
) -> None:
    with State(database) as state:
        lease = Lease(state, LeaseName.WRITER, "syncd apply")
        assert lease.try_acquire()
        lease.require()
        assert database.url is not None
        with psycopg.connect(database.url) as connection:
            backends = [
                row[0] for row in connection.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'")
            ]
        for pid in backends:
            os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: not is_permitted(lease), seconds=20)
            begun = time.monotonic()
            assert not is_permitted(lease)
            assert time.monotonic() - begun < 10
        finally:
            for pid in backends:
                os.kill(pid, signal.SIGCONT)
            lease.release()


def is_permitted(lease: Lease) -> bool:
    try:
        lease.require()
    except LockedError:
        return False
    return True
