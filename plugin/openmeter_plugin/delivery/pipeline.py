"""Delivering one queue: while a batch is posted, the next is made ready and the last ones are entered.

Invariants
  * Batches are made, and entered in the books, in the order of the spool. No position ever passes an event
    that is neither taken nor a dead letter.
  * As many POSTs are under way as the destination allows, one unless it says otherwise.
  * What was taken and is not entered when the process is killed is sent again, and the metering API knows
    the ids: at most _MAX_BATCHES_PER_COMMIT batches, and those that are under way.
"""

from __future__ import annotations

import asyncio
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
from openmeter_plugin.books.store import Books, DeadLetter, Delivery
from openmeter_plugin.delivery import batch as batches_module
from openmeter_plugin.delivery.batch import Batch, BatchReader
from openmeter_plugin.delivery.endpoint import Endpoint, Sender
from openmeter_plugin.log import RateLimit, get_logger

POLL: Final = 0.05  # seconds between two looks for new records
_BOOKS_RETRY_SECONDS: Final = 0.5  # seconds between two tries to commit on a disk that failed
_STOP_GRACE: Final = 5.0  # seconds that a stop waits for POSTs under way and for their entry in the books
_MAX_BATCHES_PER_COMMIT: Final = 4  # batches at most: their lines of the ledger are often the same
_COMMIT_DELAY: Final = 0.1  # seconds at most


@dataclass(slots=True)
class _InFlight:
    """A batch, or dead letters by their ids, on the way; `task` is None where there is nothing to post."""

    task: asyncio.Task[list[DeadLetter]] | None
    batch: Batch = field(default_factory=Batch)
    letters: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def completed(self) -> bool:
        """Whether it is known what became of everything in it."""
        return self.task is None or (self.task.done() and not self.task.cancelled())

    def dead_letters(self) -> list[DeadLetter]:
        """Return what was not taken, of one that has completed."""
        return [] if self.task is None else self.task.result()


