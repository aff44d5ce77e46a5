"""Drain: delivers a spool whose gateway is gone, or waits until the server beside it has delivered all."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

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

_REFRESH: Final = 0.3  # seconds between two updates of the progress bar
_AFTER_KONG: Final = 2.0
"""Seconds. Kong hands over the last logs from a timer, after its listener has closed."""


class _ConsoleLog:
    """Writes log lines above the progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def msg(self, text: str) -> None:
        line(self._console, text)

    debug = info = warning = error = critical = msg


def drain(options: DeliveryOptions, console: Console, seconds: float | None = None) -> SpoolStatus:
    """Deliver until nothing waits, a signal arrives or the time is up, and return the spool's status.

    Raises SpoolError if another process delivers the spool.
    """
    if delivery_runs(options.spool):
        raise SpoolError("a delivery process is already running on this spool and delivers its backlog")
    if not os.access(options.spool, os.W_OK):
        raise SpoolError(f"{options.spool} cannot be written; drain records there what it delivers")
    configure_logging("drain")
    initial = _initial_status(options.spool)
    waiting = [destination.id for destination in initial.destinations if destination.backlog]
    if options.endpoint is not None and len(waiting) > 1:
        raise SpoolError(
            f"--endpoint would send the events of several destinations to one address: {', '.join(waiting)}"
        )
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
            asyncio.run(_drain(options, progress, initial.total.backlog, seconds))
    return read_status(options.spool)


def wait_until_delivered(spool: Path, kong_port: int) -> None:
    """Return when nothing listens on Kong's port any more and the spool's backlog is empty.

    It has no limit of its own: Kubernetes ends a hook together with the pod's grace period. A spool that
    cannot be read at the moment may hold events, so it is waited for too.
    """
    while _is_open(kong_port):
        time.sleep(0.2)
    time.sleep(_AFTER_KONG)
    while _may_hold_events(spool):
        time.sleep(1)


def _is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _may_hold_events(spool: Path) -> bool:
    try:
        return read_status(spool).total.backlog > 0
    except (SpoolError, OSError, sqlite3.Error):
        return True


def _initial_status(spool: Path) -> SpoolStatus:
    try:
        return read_status(spool)
    except SpoolError:
        Books(spool).close()  # moves damaged books away, as the delivery process would
        return read_status(spool)


async def _drain(options: DeliveryOptions, progress: Progress, backlog: int, seconds: float | None) -> None:
    async with asyncio.timeout(seconds):
        task = asyncio.create_task(deliver(options, until_empty=True))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        display = asyncio.create_task(_show_progress(options, progress, backlog))
        try:
            await task
        finally:
            display.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(task, display, return_exceptions=True)


async def _show_progress(options: DeliveryOptions, progress: Progress, backlog: int) -> None:
    if progress.disable:
        return
    bar = progress.add_task("events", total=backlog)
    while True:
        with suppress(SpoolError):
            status = await asyncio.to_thread(read_status, options.spool)
            progress.update(bar, completed=max(0, backlog - status.total.backlog))
        await asyncio.sleep(_REFRESH)
