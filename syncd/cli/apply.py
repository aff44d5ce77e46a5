"""``syncd apply``: prints a plan, applies it under the write lock and records the run in the history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from openmeter_plugin.units import plural
from syncd.cli import render
from syncd.cli.render import Steps, steps
from syncd.config.settings import Config
from syncd.core.changes import Outcome, count
from syncd.planning import plan_file
from syncd.runs.history import History, HistoryRecorder
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import Run, RunObserver, new_run


def apply(
    config: Config,
    options: RunOptions,
    console: Console | None,
    print_json: Callable[[object], None],
    *,
    plan_path: Path | None = None,
) -> Run:
    """Plan and apply, printing the plan and the outcomes; without a console, print JSON at the end.

    Raises SyncdError; the outcomes until then are printed all the same, and on Ctrl-C as well.
    """
    if plan_path is not None:
        reviewed, made_with = plan_file.read(plan_path)
        options = replace(options.as_reviewed(made_with), reviewed=reviewed)
    with closing(History(config.daemon.state_dir)) as history, steps() as progress:
        recorder = HistoryRecorder(history, lambda: config.daemon.keep_runs)
        terminal = _Terminal(console, progress)
        try:
            return Reconciler(config, history, (recorder, terminal)).reconcile(new_run("apply", options))
        finally:
            progress.hide()
            if (ended := terminal.ended) is not None:
                _show(ended, console, print_json)


class _Terminal(RunObserver):
    """Shows the plan and the progress of a run; `ended` is the run, once changes could be made."""

    def __init__(self, console: Console | None, progress: Steps) -> None:
        self._console = console
        self._progress = progress
        self.ended: Run | None = None

    def started(self, run: Run) -> None:  # noqa: ARG002 - the signature of all observers
        self._progress.begin("reading sources and customers")

    def planned(self, run: Run) -> None:
        self._progress.hide()
        if self._console:
            render.show_plan(self._console, run.made_plan)
        self._progress.begin("applying", sum(change.actionable for change in run.made_plan.changes))

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:  # noqa: ARG002
        self._progress.advance(len(outcomes))

    def finished(self, run: Run) -> None:
        # A run that a guard or a reviewed plan stopped has no outcomes to show.
        if run.plan is not None and (run.error is None or run.outcomes or run.failure in _WHILE_APPLYING):
            self.ended = run


_WHILE_APPLYING = frozenset({"metering", "stopped"})


def _show(run: Run, console: Console | None, print_json: Callable[[object], None]) -> None:
    if console:
        render.show_outcomes(console, run.outcomes)
        if run.failure == "stopped":
            todo = len(run.made_plan.actionable) - sum(o.change.actionable for o in run.outcomes)
            render.line(
                console, f"Not all was done: {plural(todo, 'change is', 'changes are')} left. {run.error}."
            )
        return
    results = [outcome.to_json() for outcome in run.outcomes]
    document = {"plan": run.made_plan.to_json(), "summary": count(run.outcomes), "outcomes": results}
    print_json({**document, "error": run.error})
