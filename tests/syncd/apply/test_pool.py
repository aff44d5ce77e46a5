"""The thread pool: concurrency, order, and records of results however a run ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.apply.pool import Job, Pool


def pool(
    concurrency: int, record: Callable[[list[str]], None], should_stop: Callable[[], bool] = lambda: False
) -> Pool[str]:
    return Pool(concurrency, record, should_stop)


class Crowd:
    """Work that waits until `expected` threads run it at once, and records the most that ever did."""

    def __init__(self, expected: int) -> None:
        self.inside, self.most = 0, 0
        self._expected = expected
        self._changed = threading.Condition()

    def __call__(self) -> str:
        with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self.most >= self._expected, timeout=10)
            self.inside -= 1
        return "done"


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_as_many_jobs_as_allowed_run_at_once_and_never_more(concurrency: int) -> None:
    crowd = Crowd(concurrency)
    assert pool(concurrency, lambda _: None).run([Job(crowd, frozenset({str(n)})) for n in range(25)])
    assert crowd.most == concurrency


@settings(max_examples=100, deadline=None)
@given(st.lists(st.frozensets(st.sampled_from("abcd"), max_size=3), max_size=30), st.integers(1, 6))
def test_jobs_that_share_a_resource_never_overlap_and_keep_their_order(
    names: list[frozenset[str]], concurrency: int
) -> None:
    lock, under_way, begun = threading.Lock(), set[str](), list[int]()

    def job(number: int, touches: frozenset[str]) -> Job[str]:
        def work() -> str:
            with lock:
                assert under_way.isdisjoint(touches)
                under_way.update(touches)
                begun.append(number)
            with lock:
                under_way.difference_update(touches)
            return str(number)

        return Job(work, touches)

    recorded: list[str] = []
    assert pool(concurrency, recorded.extend).run([job(n, touches) for n, touches in enumerate(names)])
    assert sorted(map(int, recorded)) == list(range(len(names)))
    for name in "abcd":
        order = [number for number in begun if name in names[number]]
        assert order == sorted(order)


def test_a_job_starts_only_after_the_job_with_the_same_resource_is_recorded() -> None:
    recorded: list[str] = []
    seen: list[list[str]] = []

    def second() -> str:
        seen.append(list(recorded))
        return "second"

    jobs = [Job(lambda: "warm-up", frozenset({"x"})), Job(lambda: "first", frozenset({"a"}))]
    pool(4, recorded.extend).run([*jobs, Job(second, frozenset({"a"}))])
    assert "first" in seen[0]


def test_never_more_jobs_are_unrecorded_than_three_times_the_threads() -> None:
    lock, done, recorded, most = threading.Lock(), 0, 0, 0

    def work() -> str:
        nonlocal done, most
        with lock:
            done += 1
            most = max(most, done - recorded)
        return "done"

    def record(results: list[str]) -> None:
        nonlocal recorded
        with lock:
            recorded += len(results)

    pool(3, record).run([Job(work, frozenset({str(n)})) for n in range(500)])
    assert recorded == 500
    assert most <= 9


def test_after_a_failure_running_jobs_are_still_recorded_and_no_other_starts() -> None:
    both, recorded, begun = threading.Barrier(2), list[str](), list[str]()
    failed = threading.Event()

    def fail() -> str:
        both.wait(10)
        failed.set()
        raise ValueError("broken")

    def slow() -> str:
        both.wait(10)
        assert failed.wait(10)
        return "slow"

    def late() -> str:
        begun.append("late")
        return "late"

    gate = frozenset({"gate"})
    jobs = [Job(fail, gate), Job(slow, frozenset({"b"})), *[Job(late, gate)] * 3]
    with pytest.raises(ValueError, match="broken"):
        pool(2, recorded.extend).run(jobs)
    assert recorded == ["slow"]
    assert begun == []


def test_a_failing_record_ends_the_run() -> None:
    begun: list[int] = []

    def record(_results: list[str]) -> None:
        raise OSError("disk full")

    def job(number: int) -> Job[str]:
        def work() -> str:
            begun.append(number)
            return str(number)

        return Job(work, frozenset({str(number)}))

    with pytest.raises(OSError, match="disk full"):
        pool(2, record).run([job(number) for number in range(100)])
    assert len(begun) <= 4


def test_a_request_to_stop_ends_the_run_with_all_results_recorded() -> None:
    recorded: list[str] = []
    jobs = [Job(lambda n=n: str(n), frozenset({str(n)})) for n in range(100)]  # type: ignore[misc]
    stopping = pool(4, recorded.extend, lambda: True)
    assert not stopping.run(jobs)
    assert stopping.stopped
    assert 1 <= len(recorded) <= 4


def test_threads_log_with_the_context_of_their_caller() -> None:
    crowd = Crowd(2)

    def work() -> str:
        crowd()
        return str(structlog.contextvars.get_contextvars().get("run"))

    recorded: list[str] = []
    with structlog.contextvars.bound_contextvars(run="r1"):
        pool(2, recorded.extend).run([Job(work, frozenset({str(n)})) for n in range(4)])
    assert recorded == ["r1"] * 4
