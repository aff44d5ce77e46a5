"""Worker process: accepts Kong's connections on the supervisor's socket, serves them and writes the spool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.instances.store import InstanceFiles
from openmeter_plugin.instances.worker_sync import Mailboxes, WorkerSync
from openmeter_plugin.kong.acceptor import MAX_CONNECTIONS, Acceptor, ConnectionCounts
from openmeter_plugin.kong.connections import Connections
from openmeter_plugin.kong.server import Server
from openmeter_plugin.kong.shutdown import drain
from openmeter_plugin.log import get_logger
from openmeter_plugin.process.handoff import Handoff
from openmeter_plugin.process.supervisor import SUCCESSOR_SECONDS, Heartbeats
from openmeter_plugin.spool.writer import Fsync, SpoolWriter

_SWEEP_SECONDS: Final = 3600.0  # instances without an event for one to two sweeps are forgotten
_DISK_CHECK_SECONDS: Final = 0.25
_STALE_SECONDS: Final = 15.0
"""A connection may be silent at first, or a frame incomplete, for one to two times as long."""
_STOP_SECONDS: Final = 5.0
"""A stop waits at most this long for events under way, and as long again for the disk."""
_IDLE_SECONDS: Final = 4.0
_ACTIVATED_IDLE_SECONDS: Final = 1.0
"""For idle connections, if the next server uses the same socket: each connection that waits for that server
holds one of Kong's 4096 timers."""
_SUCCESSOR_POLL: Final = 0.02
_INSTANCE_FILES_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Settings of a worker."""

    spool: Path
    fsync: Fsync = "interval"
    fsync_interval: float = 1.0
    keep_tokens: bool = True
    socket_activated: bool = False
    """Whether systemd holds the listening socket: then connections pending in it are for the next server."""
    in_place: Callable[[], bool] = lambda: False
    """Whether the path of our own listening socket still leads to it."""


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """A worker's number, and the memory and sockets that it shares with the supervisor and other workers."""

    number: int
    heartbeats: Heartbeats
    mailboxes: Mailboxes
    connection_counts: ConnectionCounts
    handoff: Handoff


def run_worker(listener: socket.socket, options: WorkerOptions, slot: WorkerSlot) -> None:
    """Serve until SIGTERM or SIGINT; then answer the events under way, write them to disk and return."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listener, options, slot))


async def _serve(listener: socket.socket, options: WorkerOptions, slot: WorkerSlot) -> None:
    loop = asyncio.get_running_loop()
    supervisor = os.getppid()

    def notify(tokens: list[Any]) -> None:
        # The loop is closed if the stop took too long; Kong resends those events.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(Server.committed, tokens)

    writer = SpoolWriter(
        options.spool,
        notify,
        fsync=options.fsync,
        fsync_interval=options.fsync_interval,
        keep_tokens=options.keep_tokens,
    )
    ids = InstanceIds(options.spool)
    instances = Instances(ids, writer)
    worker_sync = WorkerSync(slot.mailboxes, slot.number, on_start=instances.adopt, on_close=instances.close)
    files = InstanceFiles(options.spool, loop)
    several_workers = len(slot.mailboxes.pairs) > 1
    server = Server(instances, writer, loop, worker_sync if several_workers else None, files)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    writer.start()
    files.start()
    worker_sync.listen(loop)
    background_tasks = [
        loop.create_task(slot.heartbeats.keep_beating(slot.number)),
        loop.create_task(_run_housekeeping(ids, instances, files)),
        loop.create_task(_watch_disk(server)),
        loop.create_task(_watch_connections(server)),
    ]
    connections = Connections(loop, server.flush, slot.handoff)
    if taken_over := connections.take_over(server.connection):
        get_logger().info("connections_taken_over", **taken_over)
    acceptor = Acceptor(
        listener,
        server,
        connections,
        slot.connection_counts,
        slot.number,
        loop,
        max_connections=min(slot.handoff.limit, MAX_CONNECTIONS),
    )
    get_logger().info("serving")
    await stop.wait()

    if options.socket_activated:
        acceptor.close()
    else:
        await _wait_for_successor(supervisor, options.in_place)
    await _drain(server, None if options.socket_activated else acceptor)
    acceptor.close()
    connections.close()
    server.flush()
    await asyncio.to_thread(files.close, _INSTANCE_FILES_SECONDS)
    finished = await asyncio.to_thread(writer.close, _STOP_SECONDS)
    for task in background_tasks:
        task.cancel()
    get_logger().info("stopped", spool_written=finished)


async def _wait_for_successor(supervisor: int, in_place: Callable[[], bool]) -> None:
    """If the supervisor was killed, keep serving for a few seconds, until the next server has the path.

    Kong does not resend an event whose connection is refused: each kill of the soak lost hundreds of them.
    """
    deadline = time.monotonic() + SUCCESSOR_SECONDS
    while os.getppid() != supervisor and in_place() and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(_SUCCESSOR_POLL)  # a file and a pid: there is nothing to wait for


async def _drain(server: Server, acceptor: Acceptor | None) -> None:
    """Close all connections; with an `acceptor`, also those pending in its socket, which ends with us."""
    if acceptor is None:
        await drain(server, _STOP_SECONDS, _ACTIVATED_IDLE_SECONDS)
        return
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _STOP_SECONDS
    await drain(server, _STOP_SECONDS, _IDLE_SECONDS)
    acceptor.accept_pending()
    await drain(server, max(0.0, deadline - loop.time()), 0.0)


async def _run_housekeeping(ids: InstanceIds, instances: Instances, files: InstanceFiles) -> None:
    """Periodically reserve instance ids and forget unused instances, so that no event waits for it."""
    next_sweep = time.monotonic() + _SWEEP_SECONDS
    while True:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(ids.reserve)
        if time.monotonic() >= next_sweep:
            files.sweep(instances.used)
            instances.forget_unused()
            next_sweep += _SWEEP_SECONDS


async def _watch_connections(server: Server) -> None:
    while True:
        await asyncio.sleep(_STALE_SECONDS)
        server.close_stale()


async def _watch_disk(server: Server) -> None:
    while True:
        await asyncio.sleep(_DISK_CHECK_SECONDS)
        server.check_disk()
