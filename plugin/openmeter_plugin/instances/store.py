"""Instances on disk, so that the server that comes after this one knows the ids that Kong goes on to use.

An event for an instance that is not known has its connection closed, and Kong starts the instance and sends
the event again: nothing is lost, but thousands that wait during a restart would all go that way at once.
One small file for each instance, mode 0600, without the API token: that is in the spool's token file, or
nowhere (`destination`). A file that is missing, late or damaged costs no more than that detour.

A thread of its own does all of it: the serving thread never waits for the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Final

import orjson

from openmeter_plugin.config.instance_config import ConfigError, parse_config, parse_object, token_reference
from openmeter_plugin.instances.instance import Instance, Instances

_KEPT_SECONDS: Final = 10_800.0  # a file that no server touched for so long is removed
_KEEPS: Final = "had_token"
_LARGEST: Final = 64 * 1024 * 1024
_MAX_LOOK: Final = 1.0
"""Seconds that an event waits for the file of its instance, where the disk hangs."""

Found = Callable[[bytes | None], None]


def without_token(config: bytes) -> bytes | None:
    """Return what is kept of Kong's configuration JSON; None for one that cannot be used.

    Only settings that we know: who could tell what is secret among others.
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
    return orjson.dumps({"config": kept, _KEEPS: bool(parsed.api_token or reference)})


def restored(content: bytes) -> tuple[bytes, bool] | None:
    """Return a file's configuration JSON, and whether a token belongs to it; None where it cannot be used."""
    try:
        raw = orjson.loads(content)
        config, had_token = orjson.dumps(raw["config"]), bool(raw[_KEEPS])
        parse_config(parse_object(config))
    except (orjson.JSONDecodeError, TypeError, KeyError, ConfigError):
        return None
    return config, had_token


class InstanceFiles:
    """The instances in a spool's directory. No method waits, none raises for what the disk does."""

    def __init__(self, spool: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._directory = spool / "instances"
        self._loop = loop
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="instance-files", daemon=True)

    def start(self) -> None:
        """Start the thread; in the process that serves, after any fork."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Finish what was begun, within `timeout` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout)

    def keep(self, instance_id: int, config: bytes) -> None:
        """Have an instance known to servers to come."""
        self._jobs.put(lambda: self._write(instance_id, config))

    def forget(self, instance_id: int) -> None:
        """Have it known no more."""
        self._jobs.put(lambda: self._file(instance_id).unlink(missing_ok=True))

    def find(self, instance_id: int, found: Found) -> None:
        """Look for an instance; `found` gets the file's content on the event loop."""

        def look() -> None:
            content = None
            try:
                with self._file(instance_id).open("rb") as file:
                    content = file.read(_LARGEST)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(found, content)

        self._jobs.put(look)

    def sweep(self, used: Iterable[int]) -> None:
        """Touch what was used, and remove what no server has touched for long."""
        numbers = tuple(used)
        self._jobs.put(lambda: self._sweep(numbers))

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
        oldest = time.time() - _KEPT_SECONDS
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


class InstanceFinder:
    """Takes instances over from the files that an earlier server left."""

    def __init__(self, files: InstanceFiles, instances: Instances, loop: asyncio.AbstractEventLoop) -> None:
        self._files = files
        self._instances = instances
        self._loop = loop
        self._waiting: dict[int, list[Callable[[Instance | None], None]]] = {}

    def find(self, instance_id: int, tell: Callable[[Instance | None], None]) -> None:
        """Look for an instance; `tell` is called later, with None where there is nothing that can be used."""
        waiting = self._waiting.get(instance_id)
        if waiting is not None:
            waiting.append(tell)
            return
        self._waiting[instance_id] = [tell]
        limit = self._loop.call_later(_MAX_LOOK, self._found, instance_id, None)

        def found(content: bytes | None) -> None:
            limit.cancel()
            self._found(instance_id, content)

        self._files.find(instance_id, found)

    def _found(self, instance_id: int, content: bytes | None) -> None:
        waiting = self._waiting.pop(instance_id, [])
        instance = self._instances.get(instance_id)
        if instance is None and content is not None and (known := restored(content)) is not None:
            config, had_token = known
            instance = self._instances.restore(instance_id, config, had_token=had_token)
        for tell in waiting:
            tell(instance)
