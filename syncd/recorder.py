"""Writes what runs do into the history; where it cannot, the run ends before it changes anything more.

Runs are forgotten by their age, and a clock that is set can make that look like anything. So the latest ones
stay whatever their age, and a clock that jumps ahead while this process lives ages nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from syncd.clock import Now, Stopwatch, utc_now
from syncd.history import History
from syncd.outcome import Outcome
from syncd.runs import Run

ALWAYS_KEPT = 100
_A_MOMENT = timedelta(minutes=1)


class Recorder:
    """An observer of runs (`syncd.runs.Observer`).

    `keep` is asked each time how long runs stay; `now` is this machine's clock.
    """

    def __init__(
        self,
        history: History,
        keep: Callable[[], timedelta],
        *,
        at_least: int = ALWAYS_KEPT,
        now: Now = utc_now,
    ) -> None:
        self._history = history
        self._keep = keep
        self._at_least = at_least
        self._now = now
        self._watch = Stopwatch(now)
        self._made: deque[datetime] = deque(maxlen=at_least)
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
        self._made.append(run.requested_at)
        if keep := self._kept():
            self._history.prune(keep)

    def _kept(self) -> timedelta | None:
        """Return how far back runs stay by the clock of this moment, None where all do."""
        latest = self._history.runs(1, self._at_least - 1)
        if not latest:
            return None
        now = self._now()
        jumped = max(now - self._watch.now(), timedelta(0))
        first = min(datetime.fromisoformat(str(latest[0]["requested_at"])), *self._made)
        return max(self._keep() + jumped, now - first + _A_MOMENT)
