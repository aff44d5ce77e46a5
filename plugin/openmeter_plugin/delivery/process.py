"""The delivery process: one per spool, whichever worker or generation of the plugin server wrote there.

After `kong reload` two generations use the same spool. The lock on the spool decides which one delivers;
the other waits for it, so no file is ever sent by two.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Final

from openmeter_plugin.delivery.sender import QueueSender
from openmeter_plugin.delivery.state import DeliveryState
from openmeter_plugin.log import get_logger
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory

LOCK: Final = "delivery.lock"
_POLL: Final = 0.2  # seconds between two tries for the lock, and two looks for new queues


async def deliver(spool: Path, *, until_empty: bool = False) -> None:
    """Deliver the spool's queues until cancelled, or until all that was there is taken."""
    lock = await _lock(spool)
    log = get_logger()
    state = DeliveryState(spool)
    senders: dict[str, asyncio.Task[None]] = {}
    log.info("delivery_started", spool=spool.name)
    try:
        while True:
            for queue in _queues(spool):
                task = senders.get(queue)
                if task is not None and task.done() and not until_empty:
                    error = task.exception()
                    log.error("queue_delivery_failed", queue=queue, exc_info=error)
                    task = None
                if task is None:
                    sender = QueueSender(spool, queue, state, until_empty=until_empty)
                    senders[queue] = asyncio.create_task(sender.run())
            if until_empty:
                await asyncio.gather(*senders.values())
                return
            await asyncio.sleep(_POLL)
    finally:
        for task in senders.values():
            task.cancel()
        await asyncio.gather(*senders.values(), return_exceptions=True)
        state.close()
        os.close(lock)


def run_delivery(
    spool: Path,
    *,
    until_empty: bool = False,
    with_parent: bool = False,
    beside: Coroutine[None, None, None] | None = None,
) -> None:
    """Run `deliver` until SIGTERM or SIGINT, `with_parent` also until standard input ends.

    A POST under way is abandoned: its batch is sent again later. `beside` runs on the same event loop.
    """

    async def main() -> None:
        task = asyncio.create_task(deliver(spool, until_empty=until_empty))
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


async def _lock(spool: Path) -> int:
    descriptor = os.open(spool / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_POLL)
            else:
                return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _queues(spool: Path) -> list[str]:
    """Return the queues that go somewhere; records that were set aside wait for somebody."""
    try:
        return sorted(p.name for p in queues_directory(spool).iterdir() if p.name != QUARANTINE)
    except FileNotFoundError:
        return []
