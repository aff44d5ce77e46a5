"""The supervisor: holds the listening socket and keeps the processes behind it alive.

The socket outlives every worker: while one is replaced, Kong's connections wait in the backlog instead of
being refused, and those that were open stay so (`kept`). It does nothing else, so there is nothing in it that
could fail. One thread, so that forking is safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, NoReturn

from openmeter_plugin.log import configure_logging, get_logger
from openmeter_plugin.process.handoff import Kept
from openmeter_plugin.process.heartbeat import INTERVAL, Heartbeats
from openmeter_plugin.process.sockets import STOP_SIGNALS, Listeners

_STOP_SECONDS: Final = 12.0  # for the children together, then they are killed
_SHORT_LIFE: Final = 1.0  # seconds; a child that dies sooner is started again with a delay
_MAX_DELAY: Final = 1.0
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_SOON: Final = 0.05  # seconds until the next look, while connections come and go
_SIGNALS: Final = STOP_SIGNALS | {signal.SIGCHLD}


class Child:
    """A process to keep alive: what it runs, and when it may be started again.

    `slot` is where it gives its signs of life; its connections are `kept` for the one that takes its place.
    """

    def __init__(self, name: str, run: Callable[[], None], slot: int, kept: Kept | None = None) -> None:
        self.name = name
        self.run = run
        self.slot = slot
        self.kept = kept
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

    def died(self, status: int) -> None:
        """Note the end of the process; it is started again at once unless it keeps dying."""
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
    """Have this process stop when its parent is gone, even by kill -9, and end soon after in any case.

    It answers Kong for what is under way first, which a kill would lose.
    """
    if sys.platform == "linux":
        watched = _watch(parent)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM if watched else signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(os.EX_OK)


def _watch(parent: int) -> bool:
    """Have a thread end this process some time after its parent; returns whether that is possible here."""
    try:
        descriptor = os.pidfd_open(parent)
    except OSError:  # an old kernel, or a sandbox that does not permit it
        return False

    def outlive() -> None:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll()
        time.sleep(_STOP_SECONDS)
        os._exit(os.EX_SOFTWARE)

    threading.Thread(target=outlive, name="orphan", daemon=True).start()
    return True


def supervise(
    children: list[Child], listeners: Listeners, heartbeats: Heartbeats, hang_seconds: float
) -> None:
    """Keep the children alive until SIGTERM or SIGINT, then stop them within a bound.

    One without a sign of life for `hang_seconds` is killed, and so replaced.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    log = get_logger()
    log.info("listening", on=listeners.names, passed=listeners.passed)
    wait, looked = INTERVAL, time.monotonic()
    try:
        while True:
            now = time.monotonic()
            if now - looked > hang_seconds / 2:  # stopped, with all of a container perhaps: they hang no more
                for child in children:
                    heartbeats.beat(child.slot)
            looked = now
            for child in children:
                if child.pid is None and child.start_at <= now:
                    heartbeats.beat(child.slot)
                    if child.started_before:
                        heartbeats.restarted(child.slot)
                    child.start()
                elif child.pid is not None and heartbeats.silence(child.slot) > hang_seconds:
                    log.critical("process_hangs", child=child.name, child_pid=child.pid, seconds=hang_seconds)
                    heartbeats.beat(child.slot)
                    os.kill(child.pid, signal.SIGKILL)
            delayed = [c.start_at - now for c in children if c.pid is None]
            received = signal.sigtimedwait(_SIGNALS, max(0.0, min(delayed, default=wait)))
            # Not merely "not None": a process that was stopped for a while is given noise (Python 3.11).
            if received is not None and received.si_signo in STOP_SIGNALS:
                log.info("stopping", signal=signal.Signals(received.si_signo).name)
                return
            _reap(children)
            wait = _SOON if _take_in(children) else INTERVAL
    finally:
        listeners.remove()
        _stop(children)


def _take_in(children: list[Child]) -> bool:
    """Hold the connections that are new; returns whether some came or went."""
    return sum(child.kept.take_in() for child in children if child.kept is not None) > 0


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
            child.died(os.waitstatus_to_exitcode(status))


def _stop(children: list[Child]) -> None:
    deadline = time.monotonic() + _STOP_SECONDS
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
