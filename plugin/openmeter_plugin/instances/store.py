"""Instance files: keep instances on disk, so that the next server knows the ids that Kong still uses.

An event of an unknown instance has its connection closed; Kong then starts the instance and resends the
event. Nothing is lost, but thousands of events that wait during a restart would all take this detour at once.
There is one small file for each instance, mode 0600, without the API token: that is in the spool's token
file, or nowhere (`spool/destination.py`). A file that is missing, late or damaged costs no more than the
detour.

A thread of its own does all the work, so that the serving thread never waits for the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import orjson

from openmeter_plugin.config.instance_config import ConfigError, parse_config, parse_object, token_reference
from openmeter_plugin.instances.instance import Instance, Instances

_MAX_AGE_SECONDS: Final = 10_800.0  # since a server last touched the file; then it is removed
_HAD_TOKEN: Final = "had_token"  # noqa: S105 - a name
_CHECKSUM: Final = b',"crc32":'
"""Of all before it: a flipped bit in the subject would bill another customer."""
_MAX_FILE: Final = 64 * 1024 * 1024
_READ_TIMEOUT: Final = 1.0
"""Seconds that an event waits for the file of its instance if the disk hangs."""

OnContent = Callable[[bytes | None], None]
OnInstance = Callable[[Instance | None], None]


def without_token(config: bytes) -> bytes | None:
    """Return the part of Kong's configuration JSON to keep on disk; None if the configuration is invalid.

    Keeps known settings only: unknown ones might be secret.
    """
    try:
        raw = parse_object(config)
        parsed, _ = parse_config(raw)
    except ConfigError:
        return None
    kept = parsed.model_dump(mode="json", exclude={"api_token"}) | {"__plugin_id": raw.get("__plugin_id")}
    reference = token_reference(raw)
    if reference:
        kept["$refs"] = {"api_token": reference}
    content = orjson.dumps({"config": kept, _HAD_TOKEN: bool(parsed.api_token or reference)})
    return b"%b%b%d}" % (content[:-1], _CHECKSUM, zlib.crc32(content))


def parse_file(content: bytes) -> tuple[bytes, bool] | None:
    """Return a file's configuration JSON, and whether it had a token; None if the file is damaged.

    Files of 0.1.0's first servers have no checksum.
    """
    before, named, checksum = content.rpartition(_CHECKSUM)
    if named and checksum != b"%d}" % zlib.crc32(before + b"}"):
        return None
    try:
        raw = orjson.loads(content)
        config, had_token = orjson.dumps(raw["config"]), bool(raw[_HAD_TOKEN])
        parse_config(parse_object(config))
    except (orjson.JSONDecodeError, TypeError, KeyError, ConfigError):
        return None
    return config, had_token


class InstanceFiles:
    """The instance files of a spool. No method waits for the disk or raises its errors."""

    def __init__(self, spool: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._directory = spool / "instances"
        self._loop = loop
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="instance-files", daemon=True)

    def start(self) -> None:
        """Start the thread, in the serving process after any fork."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Finish the pending work within `timeout` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout)

    def save(self, instance_id: int, config: bytes) -> None:
        """Write an instance's file, for later servers."""
        self._jobs.put(lambda: self._write(instance_id, config))

    def remove(self, instance_id: int) -> None:
        """Remove an instance's file."""
        self._jobs.put(lambda: self._file(instance_id).unlink(missing_ok=True))

    def read(self, instance_id: int, on_content: OnContent) -> None:
        """Read an instance's file; `on_content` is called with its content on the event loop."""

        def read() -> None:
            content = None
            try:
                with self._file(instance_id).open("rb") as file:
                    content = file.read(_MAX_FILE)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(on_content, content)

        self._jobs.put(read)

    def sweep(self, used: Iterable[int]) -> None:
        """Touch the files of used instances, and remove those that no server has touched for long."""
        ids = tuple(used)
        self._jobs.put(lambda: self._sweep(ids))

    def _file(self, instance_id: int) -> Path:
        return self._directory / f"{instance_id}.json"

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with contextlib.suppress(OSError):
                job()

    def _write(self, instance_id: int, config: bytes) -> None:
        content = without_token(config)
        if content is None:
            return
        self._directory.mkdir(mode=0o700, exist_ok=True)
        temporary = self._directory / f".{instance_id}.{os.getpid()}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            temporary.replace(self._file(instance_id))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _sweep(self, used: Iterable[int]) -> None:
        for instance_id in used:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._file(instance_id))
        oldest = time.time() - _MAX_AGE_SECONDS
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


class InstanceFinder:
    """Restores instances from the files that an earlier server left."""

    def __init__(
        self,
        files: InstanceFiles,
        instances: Instances,
        loop: asyncio.AbstractEventLoop,
        *,
        timeout: float = _READ_TIMEOUT,
    ) -> None:
        self._files = files
        self._instances = instances
        self._loop = loop
        self._timeout = timeout
        self._callbacks: dict[int, list[OnInstance]] = {}

    def find(self, instance_id: int, on_instance: OnInstance) -> None:
        """Look for an instance; calls `on_instance` later, with None if there is no valid file in time."""
        callbacks = self._callbacks.get(instance_id)
        if callbacks is not None:
            callbacks.append(on_instance)
            return
        self._callbacks[instance_id] = [on_instance]
        timer = self._loop.call_later(self._timeout, self._restore, instance_id, None)

        def on_content(content: bytes | None) -> None:
            timer.cancel()
            self._restore(instance_id, content)

        self._files.read(instance_id, on_content)

    def _restore(self, instance_id: int, content: bytes | None) -> None:
        callbacks = self._callbacks.pop(instance_id, [])
        instance = self._instances.get(instance_id)
        if instance is None and content is not None and (parsed := parse_file(content)) is not None:
            config, had_token = parsed
            instance = self._instances.restore(instance_id, config, had_token=had_token)
        for on_instance in callbacks:
            on_instance(instance)
