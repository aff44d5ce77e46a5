"""The process that serves Kong: it takes connections from the listening socket that the supervisor holds."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from openmeter_plugin.instances.instance import InstanceIds, Instances
from openmeter_plugin.instances.store import InstanceFiles
from openmeter_plugin.instances.worker_sync import Mailboxes, WorkerSync
from openmeter_plugin.kong.acceptor import Acceptor, Shares
from openmeter_plugin.kong.connections import Connections
from openmeter_plugin.kong.server import Server
from openmeter_plugin.kong.shutdown import drain
from openmeter_plugin.log import get_logger
from openmeter_plugin.process.handoff import Kept
from openmeter_plugin.process.heartbeat import Heartbeats
from openmeter_plugin.spool.writer import Fsync, SpoolWriter

if TYPE_CHECKING:
    from openmeter_plugin.http_log.config import HttpLogConfig

_SWEEP_SECONDS: Final = 3600.0  # an instance without an event for one to two of these is forgotten
_DISK_LOOK_SECONDS: Final = 0.25
_STOP_SECONDS: Final = 5.0
"""A stop takes at most this long for the events under way, and as long again for the disk."""
_UNHURRIED_SECONDS: Final = 4.0
_HURRIED_SECONDS: Final = 1.0
"""For idle connections, while new ones wait for the server after us: each holds one of Kong's 4096 timers."""
_FILES_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How to serve."""

    spool: Path
    fsync: Fsync = "interval"
    fsync_interval: float = 1.0
    keep_tokens: bool = True
    socket_stays: bool = False
    """Whether the listening socket outlives us: then what waits in it is for the server after us."""


@dataclass(frozen=True, slots=True)
class WorkerSlot:
    """What a worker shares with the supervisor and the other workers, and which of them it is."""

    number: int
    heartbeats: Heartbeats
    mailboxes: Mailboxes
    shares: Shares
    kept: Kept


def run_worker(
    listener: socket.socket | None,
    options: WorkerOptions,
    place: WorkerSlot,
    http_log_listener: socket.socket | None = None,
    http_log_config: HttpLogConfig | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then answer what is under way, write it out and return."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listener, options, place, http_log_listener, http_log_config))


async def _serve(
    listener: socket.socket | None,
    options: WorkerOptions,
    place: WorkerSlot,
    http_log_listener: socket.socket | None,
    http_log_config: HttpLogConfig | None,
) -> None:
    loop = asyncio.get_running_loop()

    def notify(tokens: list[Any]) -> None:
        # The loop is gone when the stop took too long; Kong sends those events again.
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
    peers = WorkerSync(place.mailboxes, place.number, started=instances.adopt, closed=instances.close)
    files = InstanceFiles(options.spool, loop)
    server = Server(instances, writer, loop, peers if len(place.mailboxes.pairs) > 1 else None, files)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    writer.start()
    files.start()
    peers.listen(loop)
    chores = [
        loop.create_task(place.heartbeats.keep_beating(place.number)),
        loop.create_task(_keep_house(ids, instances, files)),
        loop.create_task(_watch_disk(server)),
    ]
    connections = Connections(loop, server.flush, place.kept)
    if taken_over := connections.take_over(server.connection):
        get_logger().info("connections_taken_over", **taken_over)
    accepting = (
        Acceptor(listener, server, connections, place.shares, place.number, loop)
        if listener is not None
        else None
    )
    http_log = None
    if http_log_listener is not None and http_log_config is not None:
        from openmeter_plugin.http_log.receiver import HttpLog  # a web server's memory, for whoever wants one

        http_log = HttpLog(http_log_listener, http_log_config, writer)
    get_logger().info("serving")
    await stop.wait()

    if accepting is not None and options.socket_stays:
        accepting.close()
    drained = _drain(server, None if options.socket_stays else accepting)
    if http_log is not None:
        await asyncio.gather(drained, http_log.stop())
    else:
        await drained
    if accepting is not None:
        accepting.close()
    connections.close()
    server.flush()
    await asyncio.to_thread(files.close, _FILES_SECONDS)
    finished = await asyncio.to_thread(writer.close, _STOP_SECONDS)
    for chore in chores:
        chore.cancel()
    get_logger().info("stopped", spool_written=finished)


async def _drain(server: Server, accepting: Acceptor | None) -> None:
    """End all connections, and those that wait in a listening socket that ends with us (`accepting`)."""
    if accepting is None:
        await drain(server, _STOP_SECONDS, _HURRIED_SECONDS)
        return
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _STOP_SECONDS
    await drain(server, _STOP_SECONDS, _UNHURRIED_SECONDS)
    accepting.look()
    await drain(server, max(0.0, deadline - loop.time()), 0.0)


async def _keep_house(ids: InstanceIds, instances: Instances, files: InstanceFiles) -> None:
    """Do what serving must not wait for, now and then."""
    next_sweep = time.monotonic() + _SWEEP_SECONDS
    while True:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(ids.reserve)
        if time.monotonic() >= next_sweep:
            files.sweep(instances.used)
            instances.forget_unused()
            next_sweep += _SWEEP_SECONDS


async def _watch_disk(server: Server) -> None:
    while True:
        await asyncio.sleep(_DISK_LOOK_SECONDS)
        server.look_at_disk()
