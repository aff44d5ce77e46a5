"""What Kong asks of instances: to start one, to close one, and whether the one of an event is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from openmeter_plugin import wire
from openmeter_plugin.instance_files import InstanceFiles, InstanceFinder
from openmeter_plugin.instances import Instance, Instances, started_at
from openmeter_plugin.peers import Peers


class Caller(Protocol):
    """The connection that Kong asks on."""

    under_way: bool
    finish: Callable[[bytes], None]

    @property
    def is_open(self) -> bool:
        """Whether neither side has closed it."""

    def begin(self, sequence: bytes, instance: Instance) -> None:
        """Begin an event."""

    def refuse(self, instance_id: int) -> None:
        """Have Kong start the instance and send its event again."""


class InstanceCalls:
    """Starts, finds and closes instances, together with the other workers and the servers to come."""

    def __init__(
        self,
        instances: Instances,
        loop: asyncio.AbstractEventLoop,
        peers: Peers | None,
        files: InstanceFiles | None,
    ) -> None:
        self._instances = instances
        self._loop = loop
        self._peers = peers
        self._files = files
        self._finder = InstanceFinder(files, instances, loop) if files is not None else None
        self._starting: set[asyncio.Task[None]] = set()

    def start(self, call: wire.StartInstance, caller: Caller) -> None:
        """Start an instance and answer, once the other workers know it too."""
        instance = self._instances.start(call.config)
        if self._files is not None:
            self._files.keep(instance.id, call.config)
        status = wire.encode_instance_status(call.sequence, call.name, instance.id, started_at())
        if self._peers is None:
            caller.finish(status)
            return
        peers = self._peers
        caller.under_way = True

        async def announce() -> None:
            await peers.announce(instance.id, call.config)
            caller.under_way = False
            caller.finish(status)

        task = self._loop.create_task(announce())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    def find(self, instance_id: int, caller: Caller, sequence: bytes) -> None:
        """Have an event of an instance that is not known here wait until we know what others left of it."""

        def found(instance: Instance | None) -> None:
            caller.under_way = False
            if not caller.is_open:
                return
            if instance is None:
                caller.refuse(instance_id)
            else:
                caller.begin(sequence, instance)

        caller.under_way = True
        if self._finder is None:
            found(None)
        else:
            self._finder.find(instance_id, found)

    def close(self, instance_id: int) -> None:
        """Close an instance, here and with the other workers."""
        self._instances.close(instance_id)
        if self._files is not None:
            self._files.forget(instance_id)
        if self._peers is not None:
            self._peers.announce_close(instance_id)
