"""``syncd apply``: prints a plan, applies it under the write lock and records the run in the history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from syncd.cli import render
from syncd.cli.render import Steps, steps
from syncd.config.settings import Config
from syncd.core.changes import Outcome, Plan, count
from syncd.core.errors import ApplyStoppedError, SyncdError
from syncd.planning import plan_file
from syncd.runs import reconciler
from syncd.runs.history import History, HistoryRecorder
from syncd.runs.lock import write_lock
from syncd.runs.run import RunState, new_run


def apply(
    config: Config,
    options: reconciler.RunOptions,
    console: Console | None,
    print_json: Callable[[object], None],
    *,
    plan_path: Path | None = None,
) -> reconciler.Result:
    """Plan and apply, printing the plan and the outcomes; without a console, print JSON at the end."""
    if plan_path is not None:
        reviewed, made_with = plan_file.read(plan_path)
        options = replace(options.as_reviewed(made_with), reviewed=reviewed)
    plans: list[Plan] = []

    def on_plan(plan: Plan) -> None:
        plans.append(plan)
        if console:
            render.show_plan(console, plan)

    def show(outcomes: tuple[Outcome, ...], error: str | None) -> None:
        if console:
            render.show_outcomes(console, outcomes)
            return
        results = [outcome.to_json() for outcome in outcomes]
        print_json(
            {"plan": plans[0].to_json(), "summary": count(outcomes), "outcomes": results, "error": error}
        )

    try:
        with steps() as progress, write_lock(config.daemon.state_dir, "syncd apply"):
            result = _run_recorded(config, options, on_plan, progress)
    except ApplyStoppedError as error:
        show(error.outcomes, str(error))
        raise
    show(result.outcomes, None)
    return result


def _run_recorded(
    config: Config, options: reconciler.RunOptions, show: Callable[[Plan], None], progress: Steps
) -> reconciler.Result:
    """Perform the run and record it in the history, as the daemon does."""
    run = new_run("apply", options)
    with closing(History(config.daemon.state_dir)) as history:
        history.close_interrupted()
        recorder = HistoryRecorder(history, lambda: config.daemon.keep_runs)
        plans: list[Plan] = []

        def on_plan(plan: Plan) -> None:
            plans.append(plan)
            recorder.planned(replace(run, plan=plan))
            progress.hide()
            show(plan)
            progress.begin("applying", sum(change.actionable for change in plan.changes))

        def report(outcomes: Sequence[Outcome]) -> None:
            recorder.changed(run, outcomes)
            progress.advance(len(outcomes))

        def end(state: RunState, error: str | None, outcomes: tuple[Outcome, ...]) -> None:
            plan = plans[0] if plans else None
            now = datetime.now(UTC)
            recorder.finished(
                replace(run, state=state, error=error, outcomes=outcomes, plan=plan, finished_at=now)
            )

        progress.begin("reading sources and customers")
        try:
            result = reconciler.run(config, options, on_plan=on_plan, report=report)
        except SyncdError as error:
            end(RunState.FAILED, str(error), error.outcomes if isinstance(error, ApplyStoppedError) else ())
            raise
        end(RunState.BLOCKED if result.blocked else RunState.SUCCEEDED, None, result.outcomes)
    return result
