"""``syncd apply``: shows a plan, asks, applies it under the write lock and records the run in the history."""

from __future__ import annotations

import contextvars
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console

from openmeter_plugin.units import plural
from syncd.cli import plan_text, render
from syncd.cli.options import ERROR, complain, console, finish, print_json
from syncd.cli.render import Steps, steps
from syncd.config.settings import Config
from syncd.core.changes import Outcome, Plan, count
from syncd.core.errors import SyncdError, UnsafePlanError
from syncd.planning import plan_file
from syncd.runs.factory import existing_history
from syncd.runs.history import History, HistoryRecorder
from syncd.runs.options import RunOptions
from syncd.runs.passes import WOULD_STOP
from syncd.runs.reconciler import Reconciler, record_end
from syncd.runs.run import Run, RunObserver, RunState, new_run
from syncd.state.database import State


def apply(config: Config, options: RunOptions, *, plan_path: Path | None, ask: bool, as_json: bool) -> Run:
    """Plan, ask if wanted, and apply; prints the plan and what was done.

    Raises SyncdError; what was done until then is printed all the same, also after a signal.
    """
    printer = None if as_json else console()
    if plan_path is not None:
        reviewed, made_with = plan_file.read(plan_path)
        options = replace(options.as_reviewed(made_with), reviewed=reviewed)
    elif ask and printer:
        options = replace(options, reviewed=_agreed(config, options, printer))
    with State(config.daemon.state) as state, steps() as progress:
        history = History(state)
        recorder = HistoryRecorder(history, lambda: config.daemon.keep_runs)
        terminal = _Terminal(printer, progress, shows_plan=not ask)
        observers, stopping = (recorder, terminal), Stopping()

        def work() -> Run:
            reconciler = Reconciler(config, history, observers, sleep=stopping.wait)
            return reconciler.reconcile(new_run("apply", options), should_stop=stopping.is_set)

        try:
            return until_stopped(work, stopping)
        except AbandonedError:
            terminal.abandon(observers)
            terminal.show()
            leave(stopping.status)
        except SyncdError as error:
            shown = terminal.show()
            if stopping.is_set():
                complain(error)
                finish(stopping.status)
            if shown and as_json:
                complain(error)
                finish(ERROR)
            raise
        finally:
            terminal.show()


_UNTOUCHED = "stopped by request; nothing was changed"


def _agreed(config: Config, options: RunOptions, printer: Console) -> Plan:
    """Show a plan and ask; return it once a person agrees. Nothing is locked while they read.

    A signal ends the process with its status.
    """
    stopping = Stopping()
    plan = _dry_run(config, options, stopping).made_plan
    plan_text.show_plan(printer, plan)
    if would_stop := next((note for note in plan.notes if note.startswith(WOULD_STOP)), None):
        raise UnsafePlanError(would_stop.removeprefix(WOULD_STOP))
    if plan.actionable and not _yes(stopping):
        raise SyncdError("nothing was changed")
    return plan


def _dry_run(config: Config, options: RunOptions, stopping: Stopping) -> Run:
    with existing_history(config) as history, steps() as progress:

        def work() -> Run:
            progress.begin("reading sources and customers")
            reconciler = Reconciler(config, history, sleep=stopping.wait)
            run = new_run("plan", replace(options, dry_run=True))
            return reconciler.reconcile(run, should_stop=stopping.is_set)

        made = None
        try:
            made = until_stopped(work, stopping)
        except AbandonedError:
            progress.hide()
            complain(_UNTOUCHED)
            leave(stopping.status)
        except SyncdError:
            if not stopping.is_set():
                raise
    if made is None or stopping.is_set():
        complain(_UNTOUCHED)
        finish(stopping.status)
    return made


def _yes(stopping: Stopping) -> bool:
    """Ask on the terminal; only the word yes, or y, is one."""
    answer = None
    with _caught(stopping.handle):
        sys.stdout.write("Apply this plan? [y/N] ")
        sys.stdout.flush()
        # input() misses a signal that comes between its prompt and its read: Python only notes it then.
        while answer is None and not stopping.is_set():
            if select.select([sys.stdin], [], [], _TICK)[0]:
                answer = sys.stdin.readline()
    if answer is None:
        print()
        complain(_UNTOUCHED)
        finish(stopping.status)
    if not answer:
        print()
    return answer.strip().lower() in {"y", "yes"}


