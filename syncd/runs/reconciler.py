"""Reconciler: one run, for the commands and the daemon alike.

It reads the sources and the metering API, maps, plans, sends the plan through its passes
(`syncd.runs.passes`), applies it under the write lock and records everything. A source that cannot be
read ends the run before it plans, and a dry run ends before it applies.
"""

from __future__ import annotations

import contextvars
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import structlog

from syncd.apply.executor import apply_plan
from syncd.config.settings import Config
from syncd.config.sources import may_be_empty
from syncd.core.changes import Change, Outcome, Plan
from syncd.core.errors import ApplyStoppedError, StoppedError, SyncdError
from syncd.core.model import Principal
from syncd.core.unbilled import Ignoring, ignored_on
from syncd.http.retry import Permit, unlimited
from syncd.mapping.desired_state import desired_state
from syncd.mapping.limits import within_limits
from syncd.mapping.rules import MappingRules
from syncd.metering.base import MeteringTarget
from syncd.planning.guards import Limits, require_safe
from syncd.planning.orphans import Grace
from syncd.planning.plan_file import require_same
from syncd.runs.clock import Now, Stopwatch, clock_skew, utc_now
from syncd.runs.factory import metering_endpoint, rules_of, sources_of, target_of, usage_reader_of
from syncd.runs.lock import write_lock
from syncd.runs.options import RunOptions
from syncd.runs.passes import PASSES, BothSides, PlanRules, Situation
from syncd.runs.run import FINISHED, Run, RunObserver, RunState, failure_kind
from syncd.sources.base import Readings, Source

if TYPE_CHECKING:  # a dry run without a history does not wait for SQLAlchemy
    from syncd.runs.history import History

_log = structlog.get_logger("syncd.runs.reconciler")

_GRACE = 3.0
"""Seconds for the changes under way at a stop: each then ends whole, and syncd still ends within five."""


@dataclass(frozen=True, slots=True)
class Reconciler:
    """Does runs with one configuration.

    A real run with a `history` holds the write lock of its directory; `holder` is the name that a second
    writer reads, and `patience` is how many seconds this one waits. A daemon passes the same `readings` to
    all its runs, so that unchanged sources are not read again. `now` is this machine's clock.
    """

    config: Config
    history: History | None = None
    observers: Sequence[RunObserver] = ()
    readings: Readings = field(default_factory=Readings)
    holder: str = "syncd apply"
    patience: float = 60.0
    sleep: Callable[[float], object] = time.sleep
    now: Now = utc_now

    def reconcile(
        self,
        run: Run,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_update: Callable[[Run], None] = lambda _run: None,
    ) -> Run:
        """Do this run and return it with its plan and outcomes; raises SyncdError.

        `on_update` receives the run once it has its plan, and once it has ended, however it ended.
        """
        record = _Record(run, self.observers, on_update)
        try:
            record.start()
            with self._locked(run.options, should_stop) as permit:
                # Recorded within the lock: the next writer closes runs that it finds without an end.
                return self._recorded(run.options, record, should_stop, permit)
        except BaseException as error:
            record.fail(error)
            raise

    @contextmanager
    def _locked(self, options: RunOptions, should_stop: Callable[[], bool]) -> Iterator[Permit]:
        if self.history is None or options.dry_run:
            yield unlimited
            return
        with write_lock(
            self.history.state, self.holder, patience=self.patience, should_stop=should_stop, sleep=self.sleep
        ) as permit:
            for run_id in self.history.close_interrupted():
                _log.warning("interrupted_run_closed", interrupted_run=run_id)
            yield permit

    def _recorded(
        self, options: RunOptions, record: _Record, should_stop: Callable[[], bool], permit: Permit
    ) -> Run:
        try:
            outcomes = self._perform(options, record, should_stop, permit)
        except StoppedError as error:
            stopped = ApplyStoppedError(f"stopped by request before its first change ({error})", ())
            record.fail(stopped)
            raise stopped from None
        except BaseException as error:
            record.fail(error)
            raise
        return record.finish(outcomes)

    def _perform(
        self, options: RunOptions, record: _Record, should_stop: Callable[[], bool], permit: Permit
    ) -> tuple[Outcome, ...]:
        watch = Stopwatch(self.now)
        noted = self.history.ignored.active() if self.history else ()
        rules = plan_rules(self.config, watch.start, noted)
        stop = Stop(should_stop)
        sources = sources_of(self.config, self.sleep, stop)
        with (
            closing(target_of(self.config, self.sleep, stop, permit)) as api,
            closing(usage_reader_of(self.config, self.sleep, stop)) as usage,
        ):
            with gc_paused():
                read = read_both_sides(sources, api, rules.mapping, self.readings)
                observed = read.observed
                there = Situation(
                    read,
                    rules,
                    options,
                    api,
                    usage,
                    partial(clock_skew, metering_endpoint(self.config), watch),
                    self.history.refused_deletions(observed.customers, watch.start) if self.history else {},
                )
                plan = there.plan()
            record.observed(read, rules.mapping)
            for one in PASSES:
                plan = one(plan, there)
            record.planned(plan)
            if options.dry_run:
                return ()
            if options.reviewed is not None:
                require_same(options.reviewed, plan)
            require_safe(plan, observed, rules.limits, force=options.force)
            stop.applying = True
            outcomes = apply_plan(
                plan,
                api,
                seen=observed.customers,
                remover=api,
                concurrency=self.config.metering.concurrency,
                should_stop=should_stop,
                begin=record.begun,
                report=record.changed,
            )
            if self.history:
                self.history.remember_refused_deletions(outcomes, observed.customers, watch.start)
            return outcomes


