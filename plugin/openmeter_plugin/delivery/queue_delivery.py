"""Delivery of one queue, from its segments to its endpoint: accounting, sending, retention, removal."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Collection
from pathlib import Path

from openmeter_plugin.books.accountant import MAX_RECORDS, Accountant
from openmeter_plugin.books.database import is_damage
from openmeter_plugin.books.store import Books
from openmeter_plugin.delivery.batch import BatchReader
from openmeter_plugin.delivery.endpoint import Endpoint
from openmeter_plugin.delivery.pipeline import POLL, Idle, Pipeline
from openmeter_plugin.delivery.retention import Delivered, delivered_now
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory
from openmeter_plugin.spool.reader import UNREADABLE, QueueReader, segment_paths


class QueueDelivery:
    """Owns one queue. Accounting and sending run concurrently, so that an outage shows up in the books."""

    def __init__(self, spool: Path, queue: str, books: Books, endpoint: Endpoint) -> None:
        self.queue = queue
        self._directory = queues_directory(spool) / queue
        self._books = books
        self._accountant = Accountant(spool, queue, books)
        delivered = {name: position.delivered for name, position in books.positions(queue).items()}
        self._batches = BatchReader(self._accountant, QueueReader(self._directory, delivered))
        self.endpoint = endpoint
        self.pipeline = Pipeline(queue, books, self._batches, endpoint)
        self._idle = Idle()
        self.delivered: dict[str, Delivered] = {}
        """The segments that are entirely delivered, and retained."""
        self._log = get_logger().bind(queue=queue)
        self._failure_limit = RateLimit()

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._accounting_loop())
                group.create_task(self._delivery_loop())
        finally:
            await self.close()

    async def run_until_empty(self) -> None:
        """Deliver the backlog; counts more records only once the counted ones are read.

        So the chunks that accounting has read are reused for sending.
        """
        records: int | None = 1
        while True:
            if self.pipeline.has_room:
                records = self._account()
            busy = self._is_sent() and await self.pipeline.work(coalesce=False)
            self._note_delivered()
            if not records and not busy:
                if records is not None and not self._trouble():
                    return
                await asyncio.sleep(POLL)

    async def close(self) -> None:
        """Close files and connections."""
        await self.pipeline.close()
        self._accountant.close()
        self._batches.close()
        await self.endpoint.close()

    def forget(self, segment: str) -> None:
        """Forget a delivered segment and remove its file; raises OSError, sqlite3.Error."""
        (self._directory / segment).unlink(missing_ok=True)
        self._books.forget(self.queue, segment)
        self._accountant.forget(segment)
        self._batches.forget(segment)
        self.delivered.pop(segment, None)

    def segment_paths(self) -> list[Path]:
        """Return the files of the queue's segments."""
        return list(segment_paths(self._directory))

    def unsent(self, segment: str) -> Collection[int]:
        """Return the offsets after the segment's records that are never sent."""
        return self._accountant.resent.get(segment, ())

    def _is_sent(self) -> bool:
        return self.queue != QUARANTINE

    async def _accounting_loop(self) -> None:
        while True:
            records = self._account()
            self._rename_unreadable()
            if records:
                self._idle.used()
            # Poll, so that a commit covers many records: each commit has a fixed cost.
            await asyncio.sleep(0 if records and records >= MAX_RECORDS else self._idle.pause)

    def _account(self) -> int | None:
        """Count new records in the books; returns how many, or None if the books cannot be written."""
        try:
            return self._accountant.work()
        except sqlite3.Error as error:
            if is_damage(error):
                raise
            if self._failure_limit.passes():
                self._log.error("books_write_failed", reason=f"{type(error).__name__}: {error}")
            return None

    async def _delivery_loop(self) -> None:
        while True:
            busy = self._is_sent() and await self.pipeline.work(coalesce=True)
            self._note_delivered()
            if not busy:
                await self._idle.wait()

    def _note_delivered(self) -> None:
        # Quarantined requests wait in the books, so their segments are done once counted.
        finished = self._accountant.finished
        for name in self._batches.delivered(self.pipeline.unsettled) if self._is_sent() else finished:
            if name not in self.delivered:
                with contextlib.suppress(FileNotFoundError):
                    self.delivered[name] = delivered_now(self._directory / name)

    def _trouble(self) -> bool:
        """Rename unreadable segments; returns whether some segment is still being retried."""
        self._rename_unreadable()
        return self._accountant.reader.has_failures or self._batches.reader.has_failures

    def _rename_unreadable(self) -> None:
        """Rename segments that cannot be read; their files and positions are kept."""
        readers = (self._accountant.reader, self._batches.reader)
        for name in readers[0].unreadable | readers[1].unreadable:
            path = self._directory / name
            try:
                path.rename(f"{path}{UNREADABLE}")
                self._books.count(self.queue, "unreadable_segments")
            except FileNotFoundError:
                self._log.error("segment_vanished", segment=name)
            except (OSError, sqlite3.Error) as error:
                self._log.error("segment_rename_failed", segment=name, reason=str(error))
            else:
                self._log.critical(
                    "unreadable_segment_renamed",
                    segment=name,
                    remedy=f"once it can be read, remove {UNREADABLE} from its name and restart",
                )
            for reader in readers:
                reader.done(name)
