"""The pipeline of one queue: posts a batch while it reads the next and commits the previous ones.

Invariants
  * Batches are read, and committed to the books, in the order of the spool. No position ever passes an
    event that is neither delivered nor a dead letter.
  * As many POSTs are in flight as the destination allows, one by default.
  * If the process is killed, what was delivered but not committed is sent again, and the metering API knows
    the ids: at most _MAX_BATCHES_PER_COMMIT batches, and those in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

import orjson

from openmeter_plugin.books.database import is_damage
from openmeter_plugin.books.ledger_lines import ledger_key
from openmeter_plugin.books.store import Books, DeadLetter, Delivery, Lines
from openmeter_plugin.delivery.batch import MAX_BATCH_BYTES, Batch, BatchReader
from openmeter_plugin.delivery.endpoint import Endpoint
from openmeter_plugin.log import RateLimit, get_logger

POLL: Final = 0.05  # seconds between two checks for new records
_LONGEST_PAUSE: Final = 1.0  # seconds between two looks at a queue that nobody uses
_PAUSE_PER_IDLE_SECOND: Final = 0.05
_BOOKS_RETRY_SECONDS: Final = 0.5  # between two tries to commit on a disk that failed
_STOP_GRACE: Final = 5.0  # seconds that a stop waits for POSTs in flight and their commit
_MAX_BATCHES_PER_COMMIT: Final = 4  # several, because they often share ledger lines
_COMMIT_DELAY: Final = (
    0.1  # seconds that a completed batch waits, at most, for others to be committed with it
)


class Idle:
    """Pauses between two looks at a queue: short while it is used, up to a second once it is not.

    Looking every 50 ms took a third of a core with 500 queues that had nothing to do.
    """

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._used_at = time.monotonic()

    def used(self) -> None:
        """Note that there was something to do: the next looks come soon, and `wait` ends."""
        self._used_at = time.monotonic()
        self._news.set()

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        idle = time.monotonic() - self._used_at
        return min(_LONGEST_PAUSE, max(POLL, idle * _PAUSE_PER_IDLE_SECOND))

    async def wait(self) -> None:
        """Wait for the pause, or until there is something to do."""
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.pause):
                await self._news.wait()


@dataclass(slots=True)
class _InFlight:
    """A batch, or replayed dead letters by id, in flight; `task` is None if there is nothing to post."""

    task: asyncio.Task[list[DeadLetter]] | None
    batch: Batch = field(default_factory=Batch)
    letters: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def completed(self) -> bool:
        """Whether the outcome of all its events is known."""
        return self.task is None or (self.task.done() and not self.task.cancelled())

    def dead_letters(self) -> list[DeadLetter]:
        """Return the events that were refused or grew too old; only once it has completed."""
        return [] if self.task is None else self.task.result()


class Pipeline:
    """Sends one queue's batches and commits their outcome to the books."""

    def __init__(self, queue: str, books: Books, batches: BatchReader, endpoint: Endpoint) -> None:
        self._queue = queue
        self._books = books
        self._batches = batches
        self._endpoint = endpoint
        self._in_flight: deque[_InFlight] = deque()
        self._next = Batch()
        self._replays: list[tuple[int, bytes]] = []  # dead letters to replay next
        self._find_replays_at = 0.0  # when to look for dead letters to replay
        self._ready_at = 0.0  # when the next batch may be posted although it is not full
        self._completed_at: float | None = None  # when the first batch completed that is not committed yet
        self.has_room = True
        """Whether the next batch has room for more."""
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()

    async def work(self, *, coalesce: bool) -> bool:
        """Take one step; returns whether there was anything to do.

        With `coalesce`, a batch that is not full is held back for the destination's coalescing delay. When
        cancelled, it waits for POSTs in flight: what is delivered but not committed would be sent again.
        """
        try:
            return await self._step(coalesce=coalesce)
        except asyncio.CancelledError:
            await self._stop()
            raise

    @property
    def unsettled(self) -> set[str]:
        """The segments with read records that are not yet committed as delivered."""
        return set(self._next.positions).union(*(flight.batch.positions for flight in self._in_flight))

    @property
    def unsettled_lines(self) -> Lines:
        """The lines of the ledger of all taken events that are not yet settled in the books."""
        lines = self._next.lines()
        for flight in self._in_flight:
            lines.update(flight.batch.lines())
        return lines

    async def close(self) -> None:
        """Cancel what is in flight."""
        tasks = [flight.task for flight in self._in_flight if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _step(self, *, coalesce: bool) -> bool:
        self._find_replays()
        if self.has_room:
            self._read_more(coalesce=coalesce)
        if self._replays and not self._in_flight:
            await self._post_replay()
        elif not self._replays and self._may_post():
            await self._post_next()
        elif self._pending():
            await self._wait(self._idle_seconds())
        elif self._in_flight:
            await self._commit_completed(at_once=True)
        elif self._next.positions:
            await asyncio.sleep(self._idle_seconds() or 0)
        else:
            return False
        if self._pending():  # otherwise a POST comes first
            await self._commit_completed()
        return True

    def _read_more(self, *, coalesce: bool) -> None:
        """Add available events to the next batch."""
        was_empty = not self._next.events
        limit = self._endpoint.max_batch_size
        all_there_is = self._batches.extend(self._next, limit)
        self.has_room = all_there_is and not self._next.full(limit)
        if was_empty:
            delay = self._endpoint.max_coalescing_delay if coalesce else 0.0
            self._ready_at = time.monotonic() + delay

    def _may_post(self) -> bool:
        """Return whether to post the next batch: it is full or waited long enough, and a POST is allowed."""
        if not self._next.events:
            return bool(self._next.positions)
        limit = self._endpoint.concurrency
        if len(self._pending()) >= limit or len(self._in_flight) >= limit + _MAX_BATCHES_PER_COMMIT:
            return False
        return not self.has_room or time.monotonic() >= self._ready_at

    def _idle_seconds(self) -> float | None:
        """Return for how many seconds to wait for answers; None means until one arrives."""
        if self._completed_at is not None:
            return _COMMIT_DELAY
        return min(POLL, max(0.0, self._ready_at - time.monotonic()) or POLL) if self.has_room else None

    async def _post_next(self) -> None:
        batch, self._next, self.has_room = self._next, Batch(), True
        if batch.events:
            await self._post_events(_InFlight(None, batch), batch.events, fresh=True)
        else:
            self._in_flight.append(_InFlight(None, batch))

    async def _post_replay(self) -> None:
        # Parsed and encoded again, to be equal to the refused events that `send` returns.
        events = {number: orjson.dumps(orjson.loads(event)) for number, event in self._replays}
        self._replays = []
        await self._post_events(_InFlight(None, letters=events), list(events.values()), fresh=False)

    async def _post_events(self, flight: _InFlight, events: list[bytes], *, fresh: bool) -> None:
        """Start the POST; returns once its body is written, or a pending POST has completed."""
        written = asyncio.get_running_loop().create_future()
        flight.task = asyncio.create_task(self._endpoint.send(events, fresh=fresh, written=written))
        self._in_flight.append(flight)
        await asyncio.wait([written, *self._pending()], return_when=asyncio.FIRST_COMPLETED)

    def _pending(self) -> list[asyncio.Task[list[DeadLetter]]]:
        return [flight.task for flight in self._in_flight if flight.task is not None and not flight.completed]

    async def _wait(self, seconds: float | None) -> None:
        """Wait until a POST completes, or for this many seconds."""
        if tasks := self._pending():
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    async def _commit_completed(self, *, at_once: bool = False) -> None:
        """Commit the completed batches that precede the first incomplete one, several together."""
        for flight in self._in_flight:
            if flight.completed:
                flight.batch.events.clear()  # they may be large and are no longer needed
        completed = list(takewhile(lambda flight: flight.completed, self._in_flight))
        if not completed:
            return
        now = time.monotonic()
        self._completed_at = self._completed_at or now
        more_to_come = len(completed) < min(len(self._in_flight), _MAX_BATCHES_PER_COMMIT)
        if at_once or not more_to_come or now >= self._completed_at + _COMMIT_DELAY:
            await self._commit_batches(completed)
            self._completed_at = None

    async def _commit_batches(self, completed: list[_InFlight]) -> None:
        positions: dict[str, int] = {}
        delivery = Delivery(positions, events=sum(flight.batch.event_count for flight in completed))
        for flight in completed:
            if flight.letters:
                await self._commit_replay(flight)
                continue
            positions.update(flight.batch.positions)
            delivery.delivered.update(flight.batch.lines())
            for letter in flight.dead_letters():
                key = ledger_key(orjson.loads(letter.event))
                delivery.delivered[key] -= 1
                delivery.dead_lettered[key] += 1
                delivery.dead_letters.append(letter)
        if positions:
            await self._commit(lambda: self._books.deliver(self._queue, delivery))
        for _ in completed:
            self._in_flight.popleft()

    async def _commit_replay(self, flight: _InFlight) -> None:
        dead = {letter.event: letter for letter in flight.dead_letters()}
        refused = {number: dead[event] for number, event in flight.letters.items() if event in dead}
        delivered = {
            number: ledger_key(orjson.loads(event))
            for number, event in flight.letters.items()
            if number not in refused
        }
        await self._commit(lambda: self._books.replayed(self._queue, delivered, refused))
        self._find_replays_at = 0.0  # there may be more than fit into a batch

    async def _commit(self, write: Callable[[], None]) -> None:
        """Write to the books and retry for as long as the disk fails, because the POST is already done."""
        while True:
            try:
                write()
            except sqlite3.Error as error:
                if is_damage(error):
                    raise
                if self._failure_limit.passes():
                    self._log.error("books_write_failed", reason=str(error))
                await asyncio.sleep(_BOOKS_RETRY_SECONDS)
            else:
                return

    def _find_replays(self) -> None:
        """Look periodically for dead letters marked for replay, as many as fit into a batch.

        They are posted alone, so that none is picked again while it is in flight.
        """
        now = time.monotonic()
        if now < self._find_replays_at or self._replays or any(flight.letters for flight in self._in_flight):
            return
        self._find_replays_at = now + POLL
        try:
            self._replays = self._books.to_replay(self._queue, self._endpoint.max_batch_size, MAX_BATCH_BYTES)
        except sqlite3.Error as error:
            if is_damage(error):
                raise

    async def _stop(self) -> None:
        """Wait a limited time for POSTs in flight, and commit what has completed."""
        self._endpoint.stopping = True
        try:
            async with asyncio.timeout(_STOP_GRACE):
                if tasks := [task for task in self._pending() if task not in self._endpoint.waiting]:
                    await asyncio.wait(tasks)
                await self._commit_completed(at_once=True)
        except TimeoutError:
            self._log.warning("stopped_before_answer", consequence="the batches in flight are sent again")
