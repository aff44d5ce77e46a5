"""Looking at other systems without waiting for them: in threads, at once, kept for a while, with a deadline.

A page asks for all that it shows together and waits `patience` seconds at most. What has not answered by
then is shown as unread, or as it was the last time, while its reading goes on for the next view. Of each
thing there is one reading at a time, however many people look.
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

FRESH: Final = 15.0  # seconds for which an answer is shown again
PATIENCE: Final = 2.0  # seconds for which a page waits
_MAX_AT_ONCE: Final = 16
_MAX_KEPT: Final = 200


@dataclass(frozen=True, slots=True)
class Answer(Generic[_T]):
    """What was read, or why it could not be; `read_at` is when. `late`: it is an older answer."""

    value: _T | None
    problem: str | None = None
    read_at: datetime | None = None
    late: bool = False


@dataclass(slots=True)
class _Entry:
    answer: Answer[object] | None = None
    read: float = 0.0
    busy: bool = False
    done: threading.Event = field(default_factory=threading.Event)


class Reader:
    """Readings by key; safe to use from any thread."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        fresh: float = FRESH,
        patience: float = PATIENCE,
        at_once: int = _MAX_AT_ONCE,
    ) -> None:
        self._clock = clock
        self._fresh = fresh
        self._patience = patience
        self._slots = threading.Semaphore(at_once)
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def ask(
        self, questions: Mapping[str, Callable[[], _T]], *, patience: float | None = None
    ) -> dict[str, Answer[_T]]:
        """Return an answer to each question, all within `patience` seconds."""
        patience = self._patience if patience is None else patience
        deadline = time.monotonic() + patience
        entries = {key: self._begun(key, read) for key, read in questions.items()}
        for entry in entries.values():
            if entry is not None:
                entry.done.wait(max(0.0, deadline - time.monotonic()))
        return {key: self._answer(entry, patience) for key, entry in entries.items()}

    def ask_one(self, key: str, read: Callable[[], _T], *, patience: float | None = None) -> Answer[_T]:
        """Return the answer to one question."""
        return self.ask({key: read}, patience=patience)[key]

    def _begun(self, key: str, read: Callable[[], object]) -> _Entry | None:
        """Return the entry of a question, its reading begun where needed; None where that cannot be."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            self._entries.move_to_end(key)
            while len(self._entries) > _MAX_KEPT:
                self._entries.popitem(last=False)
            fresh = entry.answer is not None and self._clock() - entry.read < self._fresh
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
            _log.exception("reading_failed", what=key)
            answer = Answer(None, "internal error; the daemon's log has the details", datetime.now(UTC))
        with self._lock:
            entry.answer, entry.read, entry.busy = answer, self._clock(), False
            entry.done.set()
        self._slots.release()

    def _answer(self, entry: _Entry | None, patience: float) -> Answer[_T]:
        if entry is None:
            return Answer(None, "too much is being read at once; look again in a moment")
        with self._lock:
            answer, busy = entry.answer, entry.busy
        if answer is None:
            return Answer(None, f"no answer within {patience:g} s; look again in a moment")
        # What is kept for a key is what the questions of that key give.
        return replace(cast("Answer[_T]", answer), late=busy)
