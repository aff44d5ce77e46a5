"""The delivery process with its HTTP API. Without an API, nothing of it is imported."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path

from openmeter_plugin.api.access import Access
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.process import run_delivery
from openmeter_plugin.process.supervisor import Heartbeats
from openmeter_plugin.segments.stats import ReaderStats

BackgroundTask = Coroutine[None, None, None]


@dataclass(frozen=True, slots=True)
class ApiListener:
    """The API's listening socket and access rules."""

    listener: socket.socket
    access: Access


@dataclass(frozen=True, slots=True)
class Siblings:
    """The processes of one supervisor: the slot of this process, and all slots by name."""

    heartbeats: Heartbeats
    slot: int
    children: Mapping[str, int]
    hang_seconds: float
    reader: ReaderStats | None = None
    """The numbers of the reader of Kong segments, if there is one."""
    gate: Path | None = None
    """The gate's socket, if there is a gate."""


def run(
    options: DeliveryOptions,
    api: ApiListener | None,
    siblings: Siblings | None = None,
    *,
    until_empty: bool = False,
    with_parent: bool = False,
) -> None:
    """Run the delivery, with the API if there is one, until SIGTERM or SIGINT."""
    tasks: list[BackgroundTask] = (
        [siblings.heartbeats.keep_beating(siblings.slot)] if siblings is not None else []
    )
    on_start = None
    if api is not None:
        from openmeter_plugin.api.app import serve_api
        from openmeter_plugin.api.health import HealthMonitor

        monitor = HealthMonitor(options.spool)
        if siblings is not None:
            monitor = HealthMonitor(
                options.spool,
                siblings.children,
                siblings.heartbeats,
                siblings.hang_seconds,
                reader=siblings.reader,
                gate=siblings.gate,
            )

        on_start = monitor.started
        tasks.append(serve_api(api.listener, monitor, api.access))
    run_delivery(
        options,
        until_empty=until_empty,
        with_parent=with_parent,
        background=_run_together(tasks) if tasks else None,
        on_start=on_start,
    )


async def _run_together(tasks: list[BackgroundTask]) -> None:
    async with asyncio.TaskGroup() as group:
        for task in tasks:
            group.create_task(task)
