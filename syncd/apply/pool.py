"""Jobs carried out by a few threads at once, in order where they touch the same thing.

What became of them is noted a few at a time, since each note may cost a commit: when there are as many
as there are threads, or the last note is a moment ago. So however the process ends, at most three times
as many jobs as there are threads are done without a note of it: those that are just being noted, those
that wait for that, and the ones under way.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")

_MOMENT = 0.05
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Job(Generic[_T]):
    """Something to do. Two jobs that share one of their `names` are done one after the other, in order."""

    work: Callable[[], _T]
    names: frozenset[str]


class Pool(Generic[_T]):
    """Does jobs, `concurrency` of them at once.

    `note` is told the results as jobs end, in the order in which they ended, never by two threads at
    a time. `should_stop` is asked after each job; once it says yes, no further one begins.
    """

    def __init__(
        self, concurrency: int, note: Callable[[list[_T]], None], should_stop: Callable[[], bool]
    ) -> None:
        self._concurrency = concurrency
        self._note = note
        self._should_stop = should_stop
        self._turn = threading.Condition()
        self._waiting: deque[Job[_T]] = deque()
        self._busy: set[str] = set()
        self._ended: list[tuple[Job[_T], _T]] = []
        self._noting = False
        self._noted_at = 0.0
        self._error: BaseException | None = None
        self.stopped = False

    def run(self, jobs: Sequence[Job[_T]]) -> bool:
        """Do these jobs, and tell whether all of them were done; raises what the first to fail raised.

        After that, or a request to stop, those under way are still brought to their end and noted.
        """
        self._waiting.extend(jobs)
        threads = min(self._concurrency, len(jobs))
        try:
            if threads > 1:
                self._run_in(threads)
            else:
                self._work()
        finally:
            with self._turn:
                self._turn.wait_for(lambda: not self._noting)
                self._note_ended()
        left = bool(self._waiting)
        self._waiting.clear()
        if self._error is not None:
            raise self._error
        return not left

    def _run_in(self, threads: int) -> None:
        with ThreadPoolExecutor(threads, thread_name_prefix="syncd-change") as executor:
            # Each in a context of its own, so that log lines carry the id of the run.
            started = [executor.submit(contextvars.copy_context().run, self._work) for _ in range(threads)]
            try:
                wait(started)
            except BaseException:  # Ctrl-C: the threads end after what they have in hand
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
        """Take the next job, as soon as nothing that is under way or not yet noted shares a name with it."""
        with self._turn:
            while self._waiting and not self.stopped and self._error is None:
                if self._busy.isdisjoint(self._waiting[0].names):
                    job = self._waiting.popleft()
                    self._busy |= job.names
                    return job
                if self._ended and not self._noting:
                    self._note_ended()
                else:
                    self._turn.wait()
            return None

    def _done(self, job: Job[_T], result: _T) -> None:
        with self._turn:
            self._turn.wait_for(lambda: not self._noting or len(self._ended) < self._concurrency)
            self._ended.append((job, result))
            try:
                self.stopped = self.stopped or self._should_stop()
            except BaseException as error:
                self._error = self._error or error
            full = len(self._ended) >= self._concurrency
            if not self._noting and (full or time.monotonic() - self._noted_at >= _MOMENT):
                self._note_ended()

    def _note_ended(self) -> None:
        """Note what has ended. The caller has the turn, and gives it away while it waits for a commit."""
        ended, self._ended = self._ended, []
        if not ended:
            return
        self._noting, error = True, None
        self._turn.release()
        try:
            self._note([result for _, result in ended])
        except BaseException as failed:
            error = failed
        finally:
            self._turn.acquire()
        self._noting = False
        self._error = self._error or error
        self._busy.difference_update(*(job.names for job, _ in ended))
        self._noted_at = time.monotonic()
        self._turn.notify_all()

    def _failed(self, error: BaseException) -> None:
        with self._turn:
            self._error = self._error or error
            self._turn.notify_all()