class Stop:
    """Whether requests end: at once while states are read, after a moment while changes are made."""

    def __init__(self, requested: Callable[[], bool], timer: Callable[[], float] = time.monotonic) -> None:
        self.applying = False
        self._requested = requested
        self._timer = timer
        self._at: float | None = None

    def __call__(self) -> bool:
        """Return whether requests and waits are to end now."""
        if not self._requested():
            return False
        if not self.applying:
            return True
        if self._at is None:
            self._at = self._timer() + _GRACE
        return self._timer() >= self._at


class _Record:
    """Notifies the observers of one run, and keeps its state so far."""

    def __init__(self, run: Run, observers: Sequence[RunObserver], on_update: Callable[[Run], None]) -> None:
        self._run = run
        self._observers = observers
        self._on_update = on_update
        self._outcomes: list[Outcome] = []

    def start(self) -> None:
        for observer in self._observers:
            observer.started(self._run)

    def observed(self, read: BothSides, rules: MappingRules) -> None:
        for observer in self._observers:
            observer.observed(self._run, read, rules)

    def planned(self, plan: Plan) -> None:
        self._run = replace(self._run, plan=plan)
        self._on_update(self._run)
        for observer in self._observers:
            observer.planned(self._run)

    def begun(self, changes: Sequence[Change]) -> None:
        for observer in self._observers:
            observer.begun(self._run, changes)

    def changed(self, outcomes: Sequence[Outcome]) -> None:
        self._outcomes += outcomes
        for observer in self._observers:
            observer.changed(self._run, outcomes)

    def fail(self, error: BaseException) -> None:
        """Record that the run failed, with the changes made until then, unless its end is recorded."""
        if self._run.state in FINISHED:
            return
        outcomes = error.outcomes if isinstance(error, ApplyStoppedError) else tuple(self._outcomes)
        text = str(error) if isinstance(error, SyncdError) else "internal error; the log has the details"
        self._end(RunState.FAILED, outcomes, error=text, failure=failure_kind(error))

    def finish(self, outcomes: tuple[Outcome, ...]) -> Run:
        """Record that the run reached its end."""
        blocked = replace(self._run, outcomes=outcomes).blocked
        return self._end(RunState.BLOCKED if blocked else RunState.SUCCEEDED, outcomes)

    def _end(
        self,
        state: RunState,
        outcomes: tuple[Outcome, ...],
        *,
        error: str | None = None,
        failure: str | None = None,
    ) -> Run:
        self._run = replace(
            self._run,
            state=state,
            outcomes=outcomes,
            error=error,
            failure=failure,
            finished_at=datetime.now(UTC),
        )
        # The observers come first, so that the history of a run is complete once it shows as finished.
        record_end(self._run, self._observers)
        self._on_update(self._run)
        return self._run


def record_end(run: Run, observers: Sequence[RunObserver]) -> None:
    """Call the observers of a run that has ended; one that fails is logged."""
    for observer in observers:
        try:
            observer.finished(run)
        except SyncdError as error:
            _log.error("run_record_failed", error=str(error))


def plan_rules(config: Config, now: datetime, noted: Sequence[Ignoring] = ()) -> PlanRules:
    """Return the settings that affect a plan; raises ConfigError if the mapping file cannot be read.

    `noted` are the subjects that people ignore in the dashboard.
    """
    waits = config.policy_options
    grace = Grace(now, waits.detach_after, waits.delete_after)
    limits = Limits(**config.guards.model_dump())
    today = now.astimezone(UTC).date()
    ignored = ignored_on(today, config.ignore, noted)
    return PlanRules(rules_of(config), config.policy, grace, limits, may_be_empty(config.sources), ignored)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause Python's cycle collector while both states are read and compared, then freeze what was created.

    Hundreds of thousands of values are created to stay, none of them in a cycle, but each pass of the
    collector visits all of them: a third of the time of a plan for 100,000 principals. Objects that an
    earlier call froze are unfrozen first. Reference counting still frees unused memory at once.
    """
    enabled = gc.isenabled()
    gc.unfreeze()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def read_both_sides(
    sources: Sequence[Source], target: MeteringTarget, mapping: MappingRules, readings: Readings
) -> BothSides:
    """Read sources and metering API concurrently, and map; raises SourceError or ApiError."""
    with ThreadPoolExecutor(1, thread_name_prefix="syncd-observe") as executor:
        # In the same context, so that log lines carry the run id.
        observing = executor.submit(contextvars.copy_context().run, target.observe)
        principals, empty = _read_sources(sources, readings)
        desired = desired_state(principals, mapping)
        observed = observing.result()
    _log.debug("metering_read", customers=len(observed.customers))
    return BothSides(principals, empty, within_limits(desired, observed, mapping), observed)


def _read_sources(sources: Sequence[Source], readings: Readings) -> tuple[list[Principal], list[str]]:
    """Return the principals of all sources, and the names of empty sources."""
    principals: list[Principal] = []
    empty: list[str] = []
    for source in sources:
        found = readings.read(source)
        _log.debug("source_read", source=source.name, principals=len(found))
        principals.extend(found)
        if not found:
            empty.append(source.name)
    return principals, empty