def can_ask() -> bool:
    """Return whether a person can read a question and answer it."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class _Terminal(RunObserver):
    """Shows the plan and the progress of a run, and once it has ended what was done."""

    def __init__(self, printer: Console | None, progress: Steps, *, shows_plan: bool) -> None:
        self._printer = printer
        self._progress = progress
        self._shows_plan = shows_plan
        self._run: Run | None = None
        self._outcomes: list[Outcome] = []
        self._ended: Run | None = None

    def started(self, run: Run) -> None:
        self._run = run
        self._progress.begin("reading sources and customers")

    def planned(self, run: Run) -> None:
        self._run = run
        self._progress.hide()
        if self._printer and self._shows_plan:
            plan_text.show_plan(self._printer, run.made_plan)
        self._progress.begin("applying", sum(change.actionable for change in run.made_plan.changes))

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:  # noqa: ARG002
        self._outcomes += outcomes
        self._progress.advance(len(outcomes))

    def finished(self, run: Run) -> None:
        # A run that a guard or a reviewed plan stopped has no outcomes to show.
        if run.plan is not None and (run.error is None or run.outcomes or run.failure in _WHILE_APPLYING):
            self._ended = run

    def abandon(self, observers: Sequence[RunObserver]) -> None:
        """Record the end of a run whose thread is left behind."""
        if self._run is not None and self._ended is None:
            ended = replace(
                self._run,
                state=RunState.FAILED,
                finished_at=datetime.now(UTC),
                error="stopped by request while it waited for an answer",
                failure="stopped",
                outcomes=tuple(self._outcomes),
            )
            record_end(ended, observers)
            if self._ended is None:
                complain(_UNTOUCHED)

    def show(self) -> bool:
        """Print what was done, once; returns whether there is something."""
        self._progress.hide()
        run, self._ended = self._ended, None
        if run is None:
            return False
        if self._printer is None:
            results = [outcome.to_json() for outcome in run.outcomes]
            document = {"plan": run.made_plan.to_json(), "summary": count(run.outcomes), "outcomes": results}
            print_json({**document, "error": run.error})
            return True
        plan_text.show_outcomes(self._printer, run.outcomes)
        todo = len(run.made_plan.actionable) - sum(o.change.actionable for o in run.outcomes)
        if run.failure == "stopped" and todo:
            left = plural(todo, "change is", "changes are")
            render.line(self._printer, f"{left} left; `syncd apply` continues. {run.error}.")
        return True


_WHILE_APPLYING = frozenset({"metering", "stopped"})


# Ctrl-C and SIGTERM

_PATIENCE = 4.0
"""Seconds for the work to end after a signal; its requests end after three (`syncd.runs.reconciler`)."""
_TICK = 0.02

_T = TypeVar("_T")


class Stopping(threading.Event):
    """Set once a signal came; `signals` are their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.signals: list[int] = []

    def handle(self, number: int, _frame: object) -> None:
        """Handle a signal."""
        self.signals.append(number)
        self.set()

    @property
    def status(self) -> int:
        """Return the exit status of a process that a signal ended, as shells count it."""
        return 128 + self.signals[0]


class AbandonedError(Exception):
    """The work was left behind: it did not end in time, or a second signal came."""


def until_stopped(work: Callable[[], _T], stopping: Stopping) -> _T:
    """Return what the work returns; it ends soon after `stopping` is set, which the signals do.

    The work runs in a thread, because Python handles a signal only between two steps of the main thread: a
    name server or a file that does not answer would hold it up.

    Raises AbandonedError if it is left behind. Call `leave` then: its thread never ends.
    """
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    context = contextvars.copy_context()
    with _caught(stopping.handle):
        threading.Thread(target=context.run, args=(run,), name="syncd-apply", daemon=True).start()
        waited = 0.0
        while not wait([future], _TICK).done:
            waited += _TICK if stopping.is_set() else 0
            if len(stopping.signals) > 1 or waited >= _PATIENCE:
                raise AbandonedError
    return future.result()


@contextmanager
def _caught(handler: Callable[[int, object], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def leave(status: int) -> NoReturn:
    """End the process without waiting for threads, as Python would."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
