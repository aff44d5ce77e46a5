"""Delivering one queue: while a batch is posted, the next is made ready and the last ones are entered.

Invariants
  * Batches are made, and entered in the books, in the order of the spool. No position ever passes an event
    that is neither taken nor a dead letter.
  * As many POSTs are under way as the destination allows, one unless it says otherwise.
  * What was taken and is not entered when the process is killed is sent again, and the metering API knows
    the ids: at most _ENTERED_TOGETHER batches, and those that are under way.
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
_BOOKS_RETRY: Final = 0.5  # seconds between two tries to commit on a disk that failed
_GRACE: Final = 5.0  # seconds that a stop waits for POSTs under way and for their entry in the books
_ENTERED_TOGETHER: Final = 4  # batches at most: their lines of the ledger are often the same
_ENTERED_AFTER: Final = 0.1  # seconds at most


@dataclass(slots=True)
class _Flight:
    """A batch, or dead letters by their ids, on the way; `task` is None where there is nothing to post."""

    task: asyncio.Task[list[DeadLetter]] | None
    batch: Batch = field(default_factory=Batch)
    letters: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def landed(self) -> bool:
        """Whether it is known what became of everything in it."""
        return self.task is None or (self.task.done() and not self.task.cancelled())

    def dead_letters(self) -> list[DeadLetter]:
        """Return what was not taken, of one that has landed."""
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
        self._flights: deque[_Flight] = deque()
        self._next = Batch()
        self._letters: list[tuple[int, bytes]] = []  # to be sent again
        self._look_at = 0.0  # when to look for such
        self._ready_at = 0.0  # when the next batch is not held back any longer
        self._landed_at: float | None = None  # when the first of those was found that are to be entered
        self.hungry = True
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
        return set(self._next.positions).union(*(flight.batch.positions for flight in self._flights))

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = [flight.task for flight in self._flights if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _step(self, *, patient: bool) -> bool:
        self._look_for_letters()
        if self.hungry:
            self._read_on(patient=patient)
        if self._letters and not self._flights:
            await self._launch_letters()
        elif not self._letters and self._may_launch():
            await self._launch_next()
        elif self._under_way():
            await self._wait(self._patience())
        elif self._flights:
            await self._settle(at_once=True)
        elif self._next.positions:
            await asyncio.sleep(self._patience() or 0)
        else:
            return False
        if self._under_way():  # else what can be posted comes first
            await self._settle()
        return True

    def _read_on(self, *, patient: bool) -> None:
        """Add to the next batch what is there."""
        was_empty = not self._next.events
        limit = self._endpoint.max_batch_size
        all_there_is = self._batches.extend(self._next, limit)
        self.hungry = all_there_is and not self._next.full(limit)
        if was_empty:
            suppressed = self._endpoint.max_coalescing_delay if patient else 0.0
            self._ready_at = time.monotonic() + suppressed

    def _may_launch(self) -> bool:
        """Tell whether the next batch can go: it is full or has waited long enough, and it is its turn."""
        if not self._next.events:
            return bool(self._next.positions)
        most = self._endpoint.concurrency
        if len(self._under_way()) >= most or len(self._flights) >= most + _ENTERED_TOGETHER:
            return False
        return not self.hungry or time.monotonic() >= self._ready_at

    def _patience(self) -> float | None:
        """Return for how many seconds there is nothing to do but wait for answers; None: until one comes."""
        if self._landed_at is not None:
            return _ENTERED_AFTER
        return min(POLL, max(0.0, self._ready_at - time.monotonic()) or POLL) if self.hungry else None

    async def _launch_next(self) -> None:
        batch, self._next, self.hungry = self._next, Batch(), True
        if batch.events:
            await self._launch(_Flight(None, batch), batch.events, expiring=True)
        else:
            self._flights.append(_Flight(None, batch))

    async def _launch_letters(self) -> None:
        # As `send` gives back what is refused: parsed and encoded again.
        events = {number: orjson.dumps(orjson.loads(event)) for number, event in self._letters}
        self._letters = []
        await self._launch(_Flight(None, letters=events), list(events.values()), expiring=False)

    async def _launch(self, flight: _Flight, events: list[bytes], *, expiring: bool) -> None:
        """Post the events; returns when that needs nothing of us any more but to wait."""
        on_its_way = asyncio.get_running_loop().create_future()

        def note() -> None:
            if not on_its_way.done():
                on_its_way.set_result(None)

        flight.task = asyncio.create_task(self._sender.send(events, expiring=expiring, on_its_way=note))
        self._flights.append(flight)
        await asyncio.wait([on_its_way, *self._under_way()], return_when=asyncio.FIRST_COMPLETED)

    def _under_way(self) -> list[asyncio.Task[list[DeadLetter]]]:
        return [flight.task for flight in self._flights if flight.task is not None and not flight.landed]

    async def _wait(self, seconds: float | None) -> None:
        """Wait until a flight lands, for so many seconds at most."""
        if tasks := self._under_way():
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    async def _settle(self, *, at_once: bool = False) -> None:
        """Enter the flights that have landed and that none is before which has not: some together."""
        for flight in self._flights:
            if flight.landed:
                flight.batch.events.clear()  # they may be large, and nobody needs them any more
        landed = list(takewhile(lambda flight: flight.landed, self._flights))
        if not landed:
            return
        now = time.monotonic()
        self._landed_at = self._landed_at or now
        more_to_come = len(landed) < min(len(self._flights), _ENTERED_TOGETHER)
        if at_once or not more_to_come or now >= self._landed_at + _ENTERED_AFTER:
            await self._enter(landed)
            self._landed_at = None

    async def _enter(self, landed: list[_Flight]) -> None:
        positions: dict[str, int] = {}
        delivery = Delivery(positions)
        for flight in landed:
            if flight.letters:
                await self._enter_letters(flight)
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
        for _ in landed:
            self._flights.popleft()

    async def _enter_letters(self, flight: _Flight) -> None:
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
                await asyncio.sleep(_BOOKS_RETRY)
            else:
                return

    def _look_for_letters(self) -> None:
        """Look now and then for dead letters that somebody wants sent again, as many as go into a batch.

        They go alone, so that none is taken for one that waits while it is under way.
        """
        now = time.monotonic()
        if now < self._look_at or self._letters or any(flight.letters for flight in self._flights):
            return
        self._look_at = now + POLL
        try:
            self._letters = self._books.to_replay(
                self._queue, self._endpoint.max_batch_size, batches_module.MAX_BATCH_BYTES
            )
        except sqlite3.Error as error:
            if is_damage(error):
                raise

    async def _stop(self) -> None:
        """Let POSTs that are under way end, within a bound, and enter what has landed."""
        self._endpoint.stopping = True
        try:
            async with asyncio.timeout(_GRACE):
                if tasks := [task for task in self._under_way() if task not in self._endpoint.waiting]:
                    await asyncio.wait(tasks)
                await self._settle(at_once=True)
        except TimeoutError:
            self._log.warning("stopped_before_an_answer", consequence="what is under way is sent again")
