"""The supervisor: holds the listening sockets and keeps the other processes alive.

The sockets outlive every worker: while one is replaced, Kong's new connections wait in the socket's queue
instead of being refused, and open ones stay open (`handoff`). The supervisor does nothing else, so there is
little in it that can fail. It has one thread, so that forking is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

from openmeter_plugin.log import configure_logging, get_logger
from openmeter_plugin.process.handoff import Handoff
from openmeter_plugin.process.sockets import STOP_SIGNALS, Listeners

_SLOT: Final = struct.Struct("<dQ")
_TIME: Final = struct.Struct("<d")
_COUNT: Final = struct.Struct("<Q")
INTERVAL: Final = 0.5  # seconds between two heartbeats


class Heartbeats:
    """Heartbeats, by which the supervisor detects a hung child process; created before the forks.

    The processes share a page of memory with one slot per child process. The child's event loop writes the
    time into its slot, and the supervisor reads it: CLOCK_MONOTONIC, which is the same in all processes and
    never jumps. In the same slot the supervisor counts restarts, for the metrics.
    """

    def __init__(self, slots: int) -> None:
        self._memory = mmap.mmap(-1, slots * _SLOT.size)

    def beat(self, slot: int) -> None:
        """Write a heartbeat."""
        _TIME.pack_into(self._memory, slot * _SLOT.size, time.monotonic())

    def silence(self, slot: int) -> float:
        """Return the seconds since the last heartbeat."""
        last, _ = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        return time.monotonic() - float(last)

    def count_restart(self, slot: int) -> None:
        """Count a restart; called by the supervisor."""
        _COUNT.pack_into(self._memory, slot * _SLOT.size + _TIME.size, self.restarts(slot) + 1)

    def restarts(self, slot: int) -> int:
        """Return how often the child process was restarted."""
        _, restarts = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        return int(restarts)

    async def keep_beating(self, slot: int) -> None:
        """Write heartbeats for as long as the event loop runs."""
        while True:
            self.beat(slot)
            await asyncio.sleep(INTERVAL)


_STOP_SECONDS: Final = 12.0  # for all child processes together; then they are killed
_SHORT_LIFE: Final = 1.0  # seconds; a child process that ends sooner is restarted with a delay
_MAX_DELAY: Final = 1.0
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_BUSY_INTERVAL: Final = 0.05  # seconds until the next check, while connections come and go
_SIGNALS: Final = STOP_SIGNALS | {signal.SIGCHLD}


class Child:
    """A child process to keep alive: what it runs, and when it may be restarted.

    `slot` is that of its heartbeats. `handoff` holds its connections for its successor.
    """

    def __init__(self, name: str, run: Callable[[], None], slot: int, handoff: Handoff | None = None) -> None:
        self.name = name
        self.run = run
        self.slot = slot
        self.handoff = handoff
        self.pid: int | None = None
        self.start_at = 0.0
        self.started_before = False
        self._started = 0.0
        self._delay = 0.0

    def start(self) -> None:
        """Fork and run; returns in the parent only."""
        self._started = time.monotonic()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._run_child(parent)
        self.pid = pid
        self.started_before = True

    def exited(self, status: int) -> None:
        """Note that the process ended and schedule its restart: at once, unless it keeps ending early."""
        lived = time.monotonic() - self._started
        self._delay = min(max(0.05, self._delay * 2), _MAX_DELAY) if lived < _SHORT_LIFE else 0.0
        self.start_at = time.monotonic() + self._delay
        get_logger().error(
            "process_ended", child=self.name, child_pid=self.pid, exit_status=status, lived=round(lived, 3)
        )
        self.pid = None

    def _run_child(self, parent: int) -> NoReturn:
        status = os.EX_SOFTWARE
        try:
            end_with_parent(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            configure_logging(self.name)
            self.run()
            status = os.EX_OK
        except BaseException:
            get_logger().critical("process_crashed", exc_info=True)
        finally:
            os._exit(status)


def end_with_parent(parent: int) -> None:
    """Stop this process when its parent is gone, even by kill -9, and end it soon after in any case.

    It gets SIGTERM if possible, so that it answers Kong's calls under way; SIGKILL would lose them.
    """
    if sys.platform == "linux":
        watched = _exit_after(parent)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM if watched else signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call to prctl
        os._exit(os.EX_OK)


def _exit_after(parent: int) -> bool:
    """Start a thread that ends this process some time after its parent; False if that is impossible."""
    try:
        descriptor = os.pidfd_open(parent)
    except OSError:  # an old kernel, or a sandbox that forbids it
        return False

    def wait_and_exit() -> None:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll()
        time.sleep(_STOP_SECONDS)
        os._exit(os.EX_SOFTWARE)

    threading.Thread(target=wait_and_exit, name="orphan", daemon=True).start()
    return True


def supervise(
    children: list[Child], listeners: Listeners, heartbeats: Heartbeats, hang_seconds: float
) -> None:
    """Keep the child processes alive until SIGTERM or SIGINT, then stop them within a bound.

    One without a heartbeat for `hang_seconds` is killed and replaced.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    log = get_logger()
    log.info("listening", on=listeners.names, passed=listeners.passed)
    wait, last_check = INTERVAL, time.monotonic()
    try:
        while True:
            now = time.monotonic()
            if now - last_check > hang_seconds / 2:
                # This process was itself suspended, perhaps with its whole container: none of them hangs.
                for child in children:
                    heartbeats.beat(child.slot)
            last_check = now
            for child in children:
                if child.pid is None and child.start_at <= now:
                    heartbeats.beat(child.slot)
                    if child.started_before:
                        heartbeats.count_restart(child.slot)
                    child.start()
                elif child.pid is not None and heartbeats.silence(child.slot) > hang_seconds:
                    log.critical("process_hung", child=child.name, child_pid=child.pid, seconds=hang_seconds)
                    heartbeats.beat(child.slot)
                    os.kill(child.pid, signal.SIGKILL)
            delayed = [c.start_at - now for c in children if c.pid is None]
            received = signal.sigtimedwait(_SIGNALS, max(0.0, min(delayed, default=wait)))
            # Not just "not None": after a suspension sigtimedwait may return noise (Python 3.11).
            if received is not None and received.si_signo in STOP_SIGNALS:
                log.info("stopping", signal=signal.Signals(received.si_signo).name)
                return
            _reap(children)
            wait = _BUSY_INTERVAL if _receive_connections(children) else INTERVAL
    finally:
        listeners.remove()
        _stop(children)


def _receive_connections(children: list[Child]) -> bool:
    """Hold the connections that workers have sent; returns whether any were opened or closed."""
    return sum(child.handoff.receive() for child in children if child.handoff is not None) > 0


def _reap(children: list[Child]) -> None:
    by_pid = {child.pid: child for child in children if child.pid is not None}
    while by_pid:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        child = by_pid.pop(pid, None)
        if child is not None:
            child.exited(os.waitstatus_to_exitcode(status))


def _stop(children: list[Child], seconds: float = _STOP_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    alive = {child.pid for child in children if child.pid is not None}
    for pid in alive:
        os.kill(pid, signal.SIGTERM)
    while alive:
        left = deadline - time.monotonic()
        if left <= 0:
            get_logger().error("children_killed", pids=sorted(alive))
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        with contextlib.suppress(ChildProcessError):
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid:
                alive.discard(pid)
                continue
        signal.sigtimedwait({signal.SIGCHLD}, min(max(left, 0.01), 1.0))
