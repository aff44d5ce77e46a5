"""Write lock: held by a run from its plan to its last change, so that one process at a time writes.

With a state in SQLite it is a lock on a file of the state directory, which the kernel releases when the
holder dies, however it dies. It excludes processes that share that directory. With a state in PostgreSQL it
is the lease `writer` (`syncd.state.lease`), which excludes all that share the database.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING

from syncd.core.errors import LockedError
from syncd.http.retry import Permit, unlimited

if TYPE_CHECKING:
    from syncd.runs.history import History
    from syncd.state.database import State
    from syncd.state.lease import Lease

_FILE = "syncd.lock"
_POLL_SECONDS = 0.1
_LEASE_POLL_SECONDS = 0.5


@contextmanager
def write_lock(
    state: State,
    holder: str,
    *,
    patience: float = 60.0,
    should_stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[Permit]:
    """Hold the lock. Waits up to `patience` seconds, then raises LockedError with the name of the holder.

    Yields what to call before each change: a lease may be lost while it is held.
    """
    if state.where.url is None:
        folder = state.where.folder
        with file_lock(folder, holder, patience=patience, should_stop=should_stop, sleep=sleep):
            yield unlimited  # the kernel takes it from a process only with its end
        return
    from syncd.state.lease import Lease, LeaseName

    lease = Lease(state, LeaseName.WRITER, holder)
    try:
        _await(lease, state, patience, should_stop, sleep)
        yield lease.require
    finally:
        lease.release()


def _await(
    lease: Lease,
    state: State,
    patience: float,
    should_stop: Callable[[], bool],
    sleep: Callable[[float], object],
) -> None:
    """Wait for the lease, and until the holder before can no longer act; raises LockedError."""
    from syncd.state.lease import LeaseName, holder_of

    deadline = time.monotonic() + patience
    while not lease.try_acquire():
        if should_stop() or time.monotonic() >= deadline:
            who = holder_of(state, LeaseName.WRITER) or "an unknown process"
            raise LockedError(f"another syncd is writing: {who}. Wait for it to finish, or stop it")
        sleep(_LEASE_POLL_SECONDS)
    end = time.monotonic() + lease.wait
    while (left := end - time.monotonic()) > 0:
        if should_stop():
            raise LockedError("stopped by request while the writer before it may still write")
        sleep(min(left, _LEASE_POLL_SECONDS))
    lease.waited = True


def close_interrupted(state: State, history: History) -> None:
    """Mark runs as failed whose process is gone, unless a process holds the lock."""
    if state.where.url is not None:
        history.close_interrupted(unless_locked=True)
        return
    with suppress(LockedError), file_lock(state.where.folder, "syncd history", patience=0):
        history.close_interrupted()


@contextmanager
def file_lock(
    state_dir: Path,
    holder: str,
    *,
    patience: float = 60.0,
    should_stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[None]:
    """Hold the lock. Waits up to `patience` seconds, then raises LockedError with the name of the holder."""
    path = state_dir / _FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise _unusable(state_dir, error) from None
    with file:
        deadline = time.monotonic() + patience
        while not _try_lock(file):
            if should_stop() or time.monotonic() >= deadline:
                raise LockedError(
                    f"another syncd is writing: {_read_holder(path)}. Wait for it to finish, or stop it;"
                    f" the lock file is {path}"
                )
            sleep(_POLL_SECONDS)
        try:
            _write_holder(file, holder)
        except OSError as error:
            with suppress(OSError):
                file.close()  # would try to write again
            raise _unusable(state_dir, error) from None
        try:
            yield
        finally:
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)


def _unusable(state_dir: Path, error: OSError) -> LockedError:
    return LockedError(
        f"cannot use the state directory {state_dir} (daemon.state_dir), so nothing was changed:"
        f" {error.strerror}"
    )


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write_holder(file: IO[str], holder: str) -> None:
    file.truncate(0)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(json.dumps({"who": holder, "pid": os.getpid(), "since": since}))
    file.flush()


def _read_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"{holder['who']} (process {holder['pid']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"
