"""One writer at a time: a lock on a file of the state directory, held by a run from plan to last change.

The kernel frees it when its holder dies, however it dies. It keeps apart what shares a state
directory; several machines must be kept apart by running one daemon (see docs/syncd.md).
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from syncd.core.errors import LockedError

_FILE = "syncd.lock"
_POLL_SECONDS = 0.1


@contextmanager
def write_lock(
    state_dir: Path,
    who: str,
    *,
    patience: float = 60.0,
    should_stop: Callable[[], bool] = lambda: False,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[None]:
    """Hold the lock; waits `patience` seconds for another holder, then raises LockedError that names it."""
    path = state_dir / _FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise LockedError(
            f"cannot use the state directory {state_dir} (daemon.state_dir): {error.strerror}"
        ) from None
    with file:
        deadline = time.monotonic() + patience
        while not _taken(file):
            if should_stop() or time.monotonic() >= deadline:
                raise LockedError(
                    f"another syncd is writing: {_holder(path)}. Wait for its end, or stop it;"
                    f" the lock is {path}"
                )
            sleep(_POLL_SECONDS)
        _sign(file, who)
        try:
            yield
        finally:
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(file: IO[str], who: str) -> None:
    file.truncate(0)
    holder = {"who": who, "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    file.write(json.dumps(holder))
    file.flush()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"{holder['who']} (process {holder['pid']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "one that has not said who it is"
