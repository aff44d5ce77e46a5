"""The steady clock: a time that was set wrong for a moment makes nothing old."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from openmeter_plugin.delivery.clock import SteadyClock
from openmeter_plugin.delivery.process import _last_write
from openmeter_plugin.spool.destination import write_destination
from tests.harness.process import eventually
from tests.plugin.deliveries import (
    count,
    delivered,
    delivering,
    ids,
    record,
    run_until_empty,
    spooled,
    waiting,
)
from tests.plugin.events_server import Answer, EventsServer, take_all
from tests.plugin.spools import destination

MONTH = 31 * 86400.0


class Times:
    def __init__(self) -> None:
        self.wall, self.elapsed = 1_800_000_000.0, 500.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.elapsed += seconds

    def clock(self, last_known: float | None = None) -> SteadyClock:
        return SteadyClock(last_known, wall=lambda: self.wall, elapsed=lambda: self.elapsed)


def test_a_jump_ahead_while_the_process_runs_is_ignored_and_logged_once(lines: list[Any]) -> None:
    times = Times()
    clock = times.clock()
    right = times.wall
    times.wall += MONTH
    for second in range(1, 4):
        times.pass_by(1)
        assert clock.now() == right + second
    (line,) = [line for line in lines if line["event"] == "clock_jumped"]
    assert line["seconds"] == MONTH
    times.wall -= MONTH
    assert clock.now() == times.wall


def test_a_clock_that_was_ahead_at_the_start_counts_until_it_is_set_right() -> None:
    times = Times()
    times.wall += MONTH
    clock = times.clock()
    times.wall -= MONTH
    times.pass_by(2)
    assert clock.now() == times.wall


def test_a_start_far_ahead_of_the_last_write_is_in_doubt_for_a_minute() -> None:
    times = Times()
    assert times.clock(times.wall - 60).settled
    assert times.clock(None).settled
    clock = times.clock(times.wall - MONTH)
    assert not clock.settled
    times.pass_by(59)
    assert not clock.settled
    times.pass_by(2)
    assert clock.settled


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while it runs", "at the start"])
def test_a_clock_a_month_ahead_for_a_moment_makes_no_dead_letters(
    tmp_path: Path, server: EventsServer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    import time

    real, ahead = time.time, [0.0]
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    server.script = lambda _: Answer(503)
    write_destination(tmp_path, destination(server.url))
    spooled(tmp_path, [record(n, time=now) for n in range(50)])
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    with delivering(tmp_path, max_age=timedelta(days=30)):
        eventually(lambda: waiting(tmp_path) == 50 and server.posts, what="the outage")
        if when == "while it runs":
            ahead[0] = MONTH
            tries = len(server.posts)
            eventually(lambda: len(server.posts) > tries + 2, what="tries with the wrong time")
    if when == "at the start":
        ahead[0] = MONTH
        with delivering(tmp_path, max_age=timedelta(days=30)):
            tries = len(server.posts)
            eventually(lambda: len(server.posts) > tries + 2, what="tries with the wrong time")
    ahead[0] = 0.0
    server.script = take_all
    run_until_empty(tmp_path, max_age=timedelta(days=30))
    assert (delivered(tmp_path), count(tmp_path, "dead_lettered")) == (50, 0)
    assert set(server.taken) == set(ids(range(50)))


def test_the_last_write_of_a_spool_is_that_of_its_books(tmp_path: Path) -> None:
    assert _last_write(tmp_path) is None
    run_until_empty(tmp_path)
    assert _last_write(tmp_path) == (tmp_path / "books.db").stat().st_mtime
