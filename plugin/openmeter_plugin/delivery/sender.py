"""Delivering one queue: batch after batch, in order, each until the metering API has taken it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson

from openmeter_plugin.delivery import batch as batches_module
from openmeter_plugin.delivery.batch import Batch, BatchReader
from openmeter_plugin.delivery.books import Books, DeadLetter, Delivery
from openmeter_plugin.delivery.books_file import is_damage
from openmeter_plugin.delivery.client import RejectedError
from openmeter_plugin.delivery.endpoint import Endpoint
from openmeter_plugin.delivery.usage import ledger_key
from openmeter_plugin.log import RateLimit, get_logger

POLL: Final = 0.05  # seconds between two looks for new records
_BOOKS_RETRY: Final = 0.5  # seconds between two tries to commit on a disk that failed
_GRACE: Final = 5.0  # seconds that a stop waits for a POST under way and for its entry in the books


class Sender:
    """Sends one queue's events through its endpoint and enters in the books what became of them."""

    def __init__(
        self,
        queue: str,
        books: Books,
        batches: BatchReader,
        endpoint: Endpoint,
        max_age: timedelta | None = None,
    ) -> None:
        self._queue = queue
        self._books = books
        self._batches = batches
        self._endpoint = endpoint
        self._max_age = max_age
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()

    async def work(self, *, patient: bool) -> bool:
        """Send one batch and commit it; returns whether there was anything.

        A `patient` sender holds a batch back for the destination's coalescing delay, to fill it.
        """
        letters = self._to_replay()
        if letters:
            await self._unless_it_waits(self._replay(letters))
            return True
        batch = Batch()
        limit = self._endpoint.max_batch_size
        self._batches.extend(batch, limit)
        if not batch.positions:
            return False
        if patient and batch.events:
            await self._coalesce(batch, limit)
        await self._unless_it_waits(self._deliver(batch))
        return True

    async def send(self, events: Sequence[bytes], *, expiring: bool = False) -> list[DeadLetter]:
        """Have the events taken, all but those that never will be: they are returned as dead letters.

        A batch is not atomic: what comes before a bad event is taken although the answer is an error.
        Sending it again does no harm, since the metering API knows the ids. With `expiring`, events that
        have become too old are dead letters too.
        """
        dead: list[DeadLetter] = []
        while True:
            if expiring:
                events, expired = self._split_expired(events)
                dead += expired
            if not events:
                return dead
            try:
                if await self._endpoint.attempt(events):
                    return dead
            except RejectedError as rejection:
                single = _one_by_one(events)
                if len(single) == 1:
                    self._log.error("dead_letter", status=rejection.status, answer=str(rejection)[:300])
                    return [*dead, DeadLetter(single[0], rejection.status, str(rejection))]
                middle = len(single) // 2
                dead += await self.send(single[:middle], expiring=expiring)
                events = single[middle:]

    async def _deliver(self, batch: Batch) -> None:
        dead = await self.send(batch.events, expiring=True)
        delivery = Delivery(batch.positions, delivered=batch.lines(), dead_letters=dead)
        for letter in dead:
            key = ledger_key(orjson.loads(letter.event))
            delivery.delivered[key] -= 1
            delivery.dead_lettered[key] += 1
        await self._enter(lambda: self._books.deliver(self._queue, delivery))

    async def _coalesce(self, batch: Batch, limit: int) -> None:
        deadline = time.monotonic() + self._endpoint.max_coalescing_delay
        while batch.event_count < limit and batch.size < batches_module.MAX_BATCH_BYTES:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(POLL, left))
            self._batches.extend(batch, limit)

    def _split_expired(self, events: Sequence[bytes]) -> tuple[Sequence[bytes], list[DeadLetter]]:
        """Part the events from those that are too old to be sent, where there is an age limit."""
        if self._max_age is None or not events:
            return events, []
        oldest = (datetime.now(UTC) - self._max_age).strftime("%Y-%m-%dT%H:%M:%S")
        parsed = _parsed(events)
        if all(str(event.get("time")) >= oldest for event in parsed):
            return events, []
        answer = f"not delivered within {self._max_age}, the configured age limit"
        young = [orjson.dumps(event) for event in parsed if str(event.get("time")) >= oldest]
        old = [orjson.dumps(event) for event in parsed if str(event.get("time")) < oldest]
        return young, [DeadLetter(event, None, answer) for event in old]

    def _to_replay(self) -> list[tuple[int, bytes]]:
        """Return dead letters that somebody wants sent again, as many as go into a batch."""
        try:
            return self._books.to_replay(
                self._queue, self._endpoint.max_batch_size, batches_module.MAX_BATCH_BYTES
            )
        except sqlite3.Error as error:
            if is_damage(error):
                raise
            return []

    async def _replay(self, letters: list[tuple[int, bytes]]) -> None:
        # As `send` gives back what is refused: parsed and encoded again.
        events = {number: orjson.dumps(orjson.loads(event)) for number, event in letters}
        dead = {letter.event: letter for letter in await self.send(list(events.values()))}
        refused = {number: dead[event] for number, event in events.items() if event in dead}
        taken = {n: ledger_key(orjson.loads(event)) for n, event in events.items() if n not in refused}
        await self._enter(lambda: self._books.replayed(self._queue, taken, refused))

    async def _enter(self, entry: Callable[[], None]) -> None:
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

    async def _unless_it_waits(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work; when that is cancelled in the middle of a POST, wait for its answer and its entry.

        What is taken but not entered would be sent again by the next delivery.
        """
        task = asyncio.create_task(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._endpoint.stopping = True
            if not self._endpoint.waiting:
                await asyncio.wait({task}, timeout=_GRACE)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise


def _parsed(events: Sequence[bytes]) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = orjson.loads(b"[" + b",".join(events) + b"]")
    return parsed


def _one_by_one(events: Sequence[bytes]) -> list[bytes]:
    """Return the events one by one; a request's events come joined out of the spool."""
    return [orjson.dumps(event) for event in _parsed(events)]
