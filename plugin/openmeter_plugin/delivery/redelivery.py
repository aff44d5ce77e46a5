"""Sending retained events again, for a span of event time: the metering API counts what it knows once.

Each queue goes on by itself, so that a dead endpoint holds up no other's. Progress is entered segment by
segment; after a restart it goes on behind the last that was done.
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
from openmeter_plugin.delivery.batch import MAX_BATCH_BYTES
from openmeter_plugin.delivery.queue_delivery import QueueDelivery
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.segment import EVENTS, MAGIC, Record, scan

_POLL: Final = 0.2  # seconds between two looks for what was asked for
_HOUR: Final = len("2026-11-22T07")
_NO_PROGRESS: Final = Progress("", done=False)


class Redeliverer:
    """Sends again what was asked for, in all queues of a spool."""

    def __init__(self, books: Books, queues: Mapping[str, QueueDelivery]) -> None:
        self._books = books
        self._queues = queues
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = get_logger()
        self._failure_limit = RateLimit()

    def wants(self, queue: str) -> bool:
        """Tell whether something retained in the queue is still to be sent again; raises sqlite3.Error."""
        return any(_wants(wanted, queue) for wanted in self._books.redeliveries())

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
        """Do what was asked for by now."""
        while self._start_tasks():
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start_tasks(self) -> bool:
        """Have each queue do what it has to; returns whether there is anything."""
        try:
            pending = self._books.redeliveries()
            for wanted in pending:
                queues = [name for name in self._queues if _wants(wanted, name)]
                for name in queues:
                    self._start_task(name)
                if not queues:
                    self._books.redelivery_done(wanted.id)
                    self._log.info("redelivery_done", redelivery=wanted.id)
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
            for wanted in self._books.redeliveries():
                if _wants(wanted, queue.queue):
                    await self._redeliver(wanted, queue)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            await asyncio.sleep(_POLL)

    async def _redeliver(self, wanted: Redelivery, queue: QueueDelivery) -> None:
        name = queue.queue
        log = self._log.bind(redelivery=wanted.id, queue=name)
        log.info("redelivery_started", since=wanted.since, until=wanted.until, subject=wanted.subject)
        done_up_to = wanted.progress.get(name, _NO_PROGRESS).done_up_to
        positions = self._books.positions(name)
        total = 0
        for path in sorted(queue.segment_paths()):
            if path.name <= done_up_to or path.name not in positions:
                continue
            sent = 0
            events = wanted_events(path, wanted, positions[path.name].delivered, queue.unsent(path.name))
            for batch in in_batches(events, queue.endpoint.max_batch_size):
                # What is refused now was refused before: it is among the dead letters.
                sent += len(batch) - len(await queue.sender.send(batch))
            self._books.redelivered(wanted.id, name, sent, path.name, done=False)
            done_up_to, total = path.name, total + sent
        self._books.redelivered(wanted.id, name, 0, done_up_to, done=True)
        log.info("redelivery_of_queue_done", events=total)

    def _failed(self, error: Exception) -> None:
        if is_damage(error):
            raise error
        if self._failure_limit.passes():
            self._log.error("redelivery_fails", reason=f"{type(error).__name__}: {error}")


def _wants(wanted: Redelivery, queue: str) -> bool:
    return queue != QUARANTINE and not wanted.progress.get(queue, _NO_PROGRESS).done


def wanted_events(
    path: Path, wanted: Redelivery, delivered: int, unsent: Collection[int] = ()
) -> Iterator[bytes]:
    """Yield a segment's wanted events up to the offset to which it is delivered.

    What lies behind that is on its way anyway. `unsent` are the offsets behind records that are never sent.
    """
    try:
        data = path.read_bytes()[:delivered]
    except FileNotFoundError:
        return
    for item in scan(data[len(MAGIC) :], len(MAGIC), final=True):
        if isinstance(item, Record) and item.kind == EVENTS and item.end not in unsent:
            summary = item.summary
            if summary is None or wanted.since[:_HOUR] <= summary.hour <= wanted.until[:_HOUR]:
                for event in orjson.loads(b"[" + item.events + b"]"):
                    if _is_wanted(event, wanted):
                        yield orjson.dumps(event)


def in_batches(events: Iterable[bytes], most: int) -> Iterator[list[bytes]]:
    """Yield the events in batches of so many, none larger than a POST may be."""
    batch: list[bytes] = []
    size = 0
    for event in events:
        if batch and (len(batch) >= most or size + len(event) > MAX_BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(event)
        size += len(event)
    if batch:
        yield batch


def _is_wanted(event: dict[str, Any], wanted: Redelivery) -> bool:
    # Both are RFC 3339 in UTC with milliseconds, so they compare as text.
    in_time = wanted.since <= str(event.get("time", "")) < wanted.until
    return in_time and (wanted.subject is None or event.get("subject") == wanted.subject)
