"""The model: people, a Kong and a metering API that fails and lags, with runs of syncd in between."""

from __future__ import annotations

import functools
import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpcore
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from structlog.testing import capture_logs

from syncd.config.settings import Config, Dialect, load
from syncd.core.changes import Change, ChangeKind, Outcome, Plan, Status
from syncd.core.errors import SyncdError
from syncd.core.policy import Policy
from syncd.http.connection import Answer
from syncd.runs.history import HistoryRecorder
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import FINISHED, Run, RunObserver, RunState, new_run
from tests.syncd.model.api import FAULTS, RACES, CutError, Fault, MeteringApi, SilenceError
from tests.syncd.model.judge import (
    Circumstances,
    faults_of_outcome,
    faults_of_write,
    lost_subjects,
    summary,
    unexplained,
)
from tests.syncd.model.kong import KONG_FAULTS, Consumer, Kong, KongFault, News
from tests.syncd.model.people import GROUPS, Deed, deeds
from tests.syncd.model.sandboxed import Reply, Sandboxed
from tests.syncd.states import opened_history

_START = datetime(2026, 1, 1, tzinfo=UTC)
_SETTINGS = """
sources: [{{type: kong-admin, url: "http://kong:8001"}}]
metering: {{dialect: {dialect}, url: "http://openmeter:8888", attempts: {attempts}, concurrency: 1}}
mapping: {{group_by: tag, key: "{key}"}}
policy: {policy}
policy_options: {{detach_after: 1d, delete_after: 2d}}
"""
_DIALECTS: tuple[Dialect, ...] = ("openmeter-v1", "openmeter-v3")
_FREEING = (ChangeKind.DETACH_SUBJECTS, ChangeKind.DELETE_CUSTOMER, ChangeKind.MOVE_SUBJECTS)
"""What these changes free may let the next run do what was blocked in this one."""

Answers = Callable[[str, str, bytes], Reply]


@functools.cache
def _sandbox() -> Sandboxed:
    return Sandboxed()


@functools.cache
def _config(dialect: Dialect, attempts: int, key: str, policy: Policy) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "syncd.yaml"
        path.write_text(_SETTINGS.format(dialect=dialect, attempts=attempts, key=key, policy=policy))
        return load(path)


class _Connections:
    """Takes the place of the connections to both APIs."""

    def __init__(self, apis: dict[str, Answers], endpoint: Any, *_settings: object) -> None:
        self._answer = apis[endpoint.api]

    def send(
        self, method: str, url: httpcore.URL, _headers: Sequence[tuple[bytes, bytes]], content: bytes | None
    ) -> Answer:
        try:
            reply = self._answer(method, url.target.decode(), content or b"")
        except CutError:
            raise httpcore.RemoteProtocolError("Server disconnected without sending a response.") from None
        except SilenceError:
            raise httpcore.ReadTimeout("timed out") from None
        return Answer(reply.status, reply.headers, reply.body)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Troubles:
    """What goes wrong during one run."""

    faults: tuple[Fault, ...] = ()
    deeds: tuple[tuple[int, Deed], ...] = ()
    kong: KongFault = "none"
    stop_after: int | None = None


NO_TROUBLES = Troubles()
faults = st.one_of(
    st.builds(Fault, st.just("any"), st.integers(0, 20), st.sampled_from(FAULTS)),
    st.builds(
        Fault,
        st.sampled_from(["create", "write", "write", "one", "one", "part", "list"]),
        st.integers(0, 3),
        st.sampled_from(FAULTS),
    ),
)
_faults_of_writes = st.builds(
    Fault, st.sampled_from(["create", "write", "write"]), st.integers(0, 2), st.sampled_from(FAULTS)
)
_races = st.builds(
    Fault,
    st.sampled_from(["create", "write", "key"]),
    st.sampled_from([0, 0, 1, 2]),
    st.sampled_from(RACES),
)
_mixed_up_answers = st.builds(
    Fault, st.sampled_from(["one", "key", "write", "part"]), st.integers(0, 2), st.just("someone-else")
)
troubles = st.builds(
    Troubles,
    st.lists(faults | _races, max_size=5).map(tuple),
    st.lists(st.tuples(st.integers(0, 20), deeds), max_size=2).map(tuple),
    st.sampled_from(("none",) * 8 + KONG_FAULTS),
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 20)),
)
run_options = st.builds(
    RunOptions,
    dry_run=st.sampled_from([False] * 9 + [True]),
    allow_move=st.booleans(),
    adopt=st.sampled_from([False, False, True]),
    allow_empty=st.sampled_from([False, False, False, True]),
)
_ids = st.sampled_from(["1", "2", "3", "4", "5"])
_consumers = st.builds(Consumer, _ids, st.sampled_from(["alice", "bob"]), st.sampled_from([None, *GROUPS]))
news: st.SearchStrategy[list[News]] = st.lists(
    st.one_of(_consumers, _consumers, _consumers, _ids), max_size=4
)


