"""Delivering one queue: batch after batch, in order, each until the metering API has taken it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from openmeter_plugin.delivery.client import (
    EventsClient,
    RejectedError,
    UnauthorizedError,
    UndeliveredError,
)
from openmeter_plugin.delivery.reader import Batch, QueueReader
from openmeter_plugin.delivery.state import DeadLetter, DeliveryState
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import Destination, queues_directory, read_destination

MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
"""Of one POST, far below what gateways before a metering API let through."""

_POLL: Final = 0.05  # seconds between two looks for new records
_STATE_RETRY: Final = 0.5  # seconds between two tries to commit on a disk that failed


class QueueSender:
    """Owns one queue of the spool; with `until_empty`, until all that was there is sent."""

    def __init__(self, spool: Path, queue: str, state: DeliveryState, *, until_empty: bool = False) -> None:
        self._spool = spool
        self._queue = queue
        self._state = state
        self._until_empty = until_empty
        directory = queues_directory(spool) / queue
        cursors = state.cursors(queue)
        for segment in [name for name in cursors if not (directory / name).exists()]:
            state.forget(queue, segment)
            del cursors[segment]
        self._reader = QueueReader(directory, cursors)
        self._client: EventsClient | None = None
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()

    async def run(self) -> None:
        """Deliver until cancelled."""
        try:
            while True:
                batch = await self._next_batch()
                if batch is None:
                    return
                dead_letters = await self._deliver(batch.events)
                await self._commit(batch, dead_letters)
        finally:
            self._reader.close()
            if self._client is not None:
                await self._client.close()

    async def _next_batch(self) -> Batch | None:
        """Wait for something to deliver and a moment for more of it; None when drained and that is wanted."""
        destination = self._destination()
        limit = destination.max_batch_size if destination else 1
        while not (batch := self._reader.next_batch(limit, MAX_BATCH_BYTES)).positions:
            self._remove_finished()
            if self._until_empty:
                return None
            await asyncio.sleep(_POLL)
        if destination is not None and not self._until_empty:
            await self._coalesce(batch, destination)
        return batch

    async def _coalesce(self, batch: Batch, destination: Destination) -> None:
        deadline = time.monotonic() + destination.max_coalescing_delay
        while batch.event_count < destination.max_batch_size and batch.size < MAX_BATCH_BYTES:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(_POLL, left))
            before = batch.counts["requests", ""]
            self._reader.extend(batch, destination.max_batch_size, MAX_BATCH_BYTES)
            if batch.counts["requests", ""] == before and not batch.events:
                return  # nothing but skips, and no more of them: no event is kept waiting

    async def _deliver(self, events: Sequence[bytes]) -> list[DeadLetter]:
        """Have the events taken, all but those that never will be: they are returned as dead letters.

        A batch is not atomic: what comes before a bad event is taken although the answer is an error.
        Sending it again does no harm, since the metering API knows the ids.
        """
        if not events:
            return []
        try:
            await self._send(events)
        except RejectedError as rejection:
            single = _split(events)
            if len(single) == 1:
                self._log.error("dead_letter", status=rejection.status, answer=str(rejection)[:300])
                return [DeadLetter(single[0], rejection.status, str(rejection))]
            middle = len(single) // 2
            return await self._deliver(single[:middle]) + await self._deliver(single[middle:])
        return []

    async def _send(self, events: Sequence[bytes]) -> None:
        """Send until there is an answer to go by; raises RejectedError."""
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(UndeliveredError),
            wait=self._wait,
            after=self._tell,
            sleep=asyncio.sleep,
        )
        async for attempt in attempts:
            with attempt:
                await self._current_client(events)

    async def _current_client(self, events: Sequence[bytes]) -> None:
        destination = self._destination()
        if destination is None:
            raise UndeliveredError("nobody has said where this queue goes: destination.json is missing")
        if self._client is None or self._client.destination != destination:
            if self._client is not None:
                await self._client.close()
                self._client = None
            try:
                self._client = EventsClient(destination)
            except (ValueError, OSError) as error:  # the token, the certificates
                raise UndeliveredError(f"{type(error).__name__}: {error}") from None
        await self._client.send(events)

    def _destination(self) -> Destination | None:
        """Return the destination as it is described now: a new token must reach a waiting backlog."""
        try:
            return read_destination(self._spool, self._queue)
        except (OSError, ValueError, TypeError) as error:
            if self._failure_limit.passes():
                self._log.error("destination_unreadable", reason=f"{type(error).__name__}: {error}")
            return self._client.destination if self._client else None

    def _wait(self, state: RetryCallState) -> float:
        destination = self._destination()
        initial = destination.initial_retry_delay if destination else 1.0
        longest = destination.max_retry_delay if destination else 60.0
        backoff = wait_exponential_jitter(initial=initial, max=longest, jitter=initial)(state)
        error = state.outcome.exception() if state.outcome else None
        return max(backoff, error.retry_after) if isinstance(error, UndeliveredError) else backoff

    def _tell(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if not isinstance(error, UndeliveredError) or not self._failure_limit.passes():
            return
        facts: dict[str, Any] = {
            "reason": str(error)[:300],
            "attempts": state.attempt_number,
            "consequence": "the events wait in the spool",
        }
        if isinstance(error, UnauthorizedError):
            self._log.critical("token_refused", **facts, remedy="give the plugin a token that may ingest")
        else:
            self._log.error("delivery_fails", **facts)

    async def _commit(self, batch: Batch, dead_letters: list[DeadLetter]) -> None:
        dead = len(dead_letters)
        if dead:
            batch.counts["dead_lettered", ""] += dead
        if batch.event_count:
            batch.counts["delivered", ""] += batch.event_count - dead
        while True:
            try:
                self._state.commit(self._queue, batch.positions, batch.counts, dead_letters)
                break
            except sqlite3.Error as error:
                # The batch is not sent again: only what is known of it waits for the disk.
                if self._failure_limit.passes():
                    self._log.error("delivery_state_cannot_be_written", reason=str(error))
                await asyncio.sleep(_STATE_RETRY)
        self._remove_finished()

    def _remove_finished(self) -> None:
        """Remove the segments that are done with; to be called when all that was read is committed."""
        try:
            for segment in self._reader.remove_finished():
                self._state.forget(self._queue, segment)
        except (sqlite3.Error, OSError) as error:
            if self._failure_limit.passes():
                self._log.error("delivered_segment_stays", reason=str(error))


def _split(events: Sequence[bytes]) -> list[bytes]:
    """Return the events one by one; a request's events come joined out of the spool."""
    return [orjson.dumps(event) for event in orjson.loads(b"[" + b",".join(events) + b"]")]
