"""The delivery process: one per spool, for all workers and generations of the plugin server that write there.

After `kong reload`, two generations use the same spool. The spool's lock decides which one delivers. The
other waits for it, so that no two processes ever send the same file.
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
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Final

from openmeter_plugin.books.database import FILE
from openmeter_plugin.books.store import Books, BooksTakenError
from openmeter_plugin.clock import SteadyClock
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.spool_delivery import SpoolDelivery
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import DELIVERY_LOCK

_POLL: Final = 0.2  # seconds between two tries for the lock
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

    Uses a thread, because this reads the whole file and the process still has to write its heartbeat.
    """
    limit = RateLimit()
    while True:
        try:
            return await asyncio.to_thread(Books, spool)
        except (sqlite3.OperationalError, OSError) as error:
            if limit.passes():
                get_logger().error("books_open_failed", reason=str(error))
            await asyncio.sleep(_POLL)


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
        await asyncio.sleep(_POLL)


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
