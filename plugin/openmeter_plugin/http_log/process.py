"""The http-log process: receives posts and writes their records to segments of its own.

It is a child of the supervisor beside the workers, so that no post, however large, delays Kong's plugin
calls. It shares nothing with the workers but the spool: each process appends to its own segments.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

import uvloop

from openmeter_plugin.http_log.config import HttpLogConfig
from openmeter_plugin.http_log.receiver import HttpLogServer
from openmeter_plugin.log import get_logger
from openmeter_plugin.spool.writer import Notify, SpoolWriter

_STOP_SECONDS: Final = 5.0
"""A stop waits at most this long for the disk, after the posts under way have got their answers."""


def run_http_log(
    listener: socket.socket,
    config: HttpLogConfig,
    open_writer: Callable[[Notify], SpoolWriter],
    heartbeat: Coroutine[None, None, None],
) -> None:
    """Receive posts until SIGTERM or SIGINT; then answer those under way and return.

    `heartbeat` runs on the event loop for as long as the process does.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listener, config, open_writer, heartbeat))


async def _serve(
    listener: socket.socket,
    config: HttpLogConfig,
    open_writer: Callable[[Notify], SpoolWriter],
    heartbeat: Coroutine[None, None, None],
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    beating = loop.create_task(heartbeat)
    writer = open_writer(notifying(loop))
    writer.start()
    server = HttpLogServer(listener, config, writer)
    get_logger().info("serving")
    await stop.wait()
    await server.stop()
    finished = await asyncio.to_thread(writer.close, _STOP_SECONDS)
    beating.cancel()
    get_logger().info("stopped", spool_written=finished)


def notifying(loop: asyncio.AbstractEventLoop) -> Notify:
    """Return the function that the spool's writer calls, on its own thread, with what is on disk."""

    def answer(tokens: list[Any]) -> None:
        for token in tokens:
            token.answer()

    def notify(tokens: list[Any]) -> None:
        # The loop is closed if the stop took too long; Kong posts those batches again.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(answer, tokens)

    return notify
