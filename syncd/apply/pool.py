"""Thread pool for jobs; jobs that share a resource run in order.

Results are recorded a few at a time, because each call of `record` may cost a commit: once there are as
many results as threads, or some time after the last call. So however the process ends, the number of jobs
done without a record is at most three times the number of threads: results being recorded, results
waiting for that, and jobs still running.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from syncd.core.changes import Change

_T = TypeVar("_T")

_RECORD_INTERVAL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Job(Generic[_T]):
    """A piece of work. Jobs that share one of their `resources` run one after the other, in order."""

    work: Callable[[], _T]
    resources: frozenset[str]
    about: tuple[Change, ...] = ()
    """The changes that it makes."""


class Pool(Generic[_T]):
    """Runs jobs, `concurrency` of them at once.

    `announce` receives jobs before they start, a few at a time. `record` receives results in the order in
    which jobs ended, never from two threads at a time. `should_stop` is called after each job; once it
    returns true, no further job starts.
    """

    def __init__(
        self,
        concurrency: int,
        record: Callable[[list[_T]], None],
        should_stop: Callable[[], bool],
        announce: Callable[[Sequence[Job[_T]]], None] = lambda _jobs: None,
    ) -> None:
        self._announce = announce
        self._announced = 0
        self._concurrency = concurrency
        self._record = record
        self._should_stop = should_stop
        self._condition = threading.Condition()
        self._waiting: deque[Job[_T]] = deque()
        self._busy: set[str] = set()
        self._ended: list[tuple[Job[_T], _T]] = []
        self._recording = False
        self._recorded_at = 0.0
        self._error: BaseException | None = None
        self.stopped = False

    def run(self, jobs: Sequence[Job[_T]]) -> bool:
        """Run these jobs and return whether all of them ran; raises the error of the first job that failed.

        After an error or a request to stop, running jobs still finish and are recorded.
        """
        self._waiting.extend(jobs)
        threads = min(self._concurrency, len(jobs))
        try:
            if threads > 1:
                self._run_in(threads)
            else:
                self._work()
        finally:
            with self._condition:
                self._condition.wait_for(lambda: not self._recording)
                self._record_ended()
        left = bool(self._waiting)
        self._waiting.clear()
        self._announced = 0
        if self._error is not None:
            raise self._error
        return not left

    def _run_in(self, threads: int) -> None:
        with ThreadPoolExecutor(threads, thread_name_prefix="syncd-change") as executor:
            # Each in its own copy of the context, so that log lines carry the run id.
            started = [executor.submit(contextvars.copy_context().run, self._work) for _ in range(threads)]
            try:
                wait(started)
            except BaseException:  # Ctrl-C: each thread ends after its current job
                self.stopped = True
                raise

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                result = job.work()
            except BaseException as error:
                self._failed(error)
            else:
                self._done(job, result)

    def _next(self) -> Job[_T] | None:
        """Return the next job once no running or unrecorded job shares a resource with it."""
        with self._condition:
            while self._waiting and not self.stopped and self._error is None:
                if self._busy.isdisjoint(self._waiting[0].resources):
                    try:
                        self._announce_next()
                    except BaseException as error:
                        self._error = error
                        continue
                    job = self._waiting.popleft()
                    self._announced -= 1
                    self._busy |= job.resources
                    return job
                if self._ended and not self._recording:
                    self._record_ended()
                else:
                    self._condition.wait()
            return None

    def _announce_next(self) -> None:
        """Announce as many jobs as there are threads: at once, because each call may cost a commit."""
        if self._announced == 0:
            jobs = list(islice(self._waiting, self._concurrency))
            self._announce(jobs)
            self._announced = len(jobs)

    def _done(self, job: Job[_T], result: _T) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._recording or len(self._ended) < self._concurrency)
            self._ended.append((job, result))
            try:
                self.stopped = self.stopped or self._should_stop()
            except BaseException as error:
                self._error = self._error or error
            full = len(self._ended) >= self._concurrency
            if not self._recording and (
                full or time.monotonic() - self._recorded_at >= _RECORD_INTERVAL_SECONDS
            ):
                self._record_ended()

    def _record_ended(self) -> None:
        """Record ended jobs. The caller holds the lock, which is released while `record` may commit."""
        ended, self._ended = self._ended, []
        if not ended:
            return
        self._recording, error = True, None
        self._condition.release()
        try:
            self._record([result for _, result in ended])
        except BaseException as failed:
            error = failed
        finally:
            self._condition.acquire()
        self._recording = False
        self._error = self._error or error
        self._busy.difference_update(*(job.resources for job, _ in ended))
        self._recorded_at = time.monotonic()
        self._condition.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()
