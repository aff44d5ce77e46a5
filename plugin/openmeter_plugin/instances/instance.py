"""Plugin instances that Kong has started, and their ids."""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from openmeter_plugin.config.instance_config import (
    ConfigError,
    PluginConfig,
    ineffective_queue_keys,
    parse_config,
    parse_object,
    token_reference,
)
from openmeter_plugin.log import get_logger
from openmeter_plugin.metering.rules import Rules
from openmeter_plugin.spool.destination import QUARANTINE, Destination, destination_id
from openmeter_plugin.spool.queue import SpoolQueue
from openmeter_plugin.spool.writer import SpoolWriter

_MAX_ID: Final = 2**31 - 1  # the protocol's int32
_BLOCK_SIZE: Final = 4096  # ids reserved at a time
MAX_INSTANCES: Final = 10_000
_MAX_POSTS: Final = 4  # concurrent POSTs to one destination; "unlimited" means this number


@dataclass(frozen=True, slots=True)
class Instance:
    """A plugin instance: the rules of its configuration and the queue of its records.

    `rules` is None if the configuration is invalid; then `fault` says why, and `queue` is the quarantine.
    `quarantine` is None if the rules never quarantine a request.
    """

    id: int
    queue: SpoolQueue
    rules: Rules | None
    fault: str | None = None
    quarantine: SpoolQueue | None = None


class InstanceIds:
    """Iterator of ids that no process with this spool has ever assigned.

    Kong keeps an id after the process that assigned it has ended. If a new process assigned it again, to
    another configuration, Kong's events would be billed under that one (measured with kong-pdk, which
    counts from 0). `reserve` reserves blocks of ids in a file ahead of their use. If the file cannot be
    written, a random block of the 2^31 ids is as good as unique.
    """

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._ids: Iterator[int] = iter(())
        self._left = 0
        self._lock = threading.Lock()
        self.reserve()

    def __next__(self) -> int:
        """Return an id. Does not access the disk."""
        with self._lock:
            if not self._left:
                self._use(_random_block())
            self._left -= 1
            return next(self._ids)

    def reserve(self) -> None:
        """Reserve more ids if few are left; call it where waiting for the disk does no harm."""
        if self._left < _BLOCK_SIZE // 4:
            first = _reserve_block(self._spool)
            with self._lock:
                self._use(first)

    def _use(self, first: int) -> None:
        self._ids, self._left = iter(range(first, first + _BLOCK_SIZE)), _BLOCK_SIZE


