"""The daemon's run queue, with a fake run; and requested runs that several daemons share."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from sqlalchemy import insert

from syncd.config.settings import Config
from syncd.core.changes import Outcome, Plan
from syncd.core.errors import ApplyStoppedError, SourceError
from syncd.http.retry import Permit
from syncd.runs.options import RunOptions
from syncd.runs.queue import Requests, RunQueue
from syncd.runs.reconciler import Reconciler, _Record
from syncd.runs.run import FINISHED, Run, RunState
from syncd.state import tables
from syncd.state.database import State
from syncd.state.location import StateLocation
from tests.syncd.waiting import eventually

EMPTY = Plan("default", "upsert-only", ())

Behave = Callable[[bool], tuple[Outcome, ...]]


@contextmanager
def working(behave: Behave, *, remember: int = 50) -> Iterator[RunQueue]:
    class Fake(Reconciler):
        def _perform(
            self, options: RunOptions, record: _Record, should_stop: Callable[[], bool], permit: Permit
        ) -> tuple[Outcome, ...]:
            record.planned(EMPTY)
            return behave(options.dry_run)

    runs = RunQueue(Fake(Config.model_construct()).reconcile, threading.Event(), remember=remember)
    worker = threading.Thread(target=runs.work)
    worker.start()
    try:
        yield runs
    finally:
        runs.stop()
        worker.join()


def run(runs: RunQueue, *, dry_run: bool = False) -> Run:
    asked = runs.request("manual", RunOptions(dry_run=dry_run))

    def ended() -> Run | None:
        found = runs.get(asked.id)
        assert found is not None
        return found if found.state in FINISHED else None

    return eventually(ended)


def test_an_internal_error_fails_one_run_and_not_the_daemon() -> None:
    errors = [ZeroDivisionError("secret-detail")]

    def behave(_dry_run: bool) -> tuple[Outcome, ...]:
        if errors:
            raise errors.pop()
        return ()

    with working(behave) as runs:
        crashed = run(runs)
        assert crashed.state is RunState.FAILED
        assert "secret-detail" not in str(crashed.error)
        assert run(runs).state is RunState.SUCCEEDED


def test_a_stopped_run_has_its_plan_and_outcomes() -> None:
    outcomes: tuple[Outcome, ...] = ()

    def behave(_dry_run: bool) -> tuple[Outcome, ...]:
        raise ApplyStoppedError("the metering API went away", outcomes)

    with working(behave) as runs:
        stopped = run(runs)
    assert (stopped.state, stopped.error, stopped.plan) == (
        RunState.FAILED,
        "the metering API went away",
        EMPTY,
    )


def test_only_a_real_run_without_an_error_counts_as_a_success() -> None:
    failures = [SourceError("kong", "gone")]

    def behave(_dry_run: bool) -> tuple[Outcome, ...]:
        if failures:
            raise failures.pop()
        return ()

    with working(behave) as runs:
        run(runs)
        run(runs, dry_run=True)
        assert runs.status()["last_success"] is None
        run(runs)
        assert runs.status()["last_success"] is not None


def test_the_oldest_runs_are_forgotten() -> None:
    with working(lambda _: (), remember=2) as runs:
        first, second, third = (run(runs) for _ in range(3))
        assert runs.get(first.id) is None
        assert runs.get(second.id) is not None
        assert runs.get(third.id) is not None


def test_a_request_after_the_start_of_a_run_queues_another_run() -> None:
    gate, inside = threading.Event(), threading.Event()

    def behave(_dry_run: bool) -> tuple[Outcome, ...]:
        inside.set()
        gate.wait(10)
        return ()

    with working(behave) as runs:
        going = runs.request("manual")
        assert inside.wait(10)
        assert runs.request("manual").id != going.id
        gate.set()


def test_a_request_that_a_newer_syncd_accepted_keeps_no_other_waiting(where: StateLocation) -> None:
    with State(where) as state:
        requests = Requests(state, lambda: None)
        newer = zlib.compress(b'{"dry_run": false, "reviewed": null, "an_option_of_later": true}')
        row = {"id": "newer", "options": newer, "summary": '{"trigger": "manual"}'}
        with state.writing() as connection:
            connection.execute(insert(tables.requested_runs), row)
        known = requests.add(Run("known", "manual", RunOptions(), datetime.now(UTC)))
        assert requests.get("newer") is None
        assert [run.id for run in requests.take(1)] == [known.id]
        assert requests.take(1) == []
        assert [run.id for run in requests.take(2)] == [known.id], "the next leader tries again"
