"""Data for the pages: from the daemon's runs, its history, and, through a Reader, other systems.

A Reader reads concurrently, with a cache and a deadline, so that a slow system never blocks a page. A page
starts all its reads at once and waits at most `timeout` seconds. What has not answered by then is shown with
its previous answer, or as unread, while the read continues in its thread for the next view. Each system is
read once at a time, however many people look at the page.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar, cast

import structlog

from syncd.config.sections import GatewayConfig
from syncd.config.settings import Config
from syncd.core.changes import Plan
from syncd.core.errors import SyncdError
from syncd.dashboard.diffs import Results
from syncd.dashboard.health import (
    TIMEOUT,
    GateState,
    GatewayState,
    Probe,
    gateway_named,
    metering_probe,
    quick_client,
    read_gate,
    read_state,
    source_probes,
)
from syncd.dashboard.unbilled_view import UnbilledView, unbilled
from syncd.dashboard.views import (
    Drift,
    Level,
    RunLine,
    drift,
    latest_full_run,
    run_line,
)
from syncd.gateways.client import Gateway
from syncd.http.retry import Pace
from syncd.metering.base import Account
from syncd.planning.plan_file import from_json
from syncd.runs.factory import quick_target_of
from syncd.runs.history import History
from syncd.runs.options import RunOptions
from syncd.runs.queue import RunQueue
from syncd.runs.run import FINISHED, Run, RunState

_log = structlog.get_logger("syncd.dashboard")
_T = TypeVar("_T")

FRESH_SECONDS: Final = 15.0  # for which an answer is reused
PAGE_TIMEOUT: Final = 2.0  # seconds for which a page waits
_MAX_CONCURRENT: Final = 16
_MAX_ENTRIES: Final = 200


@dataclass(frozen=True, slots=True)
class Answer(Generic[_T]):
    """What was read at `read_at`, or why it could not be. `stale`: an older answer, being refreshed."""

    value: _T | None
    problem: str | None = None
    read_at: datetime | None = None
    stale: bool = False


@dataclass(slots=True)
class _Entry:
    answer: Answer[object] | None = None
    finished: float = 0.0
    busy: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Reader:
    """Reads by key; thread-safe."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        fresh: float = FRESH_SECONDS,
        timeout: float = PAGE_TIMEOUT,
        max_concurrent: int = _MAX_CONCURRENT,
    ) -> None:
        self._clock = clock
        self._fresh = fresh
        self._timeout = timeout
        self._slots = threading.Semaphore(max_concurrent)
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def read_all(
        self,
        reads: Mapping[str, Callable[[], _T]],
        *,
        timeout: float | None = None,
        fresh: float | None = None,
    ) -> dict[str, Answer[_T]]:
        """Return an answer for each read, all within `timeout` seconds and at most `fresh` seconds old."""
        timeout = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + timeout
        reusable = self._fresh if fresh is None else fresh
        entries = {key: self._start(key, read, reusable) for key, read in reads.items()}
        for entry in entries.values():
            if entry is not None:
                entry.done.wait(max(0.0, deadline - time.monotonic()))
        return {key: self._answer(entry, timeout) for key, entry in entries.items()}

    def read_one(
        self, key: str, read: Callable[[], _T], *, timeout: float | None = None, fresh: float | None = None
    ) -> Answer[_T]:
        """Return the answer for one read."""
        return self.read_all({key: read}, timeout=timeout, fresh=fresh)[key]

    def forget(self, prefix: str) -> None:
        """Forget the answers whose keys begin so: what they report has changed."""
        with self._lock:
            for key in [key for key in self._entries if str(key).startswith(prefix)]:
                del self._entries[key]

    def _start(self, key: str, read: Callable[[], object], reusable: float) -> _Entry | None:
        """Start a read if needed and return its entry; None if too many reads are running."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            while len(self._entries) > _MAX_ENTRIES:
                self._entries.popitem(last=False)
            fresh = entry.answer is not None and self._clock() - entry.finished < reusable
            if entry.busy or fresh:
                return entry
            if not self._slots.acquire(blocking=False):
                return entry if entry.answer else None
            entry.busy = True
            entry.done.clear()
        threading.Thread(
            target=self._read, args=(key, entry, read), name=f"syncd-read-{key}", daemon=True
        ).start()
        return entry

    def _read(self, key: str, entry: _Entry, read: Callable[[], object]) -> None:
        answer: Answer[object]
        try:
            answer = Answer(read(), None, datetime.now(UTC))
        except SyncdError as error:
            answer = Answer(None, str(error), datetime.now(UTC))
        except Exception:
            _log.exception("dashboard_read_failed", system=key)
            answer = Answer(None, "internal error; the daemon's log has the details", datetime.now(UTC))
        with self._lock:
            entry.answer, entry.finished, entry.busy = answer, self._clock(), False
            entry.done.set()
        self._slots.release()

    def _answer(self, entry: _Entry | None, timeout: float) -> Answer[_T]:
        if entry is None:
            return Answer(None, "too many systems are being read; try again in a moment")
        with self._lock:
            answer, busy = entry.answer, entry.busy
        if answer is None:
            return Answer(None, f"no answer within {timeout:g} s; try again in a moment")
        # All reads of one key return the same type.
        return replace(cast("Answer[_T]", answer), stale=busy)


_MAX_DETAILS: Final = 4
"""Finished runs whose plan is cached for their next page."""


@dataclass(frozen=True, slots=True)
class Health:
    """State of one system. `kind`: source, metering API or gateway."""

    kind: str
    name: str
    address: str
    level: Level
    text: str
    answer: Answer[Any]


@dataclass(frozen=True, slots=True)
class RunDetail:
    """A run with its plan, if it has one, and the outcomes of its changes."""

    line: RunLine
    options: RunOptions
    plan: Plan | None
    results: Results
    done_so_far: int | None = None


class Queries:
    """Data for the pages; thread-safe."""

    def __init__(self, runs: RunQueue, history: History, config: Callable[[], Config]) -> None:
        self.runs = runs
        self._history = history
        self._config = config
        self._lock = threading.Lock()
        self._read_for: Config | None = None
        self._reader = Reader()
        self._drift_and_unbilled: tuple[Run | None, Drift | None, UnbilledView | None] = (None, None, None)
        self._finished: OrderedDict[str, RunDetail] = OrderedDict()

    def config(self) -> Config:
        """Return the current configuration."""
        return self._config()

    def health(self) -> list[Health]:
        """Return the state of sources, metering API and gateways; takes at most `PAGE_TIMEOUT` seconds."""
        config, reader = self._current()
        sources, target = source_probes(config), metering_probe(config)
        checks: dict[str, Callable[[], object]] = {f"source {probe.name}": probe.check for probe in sources}
        checks["metering API"] = target.check
        for index, gateway in enumerate(config.gateways):
            checks[f"gateway {gateway.name}"] = _state_reader(config, index)
        answers = reader.read_all(checks)
        last = next((run for run in self.runs.recent() if run.state in FINISHED), None)
        found = [
            _with_last_run(_probed("source", probe, answers[f"source {probe.name}"]), last)
            for probe in sources
        ]
        found.append(_with_last_run(_probed("metering API", target, answers["metering API"]), last))
        for gateway in config.gateways:
            answer = answers[f"gateway {gateway.name}"]
            state = answer.value if isinstance(answer.value, GatewayState) else None
            level: Level = state.level if state else "problem"
            text = state.summary if state else f"cannot be read: {answer.problem}"
            found.append(Health("gateway", gateway.name, gateway.url, level, text, answer))
        return found

    def gateways(self) -> list[tuple[str, str, Answer[GatewayState]]]:
        """Return name, address and state of each gateway."""
        config, reader = self._current()
        checks = {f"gateway {g.name}": _state_reader(config, i) for i, g in enumerate(config.gateways)}
        answers = reader.read_all(checks)
        return [(g.name, g.url, answers[f"gateway {g.name}"]) for g in config.gateways]

    def gates(self) -> list[tuple[str, str, Answer[GateState]]]:
        """Return name and address of each gateway, and its gate."""
        config, reader = self._current()
        checks = {f"gate {g.name}": _gate_reader(config, i) for i, g in enumerate(config.gateways)}
        answers = reader.read_all(checks)
        return [(g.name, g.url, answers[f"gate {g.name}"]) for g in config.gateways]

    def of_gateways(self, what: str, read: Callable[[Gateway], _T]) -> list[tuple[str, Answer[_T]]]:
        """Return, by gateway, what is read there; `what` names it."""
        config, reader = self._current()
        checks = {f"{g.name} {what}": _gateway_reader(g, i, read) for i, g in enumerate(config.gateways)}
        answers = reader.read_all(checks)
        return [(g.name, answers[f"{g.name} {what}"]) for g in config.gateways]

    def of_gateway(
        self, name: str, what: str, read: Callable[[Gateway], _T], *, fresh: float | None = None
    ) -> Answer[_T] | None:
        """Return what is read of one gateway, at most `fresh` seconds old; None if none has this name."""
        config, reader = self._current()
        found = gateway_named(config, name)
        if found is None:
            return None
        index, gateway = found
        return reader.read_one(f"{name} {what}", _gateway_reader(gateway, index, read), fresh=fresh)

    def forget_gateway(self, name: str) -> None:
        """Forget what was read of a gateway, after a change of it."""
        _, reader = self._current()
        for prefix in (f"{name} ", f"gateway {name}", f"gate {name}"):
            reader.forget(prefix)

    def account(self, customer_id: str) -> Answer[Account]:
        """Return what a customer has in the metering API: subscriptions, entitlements, credits."""
        config, reader = self._current()

        def read() -> Account:
            with closing(quick_target_of(config, TIMEOUT, pace=Pace())) as api:
                return api.account(customer_id)

        return reader.read_one(f"account {customer_id}", read)

    def drift_and_unbilled(self) -> tuple[Drift | None, UnbilledView | None]:
        """Return drift and unbilled usage according to the latest plan of all principals.

        Computed once per run: with a hundred thousand changes it takes seconds.
        """
        run = latest_full_run(self.runs.recent())
        with self._lock:
            if run is not self._drift_and_unbilled[0]:
                self._drift_and_unbilled = (run, drift(run), unbilled(run))
            return self._drift_and_unbilled[1:]

    def run_lines(self, limit: int, now: datetime, offset: int = 0) -> list[RunLine]:
        """Return runs, latest first; queued and running ones only on the first page."""
        unfinished = [run for run in self.runs.recent() if run.state not in FINISHED]
        ids = {run.id for run in unfinished}
        lines = [run_line(run.summary(), now) for run in unfinished] if offset == 0 else []
        recorded = self._history.runs(limit, offset)
        return lines + [run_line(document, now) for document in recorded if document["id"] not in ids]

    def run(self, run_id: str, now: datetime) -> RunDetail | None:
        """Return one run by its complete id, from memory or from the history."""
        with self._lock:
            if run_id in self._finished:
                return self._finished[run_id]
        detail = self._from_memory(run_id, now) or self._from_history(run_id, now)
        if detail is not None and detail.line.is_finished:
            with self._lock:
                self._finished[run_id] = detail
                while len(self._finished) > _MAX_DETAILS:
                    self._finished.popitem(last=False)
        return detail

    def _from_memory(self, run_id: str, now: datetime) -> RunDetail | None:
        run = self.runs.get(run_id)
        if run is None:
            return None
        applying = run.state not in FINISHED and not run.dry_run and run.plan is not None
        done = self._history.progress(run_id) if applying else None
        return RunDetail(
            run_line(run.summary(), now), run.options, run.plan, Results.of_outcomes(run.outcomes), done
        )

    def _from_history(self, run_id: str, now: datetime) -> RunDetail | None:
        document = self._history.run(run_id)
        if document is None or document["id"] != run_id:
            return None
        plan = _recorded_plan(document["plan"])
        options = RunOptions(dry_run=bool(document["dry_run"])).as_reviewed(document.get("options") or {})
        results = Results.of_history(document["results"])
        return RunDetail(run_line(document, now), options, plan, results)

    def reviewable(self, run_id: str) -> RunOptions | None:
        """Return the options for applying the plan of a dry run, or None if it cannot be applied."""
        detail = self.run(run_id, datetime.now(UTC))
        if detail is None or detail.plan is None:
            return None
        if not detail.line.dry_run or RunState(detail.line.state) is not RunState.SUCCEEDED:
            return None
        return replace(detail.options, reviewed=detail.plan)

    def source_names(self) -> Sequence[str]:
        """Return the names of the sources."""
        return [probe.name for probe in source_probes(self._config())]

    def _current(self) -> tuple[Config, Reader]:
        """Return the configuration and its reader; a reload discards what was read before."""
        config = self._config()
        with self._lock:
            if config is not self._read_for:
                self._read_for, self._reader = config, Reader()
            return config, self._reader


def _gateway_reader(config: GatewayConfig, index: int, read: Callable[[Gateway], _T]) -> Callable[[], _T]:
    def read_once() -> _T:
        with closing(quick_client(config, index)) as gateway:
            return read(gateway)

    return read_once


def _recorded_plan(document: dict[str, Any] | None) -> Plan | None:
    """Return a plan of the history; None if another version of syncd planned a change that this one lacks."""
    try:
        return from_json(document) if document else None
    except ValueError:
        return None


def _probed(kind: str, probe: Probe, answer: Answer[object]) -> Health:
    text = str(answer.value) if answer.problem is None else f"cannot be read: {answer.problem}"
    level: Level = "ok" if answer.problem is None else "problem"
    return Health(kind, probe.name, probe.address, level, text, answer)


def _with_last_run(health: Health, run: Run | None) -> Health:
    """Return the probe's result, or the last run's problem: a run reads more than a probe."""
    if run is None or run.error is None or health.level != "ok":
        return health
    of_source = run.failure == "source" and run.error.startswith(f"source {health.name}: ")
    of_metering = run.failure == "metering" and health.kind == "metering API"
    if (health.kind == "source" and of_source) or of_metering:
        return replace(health, level="problem", text=f"the last run could not use it: {run.error}")
    return health


def _state_reader(config: Config, index: int) -> Callable[[], GatewayState]:
    return lambda: read_state(config.gateways[index], index)


def _gate_reader(config: Config, index: int) -> Callable[[], GateState]:
    return lambda: read_gate(config.gateways[index], index)
