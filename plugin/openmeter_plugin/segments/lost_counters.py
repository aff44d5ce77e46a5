"""Counts of requests that Kong's workers could not write, and how much of them the books have.

Each worker has a file of counters, which only grow. What is taken over of them is noted in the journal, in
the batch that takes it over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Final

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.segments.folder import Directory
from openmeter_plugin.segments.line_format import (
    LOST_NAME,
    LOST_SIZE,
    UNFINISHED_NAME,
    Counters,
    parse_lost,
)

_MAX_FILES: Final = 4096  # read in one turn
_LEFTOVER_SECONDS: Final = 60.0


class LostCounters:
    """The counter files of a folder. `taken` has, by worker, what is taken over, as in the journal."""

    def __init__(self, taken: Mapping[str, Mapping[str, int]]) -> None:
        self.taken: dict[str, dict[str, int]] = {worker: dict(counts) for worker, counts in taken.items()}
        self.ended: list[str] = []
        """Workers whose counters are taken over and have no writer any more."""
        self._workers: list[str] = []
        self._turn = 0
        self._limit = RateLimit()

    def found(self, names: list[str], files: Directory) -> None:
        """Note the counter files in the folder, and remove what a killed worker has left unfinished."""
        self._workers = [match["worker"] for name in names if (match := LOST_NAME.fullmatch(name))]
        oldest = time.time() - _LEFTOVER_SECONDS
        for name in names:
            if UNFINISHED_NAME.fullmatch(name):
                status = files.status(name)
                if status is not None and status.st_mtime < oldest and files.is_unlocked(name):
                    files.remove(name)

    def new(self, files: Directory) -> Iterator[tuple[str, dict[str, int], dict[str, int]]]:
        """Yield, by worker, its counts and how many more they are than those taken over."""
        if self._turn >= len(self._workers):
            self._turn = 0
        turn = self._workers[self._turn : self._turn + _MAX_FILES]
        self._turn += len(turn)
        for worker in turn:
            try:
                ended = files.is_unlocked(f"{worker}.lost")  # first: it counted before it was gone
                file = files.read(f"{worker}.lost", LOST_SIZE)
            except OSError as error:
                self._report(worker, error.strerror or str(error))
                continue
            if file is None:
                continue
            counts = parse_lost(file.content)
            if counts is None:
                self._report(worker, "it is damaged, or no such file")
                continue
            if lost := self.difference(worker, counts):
                yield worker, counts, lost
            elif ended:
                self.ended.append(worker)

    def difference(self, worker: str, counts: Counters) -> dict[str, int]:
        """Return how many more these counts are than those taken over, by cause."""
        taken = self.taken.get(worker, {})
        more = {cause: count - taken.get(cause, 0) for cause, count in counts.items()}
        return {cause: count for cause, count in more.items() if count > 0}

    def remove_ended(self, files: Directory) -> None:
        """Remove the files of ended workers."""
        ended, self.ended = self.ended, []
        for worker in ended:
            try:
                files.remove(f"{worker}.lost")
            except OSError as error:
                self._report(worker, error.strerror or str(error))
                continue
            self.taken.pop(worker, None)
            if worker in self._workers:
                self._workers.remove(worker)

    def _report(self, worker: str, reason: str) -> None:
        if self._limit.passes():
            get_logger().error("kong_counters_unreadable", worker=worker, reason=reason)
