"""The pipeline of one queue: posts a batch while it reads the next and commits the previous ones.

A batch is a number of consecutive events of the queue, at most up to where they are in the books.

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
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Final

import orjson

from openmeter_plugin.books.database import is_damage
from openmeter_plugin.books.ledger_lines import add_lines, add_usage, ledger_key, summary_of
from openmeter_plugin.books.store import Books, DeadLetter, Delivery, Lines
from openmeter_plugin.delivery.endpoint import Endpoint
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.reader import Chunk, QueueReader, SegmentReader

MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
"""Per POST: far below the limits of gateways in front of a metering API."""

_MAX_SEGMENT_BYTES: Final = 4 * 1024 * 1024  # per batch, so that a long run of skips is split


@dataclass(slots=True)
class Batch:
    """Events to send, joined by commas within each record, and the segment positions after them."""

    events: list[bytes] = field(default_factory=list)
    event_count: int = 0
    size: int = 0
    segment_bytes: int = 0
    """Bytes of segments that the batch covers."""
    positions: dict[str, int] = field(default_factory=dict)
    _by_usage_key: Counter[bytes] = field(default_factory=Counter)
    _other: Lines = field(default_factory=Counter)

    def add(self, chunk: Chunk, first: int, last: int, max_events: int) -> int:
        """Add the events of a chunk's rows as far as there is room; the first row of a batch always fits.

        Returns the row after the last that was added.
        """
        last = first + self._fitting(chunk, first, last, max_events)
        events, usage_keys = chunk.events[first:last], chunk.usage_keys[first:last]
        self.events += events
        self.event_count += sum(chunk.counts[first:last])
        self.size += sum(map(len, events)) + len(events)
        self._by_usage_key.update(usage_keys)
        if b"" in usage_keys:
            self._by_usage_key.pop(b"")
            for row in range(first, last):
                if not chunk.usage_keys[row] and (summary := summary_of(chunk.record(row))) is not None:
                    add_lines(self._other, summary)
        return last

    def full(self, max_events: int) -> bool:
        """Return whether the batch has no more room."""
        return self.event_count >= max_events or self.size >= MAX_BATCH_BYTES

    def lines(self) -> Lines:
        """Return the number of its events on each line of the ledger."""
        lines = self._other.copy()
        add_usage(lines, self._by_usage_key)
        return lines

    def _fitting(self, chunk: Chunk, first: int, last: int, max_events: int) -> int:
        """Return how many of the rows fit."""
        counts = chunk.counts[first:last]
        if sum(counts) > max_events - self.event_count:
            del counts[bisect_right(list(accumulate(counts)), max_events - self.event_count) :]
        sizes = [len(events) + 1 for events in chunk.events[first : first + len(counts)]]
        if sum(sizes) > MAX_BATCH_BYTES - self.size:
            del sizes[bisect_right(list(accumulate(sizes)), MAX_BATCH_BYTES - self.size) :]
        return len(sizes) if sizes or self.events else min(1, last - first)


class BatchReader:
    """Takes the batches of one queue from its reader."""

    def __init__(self, reader: QueueReader) -> None:
        self._reader = reader
        self.paused = False
        """Whether nothing may be taken for now."""
        self.taken = 0
        """Bytes of segments taken so far."""

    def extend(self, batch: Batch, max_events: int) -> bool:
        """Add available events to the batch while there is room; returns whether that is all there is."""
        if self.paused:
            return True
        for segment in self._reader.segments:
            before = segment.delivered
            room = self._add(batch, segment, max_events)
            if segment.delivered > before:
                self.taken += segment.delivered - before
                batch.positions[segment.name] = segment.delivered
            if not room:
                return False
        return True

    def delivered(self, unsettled: Collection[str] = ()) -> list[str]:
        """Return the segments that are entirely delivered and will not grow, and stop reading them.

        Segments in `unsettled` are left out: they have read records that are not yet delivered in the books.
        """
        names = [
            segment.name
            for segment in self._reader.segments
            if segment.finished and segment.name not in unsettled and segment.delivered >= segment.accounted
        ]
        for name in names:
            self._reader.done(name)
        return names

    def _add(self, batch: Batch, segment: SegmentReader, max_events: int) -> bool:
        """Add a segment's events up to where it is accounted for; returns whether there is room for more."""
        while segment.delivered < segment.accounted:
            chunk = self._reader.next_undelivered(segment)
            if chunk is None:
                return True
            if batch.segment_bytes >= _MAX_SEGMENT_BYTES:
                return False
            before = segment.delivered
            room = self._add_chunk(batch, segment, chunk, max_events)
            batch.segment_bytes += segment.delivered - before
            if not room:
                return False
        return True

    def _add_chunk(self, batch: Batch, segment: SegmentReader, chunk: Chunk, max_events: int) -> bool:
        """Take a chunk's events as far as the batch has room; returns whether there is room for more."""
        last, unsent = len(chunk.ends), segment.unsent
        gaps = [row for row in range(segment.row, last) if chunk.ends[row] in unsent] if unsent else []
        row = segment.row
        for stop in [*gaps, last]:
            row = batch.add(chunk, row, stop, max_events)
            if row < stop:
                if row > segment.row:
                    segment.take_rows(row)
                return False
            row = stop + 1
        segment.take()
        return True


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