def _random_block() -> int:
    return 1 + secrets.randbelow(_MAX_ID // _BLOCK_SIZE - 1) * _BLOCK_SIZE


def _reserve_block(spool: Path) -> int:
    # Random at first: with a new spool under a running Kong, counting from 1 would repeat ids.
    random_first = _random_block()
    try:
        descriptor = os.open(spool / "instance-ids", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return random_first
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        first = _parse_next_id(os.pread(descriptor, 32, 0)) or random_first
        if first > _MAX_ID - 2 * _BLOCK_SIZE:
            first = 1
        number = b"%010d" % (first + _BLOCK_SIZE)
        os.pwrite(descriptor, b"%b %08x\n" % (number, zlib.crc32(number)), 0)
    except OSError:
        return random_first
    else:
        return first
    finally:
        os.close(descriptor)


def _parse_next_id(content: bytes) -> int | None:
    """Return the number in the file of reserved ids; None if it is damaged, so that no id is assigned twice.

    Files of 0.1.0's first servers have no checksum.
    """
    number, *checksum = content.split()[:2] or [b""]
    if not number.isdigit() or (checksum and checksum != [b"%08x" % zlib.crc32(number)]):
        return None
    return int(number)


class Instances:
    """Starts, finds and closes instances. Starting never fails and never waits for the disk."""

    def __init__(self, ids: InstanceIds, writer: SpoolWriter, *, limit: int = MAX_INSTANCES) -> None:
        self._ids = ids
        self._writer = writer
        self._limit = limit
        self._instances: dict[int, Instance] = {}
        self._used: set[int] = set()
        self._log = get_logger()

    def __len__(self) -> int:
        return len(self._instances)

    def start(self, config: bytes) -> Instance:
        """Start an instance; if its configuration is invalid, its requests go to the quarantine."""
        return self.adopt(next(self._ids), config)

    def adopt(self, instance_id: int, config: bytes) -> Instance:
        """Add an instance that another worker has started under this id."""
        return self._add(start_instance(instance_id, config, self._writer))

    def restore(self, instance_id: int, config: bytes, *, had_token: bool) -> Instance:
        """Add an instance that an earlier server has started; its token stays the one left on disk."""
        return self._add(start_instance(instance_id, config, self._writer, had_token=had_token))

    @property
    def used(self) -> frozenset[int]:
        """The ids that Kong has used since the last `forget_unused`."""
        return frozenset(self._used)

    def _add(self, instance: Instance) -> Instance:
        self._instances[instance.id] = instance
        if len(self._instances) > self._limit:
            self.close(next(iter(self._instances)))  # if it is in use, its next event finds it on disk
        self._used.add(instance.id)
        return instance

    def get(self, instance_id: int) -> Instance | None:
        """Return the instance, or None if it is unknown here."""
        self._used.add(instance_id)
        return self._instances.get(instance_id)

    def close(self, instance_id: int) -> None:
        """Forget the instance. An unknown id is no error: Kong closes some after a restart of this server."""
        if self._instances.pop(instance_id, None) is not None:
            self._log.info("instance_closed", instance=instance_id)

    def forget_unused(self) -> None:
        """Forget the instances without an event since the last call.

        Kong does not close an instance whose plugin was removed. Forgetting one that was only idle does no
        harm: its next event closes the connection, and Kong starts it again.
        """
        for instance_id in self._instances.keys() - self._used:
            del self._instances[instance_id]
            self._log.info("instance_aged_out", instance=instance_id)
        self._used.clear()


def start_instance(
    instance_id: int,
    config: bytes,
    writer: SpoolWriter,
    *,
    had_token: bool = False,
    name: str = "",
    describe: Callable[[Destination], SpoolQueue] | None = None,
) -> Instance:
    """Return an instance of Kong's configuration JSON, valid or not; logs which. Never raises.

    With `had_token`, the token is missing from the configuration and the last one stays in use. The log shows
    `name` if the instance has one. `describe` returns a destination's queue, by default after its description
    is written.
    """
    log = get_logger().bind(instance=name or instance_id)
    raw: dict[str, Any] = {}
    try:
        raw = parse_object(config)
        parsed, rules = parse_config(raw)
    except Exception as error:
        fault = str(error) if isinstance(error, ConfigError) else f"unexpected {type(error).__name__}"
        log.critical(
            "configuration_unusable",
            plugin=raw.get("__plugin_id"),
            reason=fault,
            consequence="requests are kept in the spool's quarantine and no events are delivered",
        )
        return Instance(instance_id, writer.queue(QUARANTINE), None, fault)
    ineffective = ineffective_queue_keys(raw)
    if ineffective:
        log.warning(
            "queue_keys_without_effect",
            keys=ineffective,
            reason="in Kong's queue they drop events; the plugin never drops undelivered events",
        )
    if parsed.ineffective_attributes:
        log.warning(
            "attributes_without_effect",
            properties=parsed.ineffective_attributes,
            reason="the plugin sets these properties itself",
            remedy="choose another event_property_name",
        )
    destination = destination_of(raw, parsed)
    log.info("instance_started", plugin=raw.get("__plugin_id"), destination=destination.id)
    if had_token:
        came_from = destination.token_from or "api_token"
        destination = replace(destination, token_unresolved=True, token_from=came_from)
    elif destination.token_unresolved:
        log.error(
            "token_not_resolved",
            destination=destination.id,
            reference=destination.token_from,
            consequence="the last token is used; if there was none, the events wait",
            remedy="put the secret where Kong runs; {vault://env/a-b} is the variable A_B of its environment",
        )
    quarantine = writer.queue(QUARANTINE) if rules.missing == "quarantine" else None
    queue = (describe or writer.describe)(destination)
    return Instance(instance_id, queue, rules, quarantine=quarantine)


def destination_of(raw: dict[str, Any], config: PluginConfig) -> Destination:
    """Return the destination of a configuration's events; `raw` is the configuration as Kong passes it."""
    reference = token_reference(raw)
    has_token = config.api_token is not None
    credential = reference or raw.get("__plugin_id") or ""
    return Destination(
        id=destination_id(config.ingest_endpoint, str(credential)),
        endpoint=config.ingest_endpoint,
        timeout=config.timeout / 1000,
        keepalive=config.keepalive / 1000,
        ssl_verify=config.ssl_verify,
        max_batch_size=config.queue.max_batch_size,
        max_coalescing_delay=config.queue.max_coalescing_delay,
        concurrency=1 if config.queue.concurrency_limit == 1 else _MAX_POSTS,
        initial_retry_delay=config.queue.initial_retry_delay,
        max_retry_delay=config.queue.max_retry_delay,
        token=config.api_token.get_secret_value() if config.api_token else None,
        token_from=reference or ("api_token" if has_token else ""),
        # If the vault fails, Kong passes an empty token along with the reference.
        token_unresolved=bool(reference) and not has_token,
    )


def started_at() -> int:
    """Return the current time in whole seconds, for InstanceStatus."""
    return int(time.time())
