"""Writes what runs do into the history; where it cannot, the run ends before it changes anything more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from syncd.history import History
from syncd.outcome import Outcome
from syncd.run import Run


class Recorder:
    """An observer of runs (`syncd.runs.Observer`); `keep` is asked each time how long runs stay."""

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
