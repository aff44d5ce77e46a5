"""Jobs in a few threads: how many at once, in which order, and what is noted however it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.apply.pool import Job, Pool


def pool(
    concurrency: int, note: Callable[[list[str]], None], should_stop: Callable[[], bool] = lambda: False
) -> Pool[str]:
    return Pool(concurrency, note, should_stop)


class Crowd:
    """Work that waits until so many are inside at once, and knows the most that ever were."""

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
def test_as_many_jobs_as_allowed_are_under_way_and_never_more(concurrency: int) -> None:
    crowd = Crowd(concurrency)
    assert pool(concurrency, lambda _: None).run([Job(crowd, frozenset({str(n)})) for n in range(25)])
    assert crowd.most == concurrency


@settings(max_examples=100, deadline=None)
@given(st.lists(st.frozensets(st.sampled_from("abcd"), max_size=3), max_size=30), st.integers(1, 6))
def test_jobs_that_share_a_name_never_overlap_and_keep_their_order(
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

    noted: list[str] = []
    assert pool(concurrency, noted.extend).run([job(n, touches) for n, touches in enumerate(names)])
    assert sorted(map(int, noted)) == list(range(len(names)))
    for name in "abcd":
        order = [number for number in begun if name in names[number]]
        assert order == sorted(order)


def test_a_job_begins_only_when_what_it_shares_a_name_with_is_noted() -> None:
    noted: list[str] = []
    seen: list[list[str]] = []

    def second() -> str:
        seen.append(list(noted))
        return "second"

    jobs = [Job(lambda: "warm-up", frozenset({"x"})), Job(lambda: "first", frozenset({"a"}))]
    pool(4, noted.extend).run([*jobs, Job(second, frozenset({"a"}))])
    assert "first" in seen[0]


def test_never_more_than_three_times_the_threads_are_done_without_a_note() -> None:
    lock, done, noted, most = threading.Lock(), 0, 0, 0

    def work() -> str:
        nonlocal done, most
        with lock:
            done += 1
            most = max(most, done - noted)
        return "done"

    def note(results: list[str]) -> None:
        nonlocal noted
        with lock:
            noted += len(results)

    pool(3, note).run([Job(work, frozenset({str(n)})) for n in range(500)])
    assert noted == 500
    assert most <= 9


def test_after_a_failure_what_is_under_way_is_still_noted_and_nothing_else_begins() -> None:
    both, noted, begun = threading.Barrier(2), list[str](), list[str]()
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
        pool(2, noted.extend).run(jobs)
    assert noted == ["slow"]
    assert begun == []


def test_a_note_that_fails_ends_it() -> None:
    begun: list[int] = []

    def note(_results: list[str]) -> None:
        raise OSError("disk full")

    def job(number: int) -> Job[str]:
        def work() -> str:
            begun.append(number)
            return str(number)

        return Job(work, frozenset({str(number)}))

    with pytest.raises(OSError, match="disk full"):
        pool(2, note).run([job(number) for number in range(100)])
    assert len(begun) <= 4


def test_a_request_to_stop_ends_it_with_all_that_was_done_noted() -> None:
    noted: list[str] = []
    jobs = [Job(lambda n=n: str(n), frozenset({str(n)})) for n in range(100)]  # type: ignore[misc]
    stopping = pool(4, noted.extend, lambda: True)
    assert not stopping.run(jobs)
    assert stopping.stopped
    assert 1 <= len(noted) <= 4


def test_threads_log_with_what_their_caller_bound() -> None:
    crowd = Crowd(2)

    def work() -> str:
        crowd()
        return str(structlog.contextvars.get_contextvars().get("run"))

    noted: list[str] = []
    with structlog.contextvars.bound_contextvars(run="r1"):
        pool(2, noted.extend).run([Job(work, frozenset({str(n)})) for n in range(4)])
    assert noted == ["r1"] * 4
