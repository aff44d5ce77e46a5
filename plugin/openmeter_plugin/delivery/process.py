"""The delivery process: one per spool, for all workers and generations of the plugin server that write there.

After `kong reload`, two generations use the same spool. The spool's lock decides which one delivers. The
other waits for it, so that no two processes ever send the same file. All queues of the spool are delivered
independently, with retention, redelivery and pruning of the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Final

from openmeter_plugin.books.database import FILE, is_damage
from openmeter_plugin.books.store import Books, BooksTakenError
from openmeter_plugin.delivery.clock import SteadyClock
from openmeter_plugin.delivery.endpoint import Breakers, Endpoint
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.queue_delivery import QueueDelivery
from openmeter_plugin.delivery.redelivery import Redeliverer
from openmeter_plugin.delivery.retention import expired, is_long_empty, remove_leftovers, shortage
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import DELIVERY_LOCK, queues_directory, redirect_targets, retire
from openmeter_plugin.spool.journal import segments_needed

_LOCK_POLL: Final = 0.2  # seconds between two tries for the lock
_LOCK_REMEDY: Final = f"never remove {DELIVERY_LOCK}: it keeps two processes from delivering the same spool"


async def deliver(
    options: DeliveryOptions,
    *,
    until_empty: bool = False,
    on_start: Callable[[SpoolDelivery], None] | None = None,
) -> None:
    """Deliver the spool's queues until cancelled; with `until_empty`, until the backlog is delivered.

    `on_start` is called with the delivery once the lock is held. If the lock file is removed or replaced
    meanwhile, this process stops delivering and waits for the lock again.
    """
    while True:
        lock = await _lock(options.spool)
        try:
            clock = SteadyClock(_last_write(options.spool))
            delivery = SpoolDelivery(options, await _open_books(options.spool), clock)
            if on_start is not None:
                on_start(delivery)
            get_logger().info("delivery_started", spool=options.spool.name)
            if until_empty:
                return await delivery.run_until_empty()
            await delivery.run(partial(_is_lock_of, options.spool, lock))
        except BooksTakenError as error:
            if until_empty:
                raise
            get_logger().error("delivery_interrupted", reason=str(error), remedy=_LOCK_REMEDY)
        finally:
            os.close(lock)


def run_delivery(
    options: DeliveryOptions,
    *,
    until_empty: bool = False,
    with_parent: bool = False,
    background: Coroutine[None, None, None] | None = None,
    on_start: Callable[[SpoolDelivery], None] | None = None,
) -> None:
    """Run `deliver` until SIGTERM or SIGINT; `with_parent` also until standard input ends.

    A POST in flight gets a few seconds; otherwise its batch is sent again later. `background` runs on the
    same event loop.
    """
    gc.freeze()  # imported modules are no garbage, and scanning them would cost more than everything else

    async def main() -> None:
        task = asyncio.create_task(deliver(options, until_empty=until_empty, on_start=on_start))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        background_task = asyncio.create_task(background) if background else None
        if with_parent:
            loop.add_reader(sys.stdin.fileno(), task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            get_logger().info("delivery_stopped")
        finally:
            if background_task is not None:
                background_task.cancel()

    asyncio.run(main())


async def _open_books(spool: Path) -> Books:
    """Open the books, and retry for as long as the disk fails.

    Uses a thread, because this reads the whole file and the process still has to write its heartbeat. A
    cancellation waits for the thread: after the lock is released, it would take the books from a successor.
    """
    limit = RateLimit()
    while True:
        opening = asyncio.ensure_future(asyncio.to_thread(Books, spool))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            with contextlib.suppress(sqlite3.Error, OSError):
                (await opening).close()
            raise
        except (sqlite3.OperationalError, OSError) as error:
            if limit.passes():
                get_logger().error("books_open_failed", reason=str(error))
            await asyncio.sleep(_LOCK_POLL)


def _last_write(spool: Path) -> float | None:
    """Return when the books were written last; None if that is not known."""
    times = []
    for name in (FILE, f"{FILE}-wal"):
        with contextlib.suppress(OSError):
            times.append((spool / name).stat().st_mtime)
    return max(times, default=None)


async def _lock(spool: Path) -> int:
    """Wait for the spool's lock and return its descriptor; retries for as long as the disk fails."""
    limit = RateLimit()
    while True:
        try:
            descriptor = os.open(spool / DELIVERY_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise
        except OSError as error:
            if limit.passes():
                get_logger().error("lock_open_failed", reason=error.strerror)
        else:
            if _locked(descriptor) and _is_lock_of(spool, descriptor):
                return descriptor
            os.close(descriptor)
        await asyncio.sleep(_LOCK_POLL)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_lock_of(spool: Path, descriptor: int) -> bool:
    """Return whether the spool's lock file is the open one, so that no other process can lock another."""
    try:
        status = (spool / DELIVERY_LOCK).stat()
    except FileNotFoundError:
        return False
    except OSError:
        return True  # the disk fails: nobody can have replaced it
    return os.path.samestat(status, os.fstat(descriptor))


_POLL: Final = 0.2  # seconds between two checks for new queues
_RETENTION_INTERVAL: Final = 1.0  # seconds between two checks for expired segments
_LEFTOVER_INTERVAL: Final = 3600.0  # seconds between two checks for temporary files of killed processes
_PRUNE_STEP_INTERVAL: Final = 10.0  # seconds between two steps while there are ledger lines to prune
_PRUNE_INTERVAL: Final = 600.0  # seconds to the next step once there are none


class SpoolDelivery:
    """Delivers all queues of a spool."""

    def __init__(self, options: DeliveryOptions, books: Books, clock: SteadyClock | None = None) -> None:
        self._options = options
        self._clock = clock or SteadyClock()
        self._books = books
        self._breakers = Breakers()
        self.queues: dict[str, QueueDelivery] = {}
        self.stopped = False
        self._redeliverer = Redeliverer(books, self.queues)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._log = get_logger()
        self._failure_limit = RateLimit()

    async def run(self, is_owner: Callable[[], bool] = lambda: True) -> None:
        """Work until cancelled, or until the books turn out damaged: the next start replaces them.

        Raises BooksTakenError if another process delivers the spool, or could: `is_owner` says so.
        """
        loops = (self._retention_loop(), self._prune_loop(), self._redeliverer.run())
        background = [asyncio.create_task(loop) for loop in loops]
        try:
            while True:
                for name in self._queue_names():
                    self._start(name)
                for task in background:
                    if task.done():
                        task.result()
                if not is_owner():
                    raise BooksTakenError("the lock of this spool was removed or replaced")
                await asyncio.sleep(_POLL)
        finally:
            self.stopped = True
            await _cancel([*background, *self._tasks.values()])
            self._books.close()

    async def run_until_empty(self) -> None:
        """Deliver the backlog and finish the requested redeliveries, then return."""
        try:
            for name in queue_directories(self._options.spool):
                self.queues[name] = self._delivery(name)
            await asyncio.gather(*(queue.run_until_empty() for queue in self.queues.values()))
            await self._redeliverer.run_until_done()
            await self._remove_expired()
        finally:
            await asyncio.gather(*(queue.close() for queue in self.queues.values()))
            self._books.close()

    def _queue_names(self) -> list[str]:
        """Return the names of the queues on disk; those known so far if the disk cannot be read now."""
        try:
            return queue_directories(self._options.spool)
        except OSError as error:  # such as too many open files
            if self._failure_limit.passes():
                self._log.error("queues_unreadable", reason=error.strerror)
            return list(self.queues)

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
            if (end := _end_of_delivery(error)) is not None:
                raise end from None
            if self._failure_limit.passes():
                self._log.exception("queue_delivery_failed", queue=name)
            self._tasks.pop(name, None)
            return
        self._tasks[name] = asyncio.create_task(self.queues[name].run())

    def _delivery(self, name: str) -> QueueDelivery:
        endpoint = Endpoint(self._options, name, self._breakers, self._clock)
        return QueueDelivery(self._options.spool, name, self._books, endpoint, self._clock)

    async def _retention_loop(self) -> None:
        leftovers_at = 0.0
        while True:
            if time.monotonic() >= leftovers_at:
                self._remove_leftovers()
                await self._retire_queues()
                leftovers_at = time.monotonic() + _LEFTOVER_INTERVAL
            await asyncio.sleep(min(_RETENTION_INTERVAL, self._options.retention.age.total_seconds() + _POLL))
            await self._remove_expired()

    async def _remove_expired(self) -> None:
        """Remove expired segments, except those that a redelivery or the reader of Kong segments may need.

        If the disk runs short of space, those are removed too, so that new usage can be written.
        """
        try:
            missing = shortage(self._options.spool)
            is_needed = segments_needed(self._options.spool)
            owners = {
                segment: queue
                for queue in self.queues.values()
                if missing > 0 or not self._redeliverer.wants(queue.queue)
                for segment in queue.delivered.values()
                if not is_needed(queue.queue, segment.path.name)
            }
            removed: dict[QueueDelivery, list[str]] = {}
            for segment in expired(owners, self._options.retention, missing):
                removed.setdefault(owners[segment], []).append(segment.path.name)
            if removed:
                await asyncio.to_thread(self._books.sync)
            for queue, names in removed.items():
                await queue.remove(names)
        except (sqlite3.Error, OSError) as error:
            if is_damage(error):
                raise
            if self._failure_limit.passes():
                self._log.error("segment_removal_failed", reason=str(error))

    async def _retire_queues(self) -> None:
        """Stop delivery of queues that are long empty, and remove their folders; their counts stay.

        Kong does not say when a plugin is gone. The worker of one that is only idle writes the folder again
        with its next event.
        """
        try:
            targets = redirect_targets(self._options.spool)
            for name, queue in list(self.queues.items()):
                if name in targets or not is_long_empty(queue.directory, self._clock):
                    continue
                if queue.empty and self._books.is_empty(name) and retire(self._options.spool, name):
                    del self.queues[name]
                    await _cancel([task] if (task := self._tasks.pop(name, None)) else [])
                    self._log.info("queue_retired", queue=name)
        except (sqlite3.Error, OSError) as error:
            if is_damage(error):
                raise
            self._log.error("queue_retirement_failed", reason=str(error))

    async def _prune_loop(self) -> None:
        total = 0
        while True:
            pruned = 0
            try:
                pruned = self._books.prune(self._options.ledger_days, self._clock.utc())
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


def _end_of_delivery(error: BaseException) -> BaseException | None:
    """Return the error if it ends delivery: the books are damaged, or another process has taken them."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(_end_of_delivery, error.exceptions)), None)
    return error if is_damage(error) or isinstance(error, BooksTakenError) else None


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def queue_directories(spool: Path) -> list[str]:
    """Return the names of the spool's queues; raises OSError."""
    try:
        with os.scandir(queues_directory(spool)) as entries:  # asks the disk once, not once for each queue
            return sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return []
