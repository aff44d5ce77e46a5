"""Write lock: a lock on a file of the state directory, held by a run from its plan to its last change.

The kernel releases it when the holder dies, however it dies. It excludes processes that share a state
directory. On several machines, run only one daemon (see docs/syncd.md).
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
from typing import IO

from syncd.core.errors import LockedError

_FILE = "syncd.lock"
_POLL_SECONDS = 0.1


@contextmanager
def write_lock(
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


def is_locked(state_dir: Path) -> bool:
    """Return whether a process holds the lock."""
    try:
        with (state_dir / _FILE).open("r", encoding="utf-8") as file:
            return not _try_lock(file)
    except OSError:
        return False


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
