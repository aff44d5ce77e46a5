"""The supervisor: holds the listening sockets and keeps the other processes alive.

The sockets outlive every worker: while one is replaced, Kong's new connections wait in the socket's queue
instead of being refused, and open ones stay open (`handoff`). The supervisor does nothing else, so there is
little in it that can fail. It has one thread, so that forking is safe.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import mmap
import os
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

from openmeter_plugin.log import configure_logging, get_logger
from openmeter_plugin.process.handoff import Handoff
from openmeter_plugin.process.sockets import STOP_SIGNALS, Listeners
from openmeter_plugin.process.systemd import Notifier

_SLOT: Final = struct.Struct("<dQQ")
_TIME: Final = struct.Struct("<d")
_NUMBER: Final = struct.Struct("<Q")
INTERVAL: Final = 0.5  # seconds between two heartbeats


class Heartbeats:
    """Heartbeats, by which the supervisor detects a hung child process; created before the forks.

    The processes share a page of memory with one slot per child process. The child's event loop writes the
    time into its slot, and the supervisor reads it: CLOCK_MONOTONIC, which is the same in all processes and
    never jumps. In the same slot the supervisor counts restarts, for the metrics, and notes the pid.
    """

    def __init__(self, slots: int) -> None:
        self._memory = mmap.mmap(-1, slots * _SLOT.size)
        self._slots = slots

    def beat(self, slot: int) -> None:
        """Write a heartbeat."""
        _TIME.pack_into(self._memory, slot * _SLOT.size, time.monotonic())

    def last(self, slot: int) -> float:
        """Return when the last heartbeat was, by `time.monotonic`."""
        return float(self._read(slot)[0])

    def silence(self, slot: int) -> float:
        """Return the seconds since the last heartbeat."""
        return time.monotonic() - self.last(slot)

    def count_restart(self, slot: int) -> None:
        """Count a restart; called by the supervisor."""
        _NUMBER.pack_into(self._memory, slot * _SLOT.size + _TIME.size, self.restarts(slot) + 1)

    def restarts(self, slot: int) -> int:
        """Return how often the child process was restarted."""
        return int(self._read(slot)[1])

    def set_pid(self, slot: int, pid: int) -> None:
        """Note the child process's pid, 0 for none; called by the supervisor."""
        _NUMBER.pack_into(self._memory, slot * _SLOT.size + _TIME.size + _NUMBER.size, pid)

    def pids(self) -> list[int]:
        """Return the pids of all child processes that the supervisor has running."""
        return [pid for slot in range(self._slots) if (pid := int(self._read(slot)[2]))]

    def _read(self, slot: int) -> tuple[Any, ...]:
        return _SLOT.unpack_from(self._memory, slot * _SLOT.size)

    async def keep_beating(self, slot: int) -> None:
        """Write heartbeats for as long as the event loop runs."""
        while True:
            self.beat(slot)
            await asyncio.sleep(INTERVAL)


_STOP_SECONDS: Final = 12.0  # for all child processes together; then they are killed
SUCCESSOR_SECONDS: Final = 4.0
"""How long a worker whose supervisor was killed serves on, for the next server to take its socket over."""
_ORPHAN_SECONDS: Final = _STOP_SECONDS + SUCCESSOR_SECONDS
"""How long child processes live on at most after their supervisor was killed."""
_SHORT_LIFE: Final = 1.0  # seconds; a child process that ends sooner is restarted with a delay
_MIN_DELAY: Final = 0.05
_MAX_DELAY: Final = 1.0
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_BUSY_INTERVAL: Final = 0.05  # seconds until the next check, while connections come and go
_SIGNALS: Final = STOP_SIGNALS | {signal.SIGCHLD}
_DUMP_SIGNAL: Final = signal.SIGUSR2
_DUMP_SECONDS: Final = 0.5
_MAX_DUMP: Final = 65536


def restart_delay(previous: float, lived: float) -> float:
    """Return the seconds until a restart: none, unless the process keeps ending soon after its start."""
    return min(max(_MIN_DELAY, previous * 2), _MAX_DELAY) if lived < _SHORT_LIFE else 0.0


