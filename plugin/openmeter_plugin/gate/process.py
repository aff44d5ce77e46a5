"""The gate's process: a child of the supervisor, so that a gate that fails or hangs delays nobody."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop

from openmeter_plugin.gate.server import serve
from openmeter_plugin.gate.service import Gate
from openmeter_plugin.gate.settings import Settings
from openmeter_plugin.log import get_logger


def run_gate(
    listener: socket.socket, settings: Settings, spool: Path, heartbeat: Coroutine[Any, Any, None]
) -> None:
    """Run the gate until SIGTERM or SIGINT; `heartbeat` runs on its event loop."""
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(listener, settings, spool, heartbeat))


async def _run(
    listener: socket.socket, settings: Settings, spool: Path, heartbeat: Coroutine[Any, Any, None]
) -> None:
    gate = Gate(settings, spool)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tasks = [loop.create_task(each) for each in (heartbeat, gate.run(), serve(gate, listener))]
    stopping = loop.create_task(stop.wait())
    get_logger().info("gate_started", mode=settings.mode, features=[it.key for it in settings.features])
    done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if stopping not in done:
        for result in results:
            if isinstance(result, Exception):
                raise result
    get_logger().info("gate_stopped")
