"""Delivering a spool whose gateway is gone, until nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from openmeter_plugin.books.models import SpoolStatus
from openmeter_plugin.books.read_models import SpoolError, delivery_runs
from openmeter_plugin.books.status import read_status
from openmeter_plugin.books.store import Books
from openmeter_plugin.cli.render import line
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.process import deliver
from openmeter_plugin.log import configure_logging

_LOOK: float = 0.3  # seconds between two looks at the books


class _ConsoleLog:
    """Writes log lines above the progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def msg(self, text: str) -> None:
        line(self._console, text)

    debug = info = warning = error = critical = msg


def drain(options: DeliveryOptions, console: Console, seconds: float | None = None) -> SpoolStatus:
    """Deliver until nothing waits, a signal comes or the time is up; returns how the spool is then.

    Raises SpoolError where somebody else delivers it.
    """
    if delivery_runs(options.spool):
        raise SpoolError("a delivery is running on this spool already; it delivers what waits")
    if not os.access(options.spool, os.W_OK):
        raise SpoolError(f"{options.spool} cannot be written: what is delivered must be noted there")
    configure_logging("drain")
    at_first = _status_at_first(options.spool)
    waiting = [destination.id for destination in at_first.destinations if destination.backlog]
    if options.endpoint is not None and len(waiting) > 1:
        raise SpoolError(f"--endpoint would send all of these to one address: {', '.join(waiting)}")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        if console.is_terminal:
            sink = _ConsoleLog(progress.console)
            structlog.configure(logger_factory=lambda *_: sink)
        with suppress(TimeoutError, asyncio.CancelledError):
            asyncio.run(_drain(options, progress, at_first.total.backlog, seconds))
    return read_status(options.spool)


def _status_at_first(spool: Path) -> SpoolStatus:
    try:
        return read_status(spool)
    except SpoolError:
        Books(spool).close()  # sets books aside that are damaged, as the delivery would
        return read_status(spool)


async def _drain(options: DeliveryOptions, progress: Progress, at_first: int, seconds: float | None) -> None:
    async with asyncio.timeout(seconds):
        task = asyncio.create_task(deliver(options, until_empty=True))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        showing = asyncio.create_task(_show(options, progress, at_first))
        try:
            await task
        finally:
            showing.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(task, showing, return_exceptions=True)


async def _show(options: DeliveryOptions, progress: Progress, at_first: int) -> None:
    if progress.disable:
        return
    bar = progress.add_task("events", total=at_first)
    while True:
        with suppress(SpoolError):
            status = await asyncio.to_thread(read_status, options.spool)
            progress.update(bar, completed=max(0, at_first - status.total.backlog))
        await asyncio.sleep(_LOOK)
