"""Concurrent reads of sources and metering API: errors on either side, on both, and a stop."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from syncd.config import settings
from syncd.core.errors import ApiError, ApplyStoppedError, SourceError, SyncdError
from syncd.runs.options import RunOptions
from syncd.runs.reconciler import Reconciler
from syncd.runs.run import Run, new_run
from tests.syncd.processes import Project, daemon_process, when_logged
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

Behave = Callable[[], Answer]


def consumers() -> Answer:
    return Answer({"data": [{"id": "1", "username": "alice"}], "next": None})


def customers() -> Answer:
    return Answer({"items": [], "totalCount": 0, "page": 1, "pageSize": 1000})


def broken() -> Answer:
    return Answer({}, 500)


class Sides:
    """A Kong and a metering API; a test sets what each answers to the request for its list."""

    def __init__(self) -> None:
        self.kong: Behave = consumers
        self.metering: Behave = customers
        self.written: list[str] = []

    def answer_of_kong(self, asked: Asked) -> Answer:
        return self.kong() if asked.path == "/consumers" else Answer({"data": [], "next": None})

    def answer_of_metering(self, asked: Asked) -> Answer:
        if asked.method != "GET":
            self.written.append(f"{asked.method} {asked.path}")
            return Answer({}, 201)
        return self.metering() if asked.path == "/api/v1/customers" else Answer([], 404)


@pytest.fixture
def sides() -> Sides:
    return Sides()


@pytest.fixture
def project(tmp_path: Path, sides: Sides) -> Iterator[Project]:
    with serving(sides.answer_of_kong) as kong, serving(sides.answer_of_metering) as metering:
        yield Project(tmp_path, metering.url, f"sources: [{{type: kong-admin, url: '{kong.url}'}}]\n")


def run(project: Project, should_stop: Callable[[], bool] = lambda: False) -> Run:
    with ExitStack() as stack:
        stack.callback(require_no_reader)
        return Reconciler(settings.load(project.config)).reconcile(
            new_run("test", RunOptions()), should_stop=should_stop
        )


def require_no_reader() -> None:
    """Require that no thread of a run is left; one that connects may still be ending."""
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("syncd-")}
    assert names <= {"syncd-connect"}


def after(do: Callable[[], object], answer: Behave) -> Behave:
    """Do something on a request, then answer."""

    def behave() -> Answer:
        do()
        return answer()

    return behave


def rendezvous(first: Behave, second: Behave) -> tuple[Behave, Behave]:
    """Make each side answer only after both were requested."""
    both = threading.Barrier(2)
    return after(lambda: both.wait(20), first), after(lambda: both.wait(20), second)


def test_both_sides_are_read_concurrently(project: Project, sides: Sides) -> None:
    sides.kong, sides.metering = rendezvous(consumers, customers)
    assert run(project).made_plan.summary()["create-customer"] == 1
    assert sides.written


@pytest.mark.parametrize(
    ("kong", "metering", "error", "said"),
    [
        (broken, customers, SourceError, "Kong's Admin API"),
        (consumers, broken, ApiError, "metering API"),
        (broken, broken, SourceError, "Kong's Admin API"),
    ],
    ids=["source", "metering", "both"],
)
def test_an_error_on_either_side_ends_the_run_and_the_sources_error_wins(
    project: Project,
    sides: Sides,
    kong: Behave,
    metering: Behave,
    error: type[SyncdError],
    said: str,
) -> None:
    sides.kong, sides.metering = rendezvous(kong, metering)
    with pytest.raises(error, match=said):
        run(project)
    assert not sides.written


@pytest.mark.parametrize("first", ["kong", "metering"])
def test_which_error_is_reported_does_not_depend_on_their_order(
    project: Project, sides: Sides, first: str
) -> None:
    gone = threading.Event()
    early, late = after(gone.set, broken), after(lambda: gone.wait(20), broken)
    sides.kong, sides.metering = (early, late) if first == "kong" else (late, early)
    with pytest.raises(SourceError, match="Kong's Admin API"):
        run(project)
    assert not sides.written


def test_a_malformed_answer_leaves_no_thread(project: Project, sides: Sides) -> None:
    sides.kong, sides.metering = rendezvous(consumers, lambda: Answer(b"<html>"))
    with pytest.raises(ApiError, match="metering API"):
        run(project)
    assert not sides.written


def test_ctrl_c_while_a_source_is_read_waits_for_the_other_side_and_leaves_no_thread(
    project: Project, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()
    sides.metering = after(asked.set, customers)

    def interrupted(*_: object) -> None:
        assert asked.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr("syncd.runs.reconciler._read_sources", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(project)
    assert not sides.written


def test_an_internal_error_in_reading_the_metering_api_is_not_mistaken_for_an_empty_one(
    project: Project, sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("syncd.metering.v1.OpenMeterV1.observe", fail)
    with pytest.raises(ZeroDivisionError):
        run(project)
    assert not sides.written


@pytest.mark.parametrize("side", ["kong", "metering"])
def test_a_stop_while_a_side_is_read_ends_the_run_before_its_first_change(
    project: Project, sides: Sides, side: str
) -> None:
    stopping = threading.Event()
    setattr(sides, side, after(stopping.set, getattr(sides, side)))
    with pytest.raises(ApplyStoppedError, match="stopped by request before its first change"):
        run(project, stopping.is_set)
    assert not sides.written


def test_sigterm_while_both_sides_are_read_ends_the_daemon_within_5_s_with_nothing_changed(
    project: Project, sides: Sides
) -> None:
    reading, go_on = threading.Semaphore(0), threading.Event()

    def hold() -> None:
        reading.release()
        go_on.wait(20)

    sides.kong, sides.metering = after(hold, consumers), after(hold, customers)
    try:
        with daemon_process(project) as (process, log):
            for _ in range(2):
                assert reading.acquire(timeout=20)
            process.send_signal(signal.SIGTERM)
            when_logged(log, "stopping", process)
            assert process.wait(timeout=5) == 0  # though neither side ever answers
    finally:
        go_on.set()
    assert not sides.written
    [recorded] = json.loads(project.call("history", "--output=json").stdout)
    assert (recorded["state"], "before its first change" in recorded["error"]) == ("failed", True)


def test_after_an_error_on_one_side_the_next_run_succeeds(project: Project, sides: Sides) -> None:
    sides.metering = broken
    with pytest.raises(ApiError):
        run(project)
    sides.metering = customers
    run(project)
    assert "POST /api/v1/customers" in sides.written