class Child:
    """A child process to keep alive: what it runs, and when it may be restarted.

    `slot` is that of its heartbeats. `handoff` holds its connections for its successor.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[], None],
        slot: int,
        handoff: Handoff | None = None,
        *,
        orphan_seconds: float = _ORPHAN_SECONDS,
    ) -> None:
        self.name = name
        self.run = run
        self.slot = slot
        self.handoff = handoff
        self.pid: int | None = None
        self.start_at = 0.0
        self.started = 0.0
        self._orphan_seconds = orphan_seconds
        self._delay = 0.0
        self._stacks = os.memfd_create(f"openmeter-{name}-stacks", os.MFD_CLOEXEC)

    def start(self, heartbeats: Heartbeats) -> None:
        """Fork and run; returns in the parent only."""
        if self.started:
            heartbeats.count_restart(self.slot)
        heartbeats.beat(self.slot)
        os.ftruncate(self._stacks, 0)
        self.started = time.monotonic()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._run_child(parent, heartbeats)
        self.pid = pid
        heartbeats.set_pid(self.slot, pid)

    def exited(self, status: int, heartbeats: Heartbeats) -> None:
        """Note that the process ended, and schedule its restart."""
        lived = time.monotonic() - self.started
        self._delay = restart_delay(self._delay, lived)
        self.start_at = time.monotonic() + self._delay
        get_logger().error(
            "process_ended", child=self.name, child_pid=self.pid, exit_status=status, lived=round(lived, 3)
        )
        self.pid = None
        heartbeats.set_pid(self.slot, 0)

    def replace_hung(self, seconds: float) -> None:
        """Kill the process because it hangs, after the log has where each of its threads is."""
        if self.pid is None:
            return
        log = get_logger().bind(child=self.name, child_pid=self.pid)
        stacks = self._dump_stacks(self.pid)
        # Stopped (T) or waiting for a disk (D), it cannot write its stacks.
        log.critical("process_hung", seconds=seconds, state=_state_of(self.pid), threads=len(stacks))
        for stack in stacks:
            log.critical("hung_thread", stack=stack)
        os.kill(self.pid, signal.SIGKILL)

    def _dump_stacks(self, pid: int) -> list[str]:
        """Have the process write the stacks of its threads, and return them; empty if it does not in time."""
        os.kill(pid, _DUMP_SIGNAL)
        deadline = time.monotonic() + _DUMP_SECONDS
        written = 0
        while time.monotonic() < deadline:
            before, written = written, os.fstat(self._stacks).st_size
            if written and written == before:
                break
            time.sleep(0.02)
        dump = os.pread(self._stacks, _MAX_DUMP, 0).decode("utf-8", "replace")
        return [stack for stack in dump.split("\n\n") if stack.strip()]

    def _run_child(self, parent: int, heartbeats: Heartbeats) -> NoReturn:
        status = os.EX_SOFTWARE
        try:
            # Works even if a thread never gives up the interpreter's lock.
            faulthandler.register(_DUMP_SIGNAL, file=self._stacks, all_threads=True)
            end_with_parent(parent, heartbeats, self._orphan_seconds)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            configure_logging(self.name)
            self.run()
            status = os.EX_OK
        except BaseException:
            get_logger().critical("process_crashed", exc_info=True)
        finally:
            os._exit(status)


def _state_of(pid: int) -> str:
    """Return a process's state as one letter (proc(5)), `?` if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return "?"


def end_with_parent(parent: int, heartbeats: Heartbeats, seconds: float = _ORPHAN_SECONDS) -> None:
    """Stop this process when its parent is gone, even by kill -9, and end it soon after in any case.

    It gets SIGTERM if possible, so that it answers Kong's calls under way; SIGKILL would lose them.
    """
    if sys.platform == "linux":
        watched = _exit_after(parent, heartbeats, seconds)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM if watched else signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call to prctl
        os._exit(os.EX_OK)


def _exit_after(parent: int, heartbeats: Heartbeats, seconds: float) -> bool:
    """Start a thread that ends this process some time after its parent; False if that is impossible.

    A sibling that is stopped or stuck has no such thread that runs. Kong would wait for its answers until
    they time out after 60 s, and lose those events: so it is continued, and then killed.
    """
    try:
        descriptor = os.pidfd_open(parent)
    except OSError:  # an old kernel, or a sandbox that forbids it
        return False

    def wait_and_exit() -> None:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll()
        siblings = list(_open_processes(heartbeats.pids()))
        _send(siblings, signal.SIGCONT)
        time.sleep(seconds)
        _send(siblings, signal.SIGKILL)
        os._exit(os.EX_SOFTWARE)

    threading.Thread(target=wait_and_exit, name="orphan", daemon=True).start()
    return True


def _open_processes(pids: Iterable[int]) -> Iterator[int]:
    """Yield a pidfd for each process but this one: a pid may be another's by the time it is used."""
    for pid in pids:
        if pid != os.getpid():
            with contextlib.suppress(OSError):
                yield os.pidfd_open(pid)


def _send(processes: Iterable[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(process, number)


def supervise(
    children: list[Child], listeners: Listeners, heartbeats: Heartbeats, hang_seconds: float
) -> None:
    """Keep the child processes alive until SIGTERM or SIGINT, then stop them within a bound.

    One without a heartbeat for `hang_seconds` is killed and replaced. A service manager is notified when all
    of them work, that this process runs, and that it stops.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    notifier = Notifier()
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
                    child.start(heartbeats)
                elif child.pid is not None and heartbeats.silence(child.slot) > hang_seconds:
                    heartbeats.beat(child.slot)
                    child.replace_hung(hang_seconds)
            notifier.alive()
            if not notifier.is_ready and all(heartbeats.last(c.slot) > c.started > 0 for c in children):
                notifier.ready()
            delayed = [c.start_at - now for c in children if c.pid is None]
            received = signal.sigtimedwait(_SIGNALS, max(0.0, min(delayed, default=wait)))
            # Not just "not None": after a suspension sigtimedwait may return noise (Python 3.11).
            if received is not None and received.si_signo in STOP_SIGNALS:
                log.info("stopping", signal=signal.Signals(received.si_signo).name)
                return
            _reap(children, heartbeats)
            busy = _receive_connections(children) or not notifier.is_ready
            wait = _BUSY_INTERVAL if busy else INTERVAL
    finally:
        notifier.stopping()
        listeners.remove()
        stop_all(children)


def _receive_connections(children: list[Child]) -> bool:
    """Hold the connections that workers have sent; returns whether any were opened or closed."""
    return sum(child.handoff.receive() for child in children if child.handoff is not None) > 0


def _reap(children: list[Child], heartbeats: Heartbeats) -> None:
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
            child.exited(os.waitstatus_to_exitcode(status), heartbeats)


def stop_all(children: list[Child], seconds: float = _STOP_SECONDS) -> None:
    """End the child processes, and kill those that have not ended in time."""
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
