"""When runs are due, on clocks that tests set: no run comes twice, and none stays away."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.config.sections import ScheduleConfig
from syncd.daemon.schedule import Schedule, Timetable
from tests.syncd.waiting import eventually

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)  # a Saturday
FIVE_MINUTES = ScheduleConfig(interval=timedelta(minutes=5))
HOURLY = ScheduleConfig(cron="0 * * * *")


class Clocks:
    """The time of day and the monotonic clock of a machine whose runs are done as soon as they are due."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.day = NOON
        self.monotonic = 1000.0
        self.runs: list[float] = []
        """Seconds on the monotonic clock, from the start."""
        self.table = Timetable(config, lambda: self.day, lambda: self.monotonic)
        self.run_what_is_due()

    def run_what_is_due(self) -> None:
        while self.table.remaining() <= 0:
            self.runs.append(self.monotonic - 1000)
            self.table.advance()

    def pass_(self, seconds: float) -> None:
        """Let time pass; each run comes in the moment in which it is due."""
        end = self.monotonic + seconds
        while (left := end - self.monotonic) > 0:
            step = min(self.table.remaining(), left)
            self.monotonic += step
            self.day += timedelta(seconds=step)
            self.run_what_is_due()

    def set(self, by: timedelta) -> None:
        self.day += by
        self.run_what_is_due()

    def sleep(self, time: timedelta) -> None:
        """Suspend the machine: the monotonic clock stands still."""
        self.set(time)


def at(clocks: Clocks) -> list[int]:
    """The minutes at which runs came."""
    return [round(second / 60) for second in clocks.runs]


def test_a_run_comes_at_once_and_then_at_each_interval() -> None:
    clocks = Clocks(FIVE_MINUTES)
    clocks.pass_(16 * 60)
    assert at(clocks) == [0, 5, 10, 15]


def test_a_crontab_expression_is_followed_after_the_run_at_the_start() -> None:
    clocks = Clocks(ScheduleConfig(cron="30 12,14 * * *"))
    clocks.pass_(24 * 3600)
    assert at(clocks) == [0, 30, 150]


@pytest.mark.parametrize("config", [FIVE_MINUTES, HOURLY])
def test_runs_missed_while_the_machine_slept_are_made_up_for_once(config: ScheduleConfig) -> None:
    clocks = Clocks(config)
    clocks.pass_(60)
    clocks.sleep(timedelta(hours=10))
    assert at(clocks) == [0, 1]


def test_a_clock_that_is_set_ahead_starts_the_run_that_became_due_and_no_other() -> None:
    clocks = Clocks(HOURLY)
    clocks.pass_(60)
    clocks.set(timedelta(days=60))
    clocks.pass_(58 * 60)
    assert at(clocks) == [0, 1]
    clocks.pass_(2 * 60)
    assert at(clocks) == [0, 1, 60]


@pytest.mark.parametrize("back", [timedelta(seconds=1), timedelta(minutes=10), timedelta(days=60)])
def test_a_clock_that_is_set_back_delays_no_run(back: timedelta) -> None:
    clocks = Clocks(FIVE_MINUTES)
    clocks.pass_(6 * 60)
    clocks.set(-back)
    clocks.pass_(9 * 60 + 1)
    assert at(clocks) == [0, 5, 10, 15]


@pytest.mark.parametrize("back", [timedelta(seconds=1), timedelta(minutes=10), timedelta(minutes=50)])
def test_no_time_of_a_crontab_expression_comes_twice_on_a_clock_that_is_set_back(back: timedelta) -> None:
    clocks = Clocks(HOURLY)
    clocks.pass_(3600 + 60)
    clocks.set(-back)
    clocks.pass_(59 * 60)
    assert at(clocks) == [0, 60, 120]
    clocks.pass_(back.total_seconds() + 60)
    assert at(clocks) == [0, 60, 120]


def test_after_a_large_step_back_the_times_of_the_wrong_clock_no_longer_count() -> None:
    clocks = Clocks(HOURLY)
    clocks.pass_(30 * 60)
    clocks.set(-timedelta(days=60, minutes=10))
    clocks.pass_(3 * 3600)
    assert at(clocks) == [0, 60, 70, 130, 190]


def test_jitter_delays_a_run_and_never_brings_a_time_twice() -> None:
    for _ in range(50):
        clocks = Clocks(HOURLY.model_copy(update={"jitter": timedelta(minutes=20)}))
        clocks.pass_(3 * 3600 + 1199)
        first, *others = clocks.runs
        assert first == 0
        assert [second // 3600 for second in others] == [1, 2, 3][: len(others)]
        assert len(others) >= 2
        assert all(second % 3600 <= 1200 for second in others)


def test_a_changed_schedule_counts_from_the_change() -> None:
    clocks = Clocks(HOURLY)
    clocks.pass_(60)
    clocks.table.change(FIVE_MINUTES)
    clocks.pass_(11 * 60)
    assert at(clocks) == [0, 6, 11]


steps = st.lists(
    st.tuples(st.integers(0, 3600), st.integers(-100_000, 100_000).map(lambda s: timedelta(seconds=s))),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_however_a_clock_is_set_no_interval_passes_without_a_run_and_each_step_ahead_adds_one_at_most(
    steps: list[tuple[int, timedelta]],
) -> None:
    clocks, ahead = Clocks(FIVE_MINUTES), 0
    for seconds, step in steps:
        clocks.pass_(seconds)
        clocks.set(step)
        ahead += step > timedelta(0)
    clocks.pass_(600)
    gaps = [later - earlier for earlier, later in zip(clocks.runs, clocks.runs[1:], strict=False)]
    assert max(gaps) <= 300
    assert len(clocks.runs) <= (clocks.monotonic - 1000) / 300 + 1 + ahead + 1


def test_the_thread_requests_a_run_when_its_clock_is_set_and_ends_when_it_is_stopped() -> None:
    ahead, requests = [timedelta(0)], threading.Semaphore(0)
    schedule = Schedule(HOURLY, requests.release, lambda: NOON + ahead[0], check_seconds=0.01)
    thread = threading.Thread(target=schedule.work, daemon=True)
    thread.start()
    assert requests.acquire(timeout=10)
    eventually(lambda: NOON < schedule.next_run() <= NOON + timedelta(hours=1), what="the next time")
    ahead[0] = timedelta(hours=2)
    assert requests.acquire(timeout=10)
    schedule.change(ScheduleConfig(interval=timedelta(seconds=0.05)))
    assert requests.acquire(timeout=10)
    assert requests.acquire(timeout=10)
    schedule.stop()
    thread.join(10)
    assert not thread.is_alive()