class _Witness(RunObserver):
    """Holds each outcome against the truth, as soon as it is there."""

    def __init__(self, api: MeteringApi) -> None:
        self.found: list[str] = []
        self._api = api

    def changed(self, run: Run, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            self.found += faults_of_outcome(outcome, self._api.truth())


class SyncdMachine(RuleBasedStateMachine):
    """Runs of syncd in a world that errs; every write is judged, and peace has to bring order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = _START
        self.kong = Kong()
        self.sound = True
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="syncd-model-")))
        self._stack.enter_context(capture_logs())
        self._stack.enter_context(_sandbox().emptied(self._time))
        self.api = MeteringApi(_sandbox(), self._time)
        apis: dict[str, Answers] = {"metering": self.api.answer, "kong-admin": self.kong.answer}
        self._stack.enter_context(
            patch("syncd.http.client.Connections", functools.partial(_Connections, apis))
        )
        # Three customers are more than one page.
        self._stack.enter_context(patch("syncd.http.pagination._PAGE_SIZES", (2, 1)))
        self.history = self._stack.enter_context(opened_history(self.folder))
        self._reader = sqlite3.connect(self.folder / "state.sqlite3", check_same_thread=False)
        self._stack.callback(self._reader.close)

    def _time(self) -> datetime:
        return self.now

    @initialize(
        policy=st.sampled_from(["sync", "sync", "upsert-only", "create-only"]),
        key=st.sampled_from(["{kind}-{id}", "{subject}"]),
        attempts=st.sampled_from([1, 3]),
    )
    def settings(self, policy: Policy, key: str, attempts: int) -> None:
        self.policy, self.key, self.attempts = policy, key, attempts

    # People, time, replicas

    @rule(acts=st.lists(deeds, min_size=1, max_size=3))
    def people_act(self, acts: list[Deed]) -> None:
        for deed in acts:
            self.api.by_person(deed)

    @rule(hours=st.sampled_from([1, 13, 25, 49]))
    def time_passes(self, hours: int) -> None:
        self.now += timedelta(hours=hours)
        self.api.catch_up()

    @rule(lists=st.integers(0, 3), reads=st.integers(0, 2))
    def replicas_fall_behind(self, lists: int, reads: int) -> None:
        self.api.lists_late, self.api.reads_late = lists, reads

    # Runs

    @rule(news=news, dialect=st.sampled_from(_DIALECTS), options=run_options, troubles=troubles)
    def syncd_runs(self, news: list[News], dialect: Dialect, options: RunOptions, troubles: Troubles) -> None:
        self.kong.change(news)
        self._run(dialect, options, troubles)

    @rule(
        news=news,
        dialect=st.sampled_from(_DIALECTS),
        move=st.booleans(),
        fault=faults | _faults_of_writes | _mixed_up_answers,
        again=st.booleans(),
    )
    def syncd_meets_a_fault(
        self, news: list[News], dialect: Dialect, move: bool, fault: Fault, again: bool
    ) -> None:
        self.kong.change(news)
        repeated = Fault(fault.among, fault.number + 1, fault.what)
        self._run(dialect, RunOptions(allow_move=move), Troubles((fault, repeated) if again else (fault,)))

    @rule(consumer=_consumers, dialect=st.sampled_from(_DIALECTS), race=_races)
    def a_person_is_faster(self, consumer: Consumer, dialect: Dialect, race: Fault) -> None:
        self._run(dialect, RunOptions())
        self.kong.change([consumer])
        self._run(dialect, RunOptions(allow_move=True), Troubles((race,)))

    @rule(name=_ids, dialect=st.sampled_from(_DIALECTS), edit=st.sampled_from(["500-edit", "500-disown"]))
    def a_person_changes_their_mind_about_a_removal(self, name: str, dialect: Dialect, edit: str) -> None:
        self.kong.change([name])
        for _ in range(3):
            self._run(dialect, RunOptions(), Troubles((Fault("delete", 0, edit),)))
            self.now += timedelta(hours=49)

    @rule(dialect=st.sampled_from(_DIALECTS), move=st.booleans())
    def peace_brings_order(self, dialect: Dialect, move: bool) -> None:
        """Once faults stop, the second run at the latest finds nothing to do."""
        self.api.catch_up()
        lists, reads = self.api.lists_late, self.api.reads_late
        self.api.lists_late = self.api.reads_late = 0
        options = RunOptions(allow_move=move)
        first = self._run(dialect, options)
        second = self._run(dialect, options)
        freed = any(second.made_plan.of(kind) or first.made_plan.of(kind) for kind in _FREEING)
        last = self._run(dialect, options) if freed else second
        last = self._run(dialect, options) if freed else last
        found = list(unexplained(last.made_plan, self.api.truth(), self._circumstances(last.plan, options)))
        self._require(found, last)
        self.api.lists_late, self.api.reads_late = lists, reads

    def _run(self, dialect: Dialect, options: RunOptions, troubles: Troubles = NO_TROUBLES) -> Run:
        run = new_run("model", options)
        latest = [run]
        self.api.begin(
            troubles.faults,
            [(number, functools.partial(self.api.by_person, deed)) for number, deed in troubles.deeds],
        )
        self.api.begun = lambda: self._begun(run.id)
        self.kong.fault = troubles.kong
        config = _config(dialect, self.attempts, self.key, self.policy)
        daemon = config.daemon.model_copy(update={"state_dir": self.folder})
        config = config.model_copy(update={"daemon": daemon})
        recorder = HistoryRecorder(self.history, lambda: timedelta(days=90))
        witness = _Witness(self.api)
        reconciler = Reconciler(
            config, self.history, (recorder, witness), now=self._time, sleep=lambda _seconds: None
        )
        limit = troubles.stop_after
        error: SyncdError | None = None
        try:
            reconciler.reconcile(
                run,
                should_stop=lambda: limit is not None and self.api.seen["any"] >= limit,
                on_update=latest.append,
            )
        except SyncdError as failed:
            error = failed
        run = latest[-1]
        found = [
            f"{write.request}: {fault}"
            for write in self.api.writes
            for fault in faults_of_write(write, self._circumstances(run.plan, options))
        ]
        found += witness.found
        found += self._faults_of_run(run, error, troubles)
        self._require(found, run, error)
        return run

    def _begun(self, run_id: str) -> list[dict[str, Any]]:
        rows = self._reader.execute("SELECT document FROM begun WHERE run = ?", (run_id,))
        return [json.loads(text) for (text,) in rows]

    def _circumstances(self, plan: Plan | None, options: RunOptions) -> Circumstances:
        return Circumstances(plan, options, self.policy, self.key, self.now, dict(self.kong.told))

    def _faults_of_run(self, run: Run, error: SyncdError | None, troubles: Troubles) -> Iterator[str]:
        if run.state not in FINISHED:
            yield f"the run ended as {run.state}"
        if (error is None) == (run.state is RunState.FAILED):
            yield f"the run is {run.state}, its error is {error!r}"
        if self.api.lied and error is None:
            yield "the run went on after an answer about someone else"
        quiet = not self.api.hurt and troubles.kong == "none" and troubles.stop_after is None
        if error is not None and quiet and not troubles.deeds and not self.api.lists_late:
            yield f"nothing went wrong, and the run failed: {error}"
        if run.plan is None:
            return
        recorded = self.history.run(run.id)
        if recorded is None:
            yield "the history lacks the run"
            return
        if recorded["state"] != str(run.state):
            yield f"the history says {recorded['state']} of a run that is {run.state}"
        results = recorded["results"]
        yield from self._unrecorded(results)
        if error is None and not troubles.deeds:
            yield from lost_subjects(run.outcomes, self.api.truth())
        made = [outcome for outcome in run.outcomes if outcome.change.actionable]
        told = [(one["status"], one["change"]["kind"], one["change"]["customer_key"]) for one in results]
        for outcome in made:
            change = outcome.change
            if (str(outcome.status), str(change.kind), change.customer_key) not in told:
                yield f"the history lacks {outcome.status} {change.kind} {change.customer_key}"
            if outcome.status is Status.DONE and not self._was_made(change):
                yield f"{change.kind} {change.customer_key} counts as done, and was not"

    def _unrecorded(self, results: list[dict[str, Any]]) -> Iterator[str]:
        """Yield writes that the history does not know: neither with an outcome nor as begun."""
        for write in self.api.writes:
            for had, has in write.step.customers:
                one = has or had
                assert one is not None
                names = {one.id, one.key}
                if not any(
                    {result["change"]["customer_id"], result["change"]["customer_key"]} & names
                    or set(result["change"]["subject_keys"]) & one.names
                    for result in results
                ):
                    yield f"the history does not know of {write.request}"

    def _was_made(self, change: Change) -> bool:
        """Return whether the server accepted a write of what a change is about."""
        names = {
            change.customer_id,
            *(json.dumps(name) for name in (change.customer_key, *change.subject_keys)),
        }
        return any(
            name in f"{write.request}{write.body}" for write in self.api.writes for name in names if name
        ) or any(
            write.request.endswith(f"/{key}") for write in self.api.writes for key in change.subject_keys
        )

    def _require(self, found: list[str], run: Run, error: SyncdError | None = None) -> None:
        if found:
            self.sound = False
            changes = [
                f"{c.kind} {c.customer_key} {c.subject_keys}" for c in (run.plan.changes if run.plan else ())
            ]
            writes = [write.request for write in self.api.writes]
            raise AssertionError(
                summary([*found, f"error: {error}", f"plan: {changes}", f"writes: {writes}"])
            )

    def teardown(self) -> None:
        try:
            if self.sound and hasattr(self, "policy"):
                self.peace_brings_order("openmeter-v1", move=False)
        finally:
            self._stack.close()