class Pipeline:
    """Has one queue's batches sent and enters in the books what became of them."""

    def __init__(
        self, queue: str, books: Books, batches: BatchReader, endpoint: Endpoint, sender: Sender
    ) -> None:
        self._queue = queue
        self._books = books
        self._batches = batches
        self._endpoint = endpoint
        self._sender = sender
        self._in_flight: deque[_InFlight] = deque()
        self._next = Batch()
        self._replays: list[tuple[int, bytes]] = []  # to be sent again
        self._look_at = 0.0  # when to look for such
        self._ready_at = 0.0  # when the next batch is not held back any longer
        self._completed_at: float | None = None  # when the first of those was found that are to be entered
        self.has_room = True
        """Whether there is room for more in the next batch."""
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()

    async def work(self, *, patient: bool) -> bool:
        """Take one step; returns whether there was anything to do.

        Where it is `patient`, a batch is held back for the destination's coalescing delay, to fill it.
        When it is cancelled, it waits for POSTs under way: what is taken but not entered would be sent again.
        """
        try:
            return await self._step(patient=patient)
        except asyncio.CancelledError:
            await self._stop()
            raise

    @property
    def unsettled(self) -> set[str]:
        """The segments of which something is read and not yet entered as delivered."""
        return set(self._next.positions).union(*(flight.batch.positions for flight in self._in_flight))

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = [flight.task for flight in self._in_flight if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _step(self, *, patient: bool) -> bool:
        self._find_replays()
        if self.has_room:
            self._read_on(patient=patient)
        if self._replays and not self._in_flight:
            await self._launch_replay()
        elif not self._replays and self._may_launch():
            await self._launch_next()
        elif self._under_way():
            await self._wait(self._idle_seconds())
        elif self._in_flight:
            await self._commit_completed(at_once=True)
        elif self._next.positions:
            await asyncio.sleep(self._idle_seconds() or 0)
        else:
            return False
        if self._under_way():  # else what can be posted comes first
            await self._commit_completed()
        return True

    def _read_on(self, *, patient: bool) -> None:
        """Add to the next batch what is there."""
        was_empty = not self._next.events
        limit = self._endpoint.max_batch_size
        all_there_is = self._batches.extend(self._next, limit)
        self.has_room = all_there_is and not self._next.full(limit)
        if was_empty:
            held_back = self._endpoint.max_coalescing_delay if patient else 0.0
            self._ready_at = time.monotonic() + held_back

    def _may_launch(self) -> bool:
        """Tell whether the next batch can go: it is full or has waited long enough, and it is its turn."""
        if not self._next.events:
            return bool(self._next.positions)
        most = self._endpoint.concurrency
        if len(self._under_way()) >= most or len(self._in_flight) >= most + _MAX_BATCHES_PER_COMMIT:
            return False
        return not self.has_room or time.monotonic() >= self._ready_at

    def _idle_seconds(self) -> float | None:
        """Return for how many seconds there is nothing to do but wait for answers; None: until one comes."""
        if self._completed_at is not None:
            return _COMMIT_DELAY
        return min(POLL, max(0.0, self._ready_at - time.monotonic()) or POLL) if self.has_room else None

    async def _launch_next(self) -> None:
        batch, self._next, self.has_room = self._next, Batch(), True
        if batch.events:
            await self._launch(_InFlight(None, batch), batch.events, expiring=True)
        else:
            self._in_flight.append(_InFlight(None, batch))

    async def _launch_replay(self) -> None:
        # As `send` gives back what is refused: parsed and encoded again.
        events = {number: orjson.dumps(orjson.loads(event)) for number, event in self._replays}
        self._replays = []
        await self._launch(_InFlight(None, letters=events), list(events.values()), expiring=False)

    async def _launch(self, flight: _InFlight, events: list[bytes], *, expiring: bool) -> None:
        """Post the events; returns when that needs nothing of us any more but to wait."""
        on_sent = asyncio.get_running_loop().create_future()

        def note() -> None:
            if not on_sent.done():
                on_sent.set_result(None)

        flight.task = asyncio.create_task(self._sender.send(events, expiring=expiring, on_sent=note))
        self._in_flight.append(flight)
        await asyncio.wait([on_sent, *self._under_way()], return_when=asyncio.FIRST_COMPLETED)

    def _under_way(self) -> list[asyncio.Task[list[DeadLetter]]]:
        return [flight.task for flight in self._in_flight if flight.task is not None and not flight.completed]

    async def _wait(self, seconds: float | None) -> None:
        """Wait until a flight lands, for so many seconds at most."""
        if tasks := self._under_way():
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    async def _commit_completed(self, *, at_once: bool = False) -> None:
        """Enter the flights that have completed and that none is before which has not: some together."""
        for flight in self._in_flight:
            if flight.completed:
                flight.batch.events.clear()  # they may be large, and nobody needs them any more
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
        delivery = Delivery(positions)
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
        taken = {
            number: ledger_key(orjson.loads(event))
            for number, event in flight.letters.items()
            if number not in refused
        }
        await self._commit(lambda: self._books.replayed(self._queue, taken, refused))

    async def _commit(self, entry: Callable[[], None]) -> None:
        """Make an entry in the books, however long the disk fails: what it is about is done already."""
        while True:
            try:
                entry()
            except sqlite3.Error as error:
                if is_damage(error):
                    raise
                if self._failure_limit.passes():
                    self._log.error("books_cannot_be_written", reason=str(error))
                await asyncio.sleep(_BOOKS_RETRY_SECONDS)
            else:
                return

    def _find_replays(self) -> None:
        """Look now and then for dead letters that somebody wants sent again, as many as go into a batch.

        They go alone, so that none is taken for one that waits while it is under way.
        """
        now = time.monotonic()
        if now < self._look_at or self._replays or any(flight.letters for flight in self._in_flight):
            return
        self._look_at = now + POLL
        try:
            self._replays = self._books.to_replay(
                self._queue, self._endpoint.max_batch_size, batches_module.MAX_BATCH_BYTES
            )
        except sqlite3.Error as error:
            if is_damage(error):
                raise

    async def _stop(self) -> None:
        """Let POSTs that are under way end, within a bound, and enter what has completed."""
        self._endpoint.stopping = True
        try:
            async with asyncio.timeout(_STOP_GRACE):
                if tasks := [task for task in self._under_way() if task not in self._endpoint.waiting]:
                    await asyncio.wait(tasks)
                await self._commit_completed(at_once=True)
        except TimeoutError:
            self._log.warning("stopped_before_an_answer", consequence="what is under way is sent again")
