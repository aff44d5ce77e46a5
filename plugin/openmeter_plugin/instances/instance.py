"""The plugin instances that Kong has started here, and the numbers that they go by."""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
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
from openmeter_plugin.metering.fast_path import FastPath, fast_path_for
from openmeter_plugin.metering.rules import Rules
from openmeter_plugin.spool.destination import QUARANTINE, Destination, destination_id
from openmeter_plugin.spool.queue import SpoolQueue
from openmeter_plugin.spool.writer import SpoolWriter

_LARGEST_ID: Final = 2**31 - 1  # the protocol's int32
_BLOCK: Final = 4096  # ids reserved at once
_MAX_POSTS: Final = 4  # at once to one destination: what "unlimited" comes to


@dataclass(frozen=True, slots=True)
class Instance:
    """A plugin instance: the rules of its configuration and the queue that its outcomes go to.

    `rules` is None where the configuration cannot be used; `fault` then says why, and `queue` is the
    quarantine. `quarantine` is None where nothing can get there, `usual` where the rules have no short way.
    """

    id: int
    queue: SpoolQueue
    rules: Rules | None
    fault: str | None = None
    quarantine: SpoolQueue | None = None
    usual: FastPath | None = None


class InstanceIds:
    """Ids that no process using this spool has ever given out.

    Kong keeps an id past the life of the process that gave it. If a new process gave it out again, for
    another configuration, Kong's events would be billed under that one (measured with kong-pdk, which
    counts from 0). Blocks are reserved in a file, by `reserve` and not when an id is wanted; where that
    cannot be written, a random block of the 2^31 is as good as never the same.
    """

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self._ids: Iterator[int] = iter(())
        self._left = 0
        self._lock = threading.Lock()
        self.reserve()

    def __next__(self) -> int:
        """Return an id. Touches no disk."""
        with self._lock:
            if not self._left:
                self._use(_random_block())
            self._left -= 1
            return next(self._ids)

    def reserve(self) -> None:
        """Reserve more ids where few are left; to be called where waiting for the disk is no harm."""
        if self._left < _BLOCK // 4:
            first = _reserve_block(self._spool)
            with self._lock:
                self._use(first)

    def _use(self, first: int) -> None:
        self._ids, self._left = iter(range(first, first + _BLOCK)), _BLOCK


def _random_block() -> int:
    return 1 + secrets.randbelow(_LARGEST_ID // _BLOCK - 1) * _BLOCK


def _reserve_block(spool: Path) -> int:
    # Random at first: with an empty spool beside a running Kong, counting from 1 would repeat ids.
    random_first = _random_block()
    try:
        descriptor = os.open(spool / "instance-ids", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return random_first
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        content = os.pread(descriptor, 32, 0).strip()
        first = int(content) if content.isdigit() else random_first
        if not 0 < first <= _LARGEST_ID - 2 * _BLOCK:
            first = 1
        os.pwrite(descriptor, b"%-20d\n" % (first + _BLOCK), 0)
    except OSError:
        return random_first
    else:
        return first
    finally:
        os.close(descriptor)


class Instances:
    """Starts, finds and closes instances. Starting never fails and never waits for the disk."""

    def __init__(self, ids: InstanceIds, writer: SpoolWriter) -> None:
        self._ids = ids
        self._writer = writer
        self._instances: dict[int, Instance] = {}
        self._used: set[int] = set()
        self._log = get_logger()

    def __len__(self) -> int:
        return len(self._instances)

    def start(self, config: bytes) -> Instance:
        """Start an instance; one whose configuration cannot be used has its records set aside."""
        return self.adopt(next(self._ids), config)

    def adopt(self, instance_id: int, config: bytes) -> Instance:
        """Take an instance over that another worker has started under this id."""
        return self._add(start_instance(instance_id, config, self._writer))

    def restore(self, instance_id: int, config: bytes, *, had_token: bool) -> Instance:
        """Take an instance over that an earlier server has started; its token stays where that left it."""
        return self._add(start_instance(instance_id, config, self._writer, keeps_token=had_token))

    @property
    def used(self) -> frozenset[int]:
        """The ids that Kong spoke of since `forget_unused`."""
        return frozenset(self._used)

    def _add(self, instance: Instance) -> Instance:
        self._instances[instance.id] = instance
        self._used.add(instance.id)
        return instance

    def get(self, instance_id: int) -> Instance | None:
        """Return the instance, or None where Kong speaks of one that is not known here."""
        self._used.add(instance_id)
        return self._instances.get(instance_id)

    def close(self, instance_id: int) -> None:
        """Forget the instance; closing an unknown one is no fault, Kong does it after a restart of ours."""
        if self._instances.pop(instance_id, None) is not None:
            self._log.info("instance_closed", instance=instance_id)

    def forget_unused(self) -> None:
        """Forget the instances without an event since the last call.

        Kong closes no instance whose plugin was removed. One that was only idle costs nothing: its next
        event closes the connection, and Kong starts it again.
        """
        for instance_id in self._instances.keys() - self._used:
            del self._instances[instance_id]
            self._log.info("instance_aged_out", instance=instance_id)
        self._used.clear()


def start_instance(
    instance_id: int, config: bytes, writer: SpoolWriter, *, keeps_token: bool = False
) -> Instance:
    """Return an instance of Kong's configuration JSON, usable or not; the log says which. Never raises.

    Where it `keeps_token`, the configuration has none, and the last token goes on being used.
    """
    log = get_logger().bind(instance=instance_id)
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
            consequence="records are set aside in the spool's quarantine, none is sent",
        )
        return Instance(instance_id, writer.queue(QUARANTINE), None, fault)
    ineffective = ineffective_queue_keys(raw)
    if ineffective:
        log.warning(
            "queue_keys_without_effect",
            keys=ineffective,
            reason="in Kong's queue they drop events; here undelivered events are kept",
        )
    destination = destination_of(raw, parsed)
    log.info("instance_started", plugin=raw.get("__plugin_id"), destination=destination.id)
    if keeps_token:
        destination = replace(destination, token_unresolved=True)
    elif destination.token_unresolved:
        log.error(
            "token_not_resolved",
            destination=destination.id,
            consequence="the last token is used, where there was one",
        )
    quarantine = writer.queue(QUARANTINE) if rules.missing == "quarantine" else None
    return Instance(
        instance_id, writer.describe(destination), rules, quarantine=quarantine, usual=fast_path_for(rules)
    )


def destination_of(raw: dict[str, Any], config: PluginConfig) -> Destination:
    """Return where the events of a configuration go; `raw` is as Kong passes it."""
    reference = token_reference(raw)
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
        # Where its vault fails, Kong passes an empty token with the reference beside it.
        token_unresolved=bool(reference) and config.api_token is None,
    )


def started_at() -> int:
    """Return now in whole seconds, as InstanceStatus wants it."""
    return int(time.time())
