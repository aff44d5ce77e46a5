"""Configurations that Kong's workers put into the folder: one file for each, named by a hash of the settings.

An id never means two configurations, whatever crashes, reloads or upgrades came in between. A damaged file
counts as missing, and the records that name it wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from openmeter_plugin.instances.instance import MAX_INSTANCES, Instance, start_instance
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.segments.folder import Directory
from openmeter_plugin.segments.line_format import INSTANCE_NAME, UNFINISHED_NAME, parse_instance
from openmeter_plugin.spool.destination import Destination
from openmeter_plugin.spool.queue import SpoolQueue
from openmeter_plugin.spool.writer import SpoolWriter

_MAX_FILE: Final = 1024 * 1024
_MISSING_SECONDS: Final = 0.2  # until a missing file is looked for again
_UNUSED_SECONDS: Final = 3600.0
"""A worker marks a file as used, or writes it again, in each new segment that needs it."""


class InstanceDirectory:
    """The instances of the files in the folder."""

    def __init__(self, writer: SpoolWriter) -> None:
        self._writer = writer
        self._instances: dict[str, Instance] = {}
        self._missing: dict[str, float] = {}
        self._created: dict[str, int] = {}  # by id
        self._described: dict[str, int] = {}  # by destination, when its configuration was created
        self._known: dict[str, int] = {}  # by id, the time of the file's last change
        self._limit = RateLimit()

    def get(self, files: Directory, name: str) -> Instance | None:
        """Return the instance with this id; None if there is no valid file for it now."""
        instance = self._instances.get(name)
        if instance is not None:
            return instance
        now = time.monotonic()
        if now < self._missing.get(name, 0.0):
            return None
        instance = self._load(files, name)
        if instance is None:
            if len(self._missing) >= MAX_INSTANCES:
                self._missing.clear()
            self._missing[name] = now + _MISSING_SECONDS
        return instance

    def refresh(self, files: Directory, beat: Callable[[], None]) -> None:
        """Load the files that are new or written again, oldest first; raises OSError. `beat` is called often.

        A new token takes effect although no request has come with it, and the backlog of an earlier
        configuration does not bring an earlier token back.
        """
        changed: list[str] = []
        for entry in files.names():
            match = INSTANCE_NAME.fullmatch(entry)
            if match is not None and len(changed) < MAX_INSTANCES:
                status = files.status(entry)
                if status is not None and self._known.get(match["id"]) != status.st_mtime_ns:
                    changed.append(match["id"])
        for name in sorted(changed, key=lambda name: self._created_of(files, name)):
            self._load(files, name)
            beat()

    def remove_unused(self, files: Directory) -> None:
        """Remove files that no worker has used for long; only while no segment has unread lines.

        Raises OSError. An instance stays in memory, should a worker mark its file just now.
        """
        oldest = time.time() - _UNUSED_SECONDS
        for entry in list(files.names())[:MAX_INSTANCES]:
            status = files.status(entry)
            if status is None or max(status.st_mtime, status.st_atime) >= oldest:
                continue
            if INSTANCE_NAME.fullmatch(entry) or UNFINISHED_NAME.fullmatch(entry):
                files.remove(entry)

    def _created_of(self, files: Directory, name: str) -> int:
        file = files.read(f"{name}.json", _MAX_FILE)
        configuration = None if file is None else parse_instance(file.content, name)
        return 0 if configuration is None else configuration.created

    def _load(self, files: Directory, name: str) -> Instance | None:
        try:
            file = files.read(f"{name}.json", _MAX_FILE)
        except OSError as error:
            self._report(name, error.strerror or str(error))
            return None
        if file is None:
            return None
        configuration = parse_instance(file.content, name)
        if configuration is None:
            self._report(name, "the file is damaged")
            return None
        self._known[name] = file.changed
        created, known = configuration.created, self._created.get(name)
        if known is not None and known >= created and (instance := self._instances.get(name)) is not None:
            return instance  # only marked as used

        def describe(destination: Destination) -> SpoolQueue:
            if created < self._described.get(destination.id, 0):
                return self._writer.queue(destination.id)
            self._described[destination.id] = created
            return self._writer.describe(destination)

        instance = start_instance(0, configuration.config, self._writer, name=name, describe=describe)
        self._instances[name], self._created[name] = instance, created
        self._missing.pop(name, None)
        if len(self._instances) > MAX_INSTANCES:
            oldest = next(iter(self._instances))
            del self._instances[oldest], self._created[oldest]
        return instance

    def _report(self, name: str, reason: str) -> None:
        if self._limit.passes():
            get_logger().error(
                "instance_file_unusable",
                instance=name,
                reason=reason,
                consequence="the requests of this configuration wait in their segments",
                remedy="reload Kong: it writes the file again",
            )
