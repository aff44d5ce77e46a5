"""The delivery process: one per spool, whichever worker or generation of the plugin server wrote there.

After `kong reload` two generations use the same spool. The lock on the spool decides which one delivers;
the other waits for it, so no file is ever sent by two.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final

from openmeter_plugin.books.store import Books
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.spool_delivery import SpoolDelivery
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import DELIVERY_LOCK

_POLL: Final = 0.2  # seconds between two tries for the lock


async def deliver(
    options: DeliveryOptions,
    *,
    until_empty: bool = False,
    started: Callable[[SpoolDelivery], None] | None = None,
) -> None:
    """Deliver the spool's queues until cancelled, or until all that was there is taken.

    `started` is told of the delivery once the lock is held.
    """
    lock = await _lock(options.spool)
    try:
        delivery = SpoolDelivery(options, await _open_books(options.spool))
        if started is not None:
            started(delivery)
        get_logger().info("delivery_started", spool=options.spool.name)
        await (delivery.run_until_empty() if until_empty else delivery.run())
    finally:
        os.close(lock)


def run_delivery(
    options: DeliveryOptions,
    *,
    until_empty: bool = False,
    with_parent: bool = False,
    beside: Coroutine[None, None, None] | None = None,
    started: Callable[[SpoolDelivery], None] | None = None,
) -> None:
    """Run `deliver` until SIGTERM or SIGINT, `with_parent` also until standard input ends.

    A POST under way is given a few seconds; else its batch is sent again later. `beside` runs on the same
    event loop.
    """
    gc.freeze()  # what is imported by now is no garbage: searching it costs more than all the rest

    async def main() -> None:
        task = asyncio.create_task(deliver(options, until_empty=until_empty, started=started))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        chore = asyncio.create_task(beside) if beside else None
        if with_parent:
            loop.add_reader(sys.stdin.fileno(), task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            get_logger().info("delivery_stopped")
        finally:
            if chore is not None:
                chore.cancel()

    asyncio.run(main())


async def _open_books(spool: Path) -> Books:
    """Open the books, however long the disk fails.

    In a thread, since it reads all of them, and this process must give signs of life meanwhile.
    """
    limit = RateLimit()
    while True:
        try:
            return await asyncio.to_thread(Books, spool)
        except (sqlite3.OperationalError, OSError) as error:
            if limit.passes():
                get_logger().error("books_cannot_be_opened", reason=str(error))
            await asyncio.sleep(_POLL)


async def _lock(spool: Path) -> int:
    """Return the lock's descriptor, once nobody else holds it and however long the disk fails."""
    limit = RateLimit()
    while True:
        try:
            descriptor = os.open(spool / DELIVERY_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise
        except OSError as error:
            if limit.passes():
                get_logger().error("lock_cannot_be_opened", reason=error.strerror)
        else:
            if _locked(descriptor):
                return descriptor
            os.close(descriptor)
        await asyncio.sleep(_POLL)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
