"""Redelivery: sends retained events of a span of event time again; the metering API ignores ids it knows.

Each queue proceeds independently, so that a dead endpoint holds up no other queue. Progress is committed
per segment; after a restart, redelivery resumes after the last finished segment.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from openmeter_plugin.books.database import is_damage
from openmeter_plugin.books.store import Books, Progress, Redelivery
from openmeter_plugin.delivery.pipeline import MAX_BATCH_BYTES
from openmeter_plugin.delivery.queue_delivery import QueueDelivery
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.reader import read_segment, segment_names
from openmeter_plugin.spool.segment import EVENTS, Record

_POLL: Final = 0.2  # seconds between two checks for requested redeliveries
_HOUR: Final = len("2026-11-22T07")
_NO_PROGRESS: Final = Progress("", done=False)


class Redeliverer:
    """Runs the requested redeliveries in all queues of a spool."""

    def __init__(self, books: Books, queues: Mapping[str, QueueDelivery]) -> None:
        self._books = books
        self._queues = queues
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = get_logger()
        self._failure_limit = RateLimit()

    def wants(self, queue: str) -> bool:
        """Return whether a redelivery still needs the queue's retained segments; raises sqlite3.Error."""
        return any(_wants(redelivery, queue) for redelivery in self._books.redeliveries())

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                self._start_tasks()
                await asyncio.sleep(_POLL)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def run_until_done(self) -> None:
        """Finish all redeliveries requested so far."""
        while self._start_tasks():
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start_tasks(self) -> bool:
        """Start a task for each queue with a redelivery to do; returns whether any redelivery is pending."""
        try:
            pending = self._books.redeliveries()
            for redelivery in pending:
                queues = [name for name in self._queues if _wants(redelivery, name)]
                for name in queues:
                    self._start_task(name)
                if not queues:
                    self._books.redelivery_done(redelivery.id)
                    self._log.info("redelivery_done", redelivery=redelivery.id)
        except sqlite3.Error as error:
            self._failed(error)
            return True
        return bool(pending)

    def _start_task(self, name: str) -> None:
        task = self._tasks.get(name)
        if task is None or task.done():
            if task is not None and (error := task.exception()) is not None:
                raise error
            self._tasks[name] = asyncio.create_task(self._work(self._queues[name]))

    async def _work(self, queue: QueueDelivery) -> None:
        try:
            for redelivery in self._books.redeliveries():
                if _wants(redelivery, queue.queue):
                    await self._redeliver(redelivery, queue)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            await asyncio.sleep(_POLL)

    async def _redeliver(self, redelivery: Redelivery, queue: QueueDelivery) -> None:
        log = self._log.bind(redelivery=redelivery.id, queue=queue.queue)
        log.info(
            "redelivery_started",
            since=redelivery.since,
            until=redelivery.until,
            subject=redelivery.subject,
        )
        done_up_to = redelivery.progress.get(queue.queue, _NO_PROGRESS).done_up_to
        positions = self._books.positions(queue.queue)
        total = 0
        for name in sorted(segment_names(queue.directory)):
            if name <= done_up_to or name not in positions:
                continue
            sent = 0
            path, unsent = queue.directory / name, queue.reader.unsent(name)
            delivered = positions[name].delivered
            events = selected_events(path, redelivery, delivered, unsent)
            for batch in in_batches(events, queue.endpoint.max_batch_size):
                # What is refused now was refused before, and is already a dead letter.
                sent += len(batch) - len(await queue.endpoint.send(batch))
            self._books.redelivered(redelivery.id, queue.queue, sent, name, done=False)
            done_up_to, total = name, total + sent
        self._books.redelivered(redelivery.id, queue.queue, 0, done_up_to, done=True)
        log.info("redelivery_queue_done", events=total)

    def _failed(self, error: Exception) -> None:
        if is_damage(error):
            raise error
        if self._failure_limit.passes():
            self._log.error("redelivery_failed", reason=f"{type(error).__name__}: {error}")


def _wants(redelivery: Redelivery, queue: str) -> bool:
    return queue != QUARANTINE and not redelivery.progress.get(queue, _NO_PROGRESS).done


def selected_events(
    path: Path, redelivery: Redelivery, delivered: int, unsent: Collection[int] = ()
) -> Iterator[bytes]:
    """Yield a segment's events that belong to a redelivery, up to the `delivered` offset.

    Later events are in the backlog anyway. `unsent` are the offsets after records that are never sent.
    """
    for item in read_segment(path, end=delivered):
        if isinstance(item, Record) and item.kind == EVENTS and item.end not in unsent:
            summary = item.summary
            if summary is None or redelivery.since[:_HOUR] <= summary.hour <= redelivery.until[:_HOUR]:
                for event in orjson.loads(b"[" + item.events + b"]"):
                    if _is_selected(event, redelivery):
                        yield orjson.dumps(event)


def in_batches(events: Iterable[bytes], max_events: int) -> Iterator[list[bytes]]:
    """Yield the events in batches of at most `max_events` and MAX_BATCH_BYTES."""
    batch: list[bytes] = []
    size = 0
    for event in events:
        if batch and (len(batch) >= max_events or size + len(event) > MAX_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += len(event)
    if batch:
        yield batch


def _is_selected(event: dict[str, Any], redelivery: Redelivery) -> bool:
    # Both are RFC 3339 in UTC with milliseconds, so they compare as text.
    in_span = redelivery.since <= str(event.get("time", "")) < redelivery.until
    return in_span and (redelivery.subject is None or event.get("subject") == redelivery.subject)
