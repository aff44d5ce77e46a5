"""Delivery of all queues of a spool, each independently, with retention, redelivery and ledger pruning."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import Final

from openmeter_plugin.books.database import is_damage
from openmeter_plugin.books.pruning import Clock
from openmeter_plugin.books.store import Books
from openmeter_plugin.delivery.endpoint import Breakers, Endpoint
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.queue_delivery import QueueDelivery
from openmeter_plugin.delivery.redelivery import Redeliverer
from openmeter_plugin.delivery.retention import expired, remove_leftovers, shortage
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import queues_directory

_POLL: Final = 0.2  # seconds between two checks for new queues
_RETENTION_INTERVAL: Final = 1.0  # seconds between two checks for expired segments
_LEFTOVER_INTERVAL: Final = 3600.0  # seconds between two checks for temporary files of killed processes
_PRUNE_STEP_INTERVAL: Final = 10.0  # seconds between two steps while there are ledger lines to prune
_PRUNE_INTERVAL: Final = 600.0  # seconds to the next step once there are none


class SpoolDelivery:
    """Delivers all queues of a spool."""

    def __init__(self, options: DeliveryOptions, books: Books) -> None:
        self._options = options
        self._books = books
        self._breakers = Breakers()
        self.queues: dict[str, QueueDelivery] = {}
        self._redeliverer = Redeliverer(books, self.queues)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = get_logger()
        self._failure_limit = RateLimit()

    async def run(self) -> None:
        """Work until cancelled, or until the books turn out damaged: the next start replaces them."""
        loops = (self._retention_loop(), self._prune_loop(), self._redeliverer.run())
        background = [asyncio.create_task(loop) for loop in loops]
        try:
            while True:
                for name in _queue_names(self._options.spool):
                    self._start(name)
                for task in background:
                    if task.done():
                        task.result()
                await asyncio.sleep(_POLL)
        finally:
            await _cancel([*background, *self._tasks.values()])
            self._books.close()

    async def run_until_empty(self) -> None:
        """Deliver the backlog and finish the requested redeliveries, then return."""
        try:
            for name in _queue_names(self._options.spool):
                self.queues[name] = self._delivery(name)
            await asyncio.gather(*(queue.run_until_empty() for queue in self.queues.values()))
            await self._redeliverer.run_until_done()
            self._remove_expired()
        finally:
            await asyncio.gather(*(queue.close() for queue in self.queues.values()))
            self._books.close()

    def _start(self, name: str) -> None:
        """Start delivery of a queue, or restart it if it has failed."""
        task = self._tasks.get(name)
        if task is not None and not task.done():
            return
        try:
            if task is not None:
                task.result()
            self.queues[name] = self._delivery(name)
        except Exception as error:
            if _is_books_damage(error):
                raise
            if self._failure_limit.passes():
                self._log.exception("queue_delivery_failed", queue=name)
            self._tasks.pop(name, None)
            return
        self._tasks[name] = asyncio.create_task(self.queues[name].run())

    def _delivery(self, name: str) -> QueueDelivery:
        endpoint = Endpoint(self._options, name, self._breakers)
        return QueueDelivery(self._options.spool, name, self._books, endpoint)

    async def _retention_loop(self) -> None:
        leftovers_at = 0.0
        while True:
            if time.monotonic() >= leftovers_at:
                self._remove_leftovers()
                leftovers_at = time.monotonic() + _LEFTOVER_INTERVAL
            await asyncio.sleep(min(_RETENTION_INTERVAL, self._options.retention.age.total_seconds() + _POLL))
            self._remove_expired()

    def _remove_expired(self) -> None:
        """Remove expired segments, except those that a redelivery may need.

        If the disk runs short of space, those are removed too, so that new usage can be written.
        """
        try:
            missing = shortage(self._options.spool)
            owners = {
                segment: queue
                for queue in self.queues.values()
                if missing > 0 or not self._redeliverer.wants(queue.queue)
                for segment in queue.delivered.values()
            }
            for segment in expired(owners, self._options.retention, missing):
                owners[segment].forget(segment.path.name)
        except (sqlite3.Error, OSError) as error:
            if is_damage(error):
                raise
            if self._failure_limit.passes():
                self._log.error("segment_removal_failed", reason=str(error))

    async def _prune_loop(self) -> None:
        clock, total = Clock(), 0
        while True:
            pruned = 0
            try:
                pruned = self._books.prune(self._options.ledger_days, clock.now())
            except sqlite3.Error as error:
                if is_damage(error):
                    raise
                if self._failure_limit.passes():
                    self._log.error("ledger_prune_failed", reason=str(error))
            total += pruned
            if total and not pruned:
                self._log.info("ledger_pruned", lines=total, older_than_days=self._options.ledger_days)
                total = 0
            await asyncio.sleep(_PRUNE_STEP_INTERVAL if pruned else _PRUNE_INTERVAL)

    def _remove_leftovers(self) -> None:
        try:
            for path in remove_leftovers(self._options.spool):
                self._log.info("leftover_removed", file=path.name)
        except OSError as error:
            self._log.error("leftover_removal_failed", reason=str(error))


def _is_books_damage(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_is_books_damage(inner) for inner in error.exceptions)
    return is_damage(error)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _queue_names(spool: Path) -> list[str]:
    try:
        return sorted(path.name for path in queues_directory(spool).iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
