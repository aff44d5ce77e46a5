"""The delivery process with its HTTP API, where one is asked for; else nothing of that is imported."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass

from openmeter_plugin.api.access import Access
from openmeter_plugin.delivery.options import DeliveryOptions
from openmeter_plugin.delivery.process import run_delivery
from openmeter_plugin.process.heartbeat import Heartbeats

Beside = Coroutine[None, None, None]


@dataclass(frozen=True, slots=True)
class ApiListener:
    """Where the API is offered, and to whom."""

    listener: socket.socket
    access: Access


@dataclass(frozen=True, slots=True)
class Siblings:
    """The processes of one supervisor: this one's slot, and all of them by name."""

    heartbeats: Heartbeats
    slot: int
    children: Mapping[str, int]
    hang_seconds: float


def run(
    options: DeliveryOptions,
    offer: ApiListener | None,
    family: Siblings | None = None,
    *,
    until_empty: bool = False,
    with_parent: bool = False,
) -> None:
    """Run the delivery until SIGTERM or SIGINT, and the API beside it."""
    beside: list[Beside] = [family.heartbeats.keep_beating(family.slot)] if family is not None else []
    on_start = None
    if offer is not None:
        from openmeter_plugin.api.health import HealthMonitor
        from openmeter_plugin.api.server import serve_api

        watch = HealthMonitor(options.spool)
        if family is not None:
            watch = HealthMonitor(options.spool, family.children, family.heartbeats, family.hang_seconds)

        on_start = watch.started
        beside.append(serve_api(offer.listener, watch, offer.access))
    run_delivery(
        options,
        until_empty=until_empty,
        with_parent=with_parent,
        background=_together(beside) if beside else None,
        on_start=on_start,
    )


async def _together(tasks: list[Beside]) -> None:
    async with asyncio.TaskGroup() as group:
        for task in tasks:
            group.create_task(task)
