"""Delivery of one queue, from its segments to its endpoint: accounting, sending, retention, removal."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Final

from openmeter_plugin.books.accountant import MAX_RECORDS, Accountant, copy_damage
from openmeter_plugin.books.database import is_damage
from openmeter_plugin.books.ledger_lines import Span, waiting_lines
from openmeter_plugin.books.store import Books, Losses
from openmeter_plugin.delivery.clock import SteadyClock
from openmeter_plugin.delivery.endpoint import Endpoint
from openmeter_plugin.delivery.pipeline import POLL, BatchReader, Idle, Pipeline
from openmeter_plugin.delivery.retention import Delivered, delivered_now
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory
from openmeter_plugin.spool.queue import sync_directory
from openmeter_plugin.spool.reader import UNREADABLE, QueueReader, segment_names
from openmeter_plugin.spool.segment import SUFFIX

_DELIVERY_SHARE: Final = 3  # times as long for delivery as for accounting while both have a backlog


class QueueDelivery:
    """Owns one queue. Accounting and sending run concurrently, so that an outage shows up in the books."""

    def __init__(
        self, spool: Path, queue: str, books: Books, endpoint: Endpoint, clock: SteadyClock | None = None
    ) -> None:
        self.queue = queue
        self._clock = clock or SteadyClock()
        self.directory = queues_directory(spool) / queue
        self._spool = spool
        self._books = books
        self._gone: set[str] = set()  # segments without a file, with waiting events in the books
        self._unreadable: set[str] = set()  # segments that were set aside, the same
        self._taken = 0  # by delivery, when accounting last looked
        self._returned: set[str] = set()  # segments that were set aside, but can be read again
        self.reader = self._open_reader()
        self._accountant = Accountant(spool, queue, books, self.reader)
        self._batches = BatchReader(self.reader)
        self._batches.paused = bool(self._returned)
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
        """Deliver the backlog; counts more records only once the counted ones are taken.

        So what the reader holds for delivery need not be read again.
        """
        records: int | None = 1
        while True:
            if self.pipeline.has_room:
                records = self._account()
            busy = self._is_sent() and await self.pipeline.work(coalesce=False)
            self._note_delivered()
            if not records and not busy:
                if records is not None and not self._trouble() and not await self._count_losses():
                    return
                await asyncio.sleep(POLL)

    async def close(self) -> None:
        """Close files and connections."""
        await self.pipeline.close()
        self.reader.close()
        await self.endpoint.close()

    @property
    def empty(self) -> bool:
        """Whether nothing is in the queue, neither undelivered nor retained."""
        return not (self.reader.segments or self.delivered or self.pipeline.unsettled or self._gone)

    async def remove(self, segments: list[str]) -> None:
        """Remove the files of delivered segments and forget them; raises OSError, sqlite3.Error."""
        await asyncio.to_thread(_remove_files, self.directory, segments)
        for segment in segments:
            self._books.forget(self.queue, segment)
            self.reader.forget(segment)
            self.delivered.pop(segment, None)

    def _is_sent(self) -> bool:
        return self.queue != QUARANTINE

    async def _accounting_loop(self) -> None:
        while True:
            started = time.monotonic()
            records = self._account()
            self._rename_unreadable()
            if await self._count_losses() or records:
                self._idle.used()
            if records and records >= MAX_RECORDS:
                # Share the loop with delivery: a backlog of 5 GB was delivered at 3,700 events/s until all of
                # it was in the books. While nothing is taken, accounting may go on at once.
                took, taking = time.monotonic() - started, self._batches.taken != self._taken
                self._taken = self._batches.taken
                await asyncio.sleep(_DELIVERY_SHARE * took if taking else 0)
            else:
                # Poll, so that a commit covers many records: each commit has a fixed cost.
                await asyncio.sleep(self._idle.pause)

    async def _count_losses(self) -> bool:
        """Count events whose bytes are damaged or gone as lost; returns whether there was anything to do.

        Nothing is taken for delivery until they are counted, so that no event is both delivered and lost.
        """
        suspects = self.reader.suspects
        if not (suspects or self._gone or self._unreadable or self._returned):
            return False
        reason = "damaged" if suspects else "missing" if self._gone else "unreadable"
        damage = [(segment.name, item) for segment in suspects for item in segment.suspect]
        losses = Losses(
            reason,
            damage=damage,
            gone=[*self._gone],
            unreadable=[*self._unreadable],
            returned=[*self._returned],
        )
        self._batches.paused = True
        try:
            losses.lines = self._books.open_lines(self.queue)
            losses.lines.subtract(self.pipeline.unsettled_lines)
            losses.lines.subtract(await asyncio.to_thread(waiting_lines, self._waiting_spans()))
            if not losses.returned:
                losses.lines = +losses.lines
            for name, item in damage:
                copy_damage(self._spool, self.queue, name, item)
            self._books.lose(self.queue, losses)
        except (OSError, sqlite3.Error) as error:
            if is_damage(error):
                raise
            if self._failure_limit.passes():
                self._log.error("losses_not_counted", reason=f"{type(error).__name__}: {error}")
            return True
        finally:
            self._batches.paused = bool(self._returned)
        for segment in suspects:
            segment.accept_damage()
        self._gone.difference_update(losses.gone)
        self._unreadable.difference_update(losses.unreadable)
        self._returned.difference_update(losses.returned)
        self._batches.paused = bool(self._returned)
        self._report_losses(losses)
        return True

    def _waiting_spans(self) -> list[Span]:
        """Return what the segments should hold of the backlog; it is read from the disk again."""
        spans = []
        for segment in self.reader.segments:
            segment.drop_window()
            if segment.delivered < segment.accounted:
                spans.append(Span(segment.source, segment.delivered, segment.accounted, segment.unsent))
        return spans

    def _report_losses(self, losses: Losses) -> None:
        if losses.returned:
            self._log.info("segments_returned", segments=sorted(losses.returned))
        lost = sum((+losses.lines).values())
        if not lost:
            return
        self._log.critical(
            "events_lost",
            events=lost,
            reason=losses.reason,
            segments=sorted({name for name, _ in losses.damage} | {*losses.gone, *losses.unreadable}),
            damaged_bytes=sum(item.end - item.start for _, item in losses.damage),
            consequence="these events were accepted, but can no longer be delivered",
            remedy="check the disk; copies of damaged bytes are in the spool's folder `damaged`",
        )

    def _account(self) -> int | None:
        """Count new records in the books; returns how many, or None if that is not possible now."""
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
            if busy:
                self._idle.used()
            else:
                await self._idle.wait()

    def _note_delivered(self) -> None:
        if self._is_sent():
            names = self._batches.delivered(self.pipeline.unsettled)
        else:  # quarantined requests wait in the books, so their segments are done once counted
            names = [segment.name for segment in self.reader.segments if segment.finished]
            for name in names:
                self.reader.done(name)
        for name in names:
            with contextlib.suppress(OSError):
                self.delivered[name] = delivered_now(self.directory / name, self._clock)

    def _trouble(self) -> bool:
        """Rename unreadable segments; returns whether some segment is still being retried."""
        self._rename_unreadable()
        return self.reader.has_failures

    def _rename_unreadable(self) -> None:
        """Rename segments that cannot be read; their files and positions are kept."""
        for name in list(self.reader.unreadable):
            path = self.directory / name
            try:
                path.rename(f"{path}{UNREADABLE}")
                self._books.count(self.queue, "unreadable_segments")
            except FileNotFoundError:
                self._log.error("segment_vanished", segment=name)
                self._gone.add(name)
            except (OSError, sqlite3.Error) as error:
                self._log.error("segment_rename_failed", segment=name, reason=str(error))
            else:
                self._log.critical(
                    "unreadable_segment_renamed",
                    segment=name,
                    remedy=f"once it can be read, remove {UNREADABLE} from its name and restart",
                )
                if self._is_sent():
                    self._unreadable.add(name)
            self.reader.done(name)

    def _open_reader(self) -> QueueReader:
        """Return the queue's reader, with its cursors where the books left them."""
        positions = self._books.positions(self.queue)
        unreadable: set[str] = set()
        with contextlib.suppress(OSError):
            unreadable = {path.stem for path in self.directory.glob(f"*{SUFFIX}{UNREADABLE}")}
        present, set_aside = set(segment_names(self.directory)), self._books.set_aside(self.queue)
        self._returned |= set_aside & present
        for segment in positions.keys() - present:
            waits = self._is_sent() and positions[segment].delivered < positions[segment].accounted
            if segment in unreadable:
                if waits and segment not in set_aside:
                    self._unreadable.add(segment)
            elif waits:
                self._gone.add(segment)
            else:
                self._books.forget(self.queue, segment)
        unsent, damage = self._books.resent(self.queue), self._books.damage(self.queue)
        if not self._is_sent():
            return QueueReader(self.directory, positions, unsent=unsent, damage=damage, window=0)
        return QueueReader(self.directory, positions, unsent=unsent, damage=damage)


def _remove_files(directory: Path, names: list[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)
    # A file that a power loss brings back would be counted again once the books have forgotten it.
    sync_directory(directory)
