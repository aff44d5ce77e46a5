"""Cached, concurrent reads of other systems with a deadline, so that a slow system never blocks a page.

A page starts all its reads at once and waits at most `timeout` seconds. What has not answered by then is
shown with its previous answer, or as unread, while the read continues in its thread for the next view. Each
system is read once at a time, however many people look at the page.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, Generic, TypeVar, cast

import structlog

from syncd.core.errors import SyncdError

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
