"""Writing the spool: a thread of its own, so that the thread that serves Kong never waits for the disk.

Records that arrive while one write(2) is under way form the next one (group commit). Power loss costs
what `fsync` leaves open: `always` nothing, `interval` at most what came in one interval, `never` what the
kernel had not written back by itself. kill -9 costs nothing in any of them.

When the disk fails, Kong is answered all the same: records wait in bounded memory and are written as
soon as the disk takes them; past the bound they are counted as lost, and the count goes into the spool.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Literal

import orjson

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import Destination, queues_directory, write_destination
from openmeter_plugin.spool.segment import LOST, MAGIC, SUFFIX, encode_record

Fsync = Literal["always", "interval", "never"]

_RETRY_AFTER: Final = 0.5  # seconds between two tries on a disk that failed
_LEFT_FREE: Final = 4 * 1024 * 1024  # bytes, or an eighth of a smaller file system
_segment_number = count()


class Segment:
    """A segment file that this process appends to, locked for as long as it is open."""

    def __init__(self, directory: Path) -> None:
        path = directory / f"{time.time_ns():020d}-{os.getpid()}-{next(_segment_number)}{SUFFIX}"
        unready = path.with_suffix(".tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self.descriptor = os.open(unready, flags, 0o600)
        try:
            # Named as a segment only once it is locked: a reader takes an unlocked one for finished,
            # and would remove it under us.
            fcntl.flock(self.descriptor, fcntl.LOCK_EX)
            _write_all(self.descriptor, MAGIC)
            unready.rename(path)
        except OSError:
            self.close()
            unready.unlink(missing_ok=True)
            raise
        self._directory = directory
        self._entered = False
        self.size = len(MAGIC)
        self.opened = time.monotonic()
        self.unsynced = True

    def append(self, data: bytes) -> int:
        """Write the bytes and return how many went in: all of them, unless the disk refused the rest."""
        view = memoryview(data)
        written = 0
        with contextlib.suppress(OSError):
            while written < len(data):
                written += os.write(self.descriptor, view[written:])
        self.size += written
        self.unsynced = True
        return written

    def sync(self) -> None:
        """Have the kernel put the content on the disk; raises OSError."""
        self.unsynced = False
        os.fdatasync(self.descriptor)
        if not self._entered:
            # A file that no directory on the disk names is lost with all its content.
            for directory in (self._directory, *list(self._directory.parents)[:2]):
                _sync_directory(directory)
            self._entered = True

    def close(self) -> None:
        """Close the file, which also unlocks it: from now on it is never appended to."""
        os.close(self.descriptor)


class SpoolQueue:
    """The records for one destination. Only the writer's thread touches anything but `id`."""

    def __init__(self, spool: Path, queue_id: str) -> None:
        self.id = queue_id
        self.directory = queues_directory(spool) / queue_id
        self.description: Destination | None = None
        self.segment: Segment | None = None
        self.waiting: list[bytes] = []
        self.waiting_bytes = 0
        self.lost = 0

    @property
    def failing(self) -> bool:
        """Whether something waits for a disk that refused it."""
        return bool(self.waiting or self.lost or self.description)


Notify = Callable[[list[Any]], None]
Item = tuple[SpoolQueue, bytes | None, Any, Destination | None]
"""What is handed over: a queue, and a record with its token or a new description."""


class SpoolWriter:
    """Takes records from the serving thread and gives their tokens back when they are on disk.

    `notify` is called on the writer's thread with the tokens of a committed group, in order.
    """

    def __init__(
        self,
        spool: Path,
        notify: Notify,
        *,
        fsync: Fsync = "interval",
        fsync_interval: float = 1.0,
        segment_bytes: int = 16 * 1024 * 1024,
        segment_seconds: float = 3600.0,
        max_waiting_bytes: int = 32 * 1024 * 1024,
        keep_tokens: bool = True,
    ) -> None:
        self._spool = spool
        self._notify = notify
        self._fsync = fsync
        self._fsync_interval = fsync_interval
        self._segment_bytes = segment_bytes
        self._segment_seconds = segment_seconds
        self._max_waiting_bytes = max_waiting_bytes
        self._keep_tokens = keep_tokens
        self._items: SimpleQueue[Sequence[Item] | None] = SimpleQueue()
        self._queues: dict[str, SpoolQueue] = {}
        self._retired: SimpleQueue[Segment] = SimpleQueue()
        self._stopped = threading.Event()
        self._all_written = False
        self._log = get_logger()
        self._failure_limit, self._loss_limit = RateLimit(), RateLimit()
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._syncer = threading.Thread(target=self._run_syncer, name="spool-sync", daemon=True)

    def start(self) -> None:
        """Start the threads; in the process that writes, after any fork."""
        self._thread.start()
        self._syncer.start()

    def queue(self, queue_id: str) -> SpoolQueue:
        """Return the queue with this id. Touches no disk."""
        queue = self._queues.get(queue_id)
        if queue is None:
            queue = self._queues[queue_id] = SpoolQueue(self._spool, queue_id)
        return queue

    def describe(self, destination: Destination) -> SpoolQueue:
        """Return the destination's queue, and have its description written soon."""
        queue = self.queue(destination.id)
        self._items.put(((queue, None, None, destination),))
        return queue

    def append(self, queue: SpoolQueue, record: bytes, token: Any) -> None:
        """Hand a record over; `notify` gets the token once Kong may have its answer. Never waits."""
        self._items.put(((queue, record, token, None),))

    def append_all(self, items: Sequence[Item]) -> None:
        """Hand over several at once: waking the writer's thread costs more than writing a record."""
        self._items.put(items)

    def close(self, timeout: float) -> bool:
        """Write what was handed over and stop; returns whether all was written within `timeout` seconds."""
        self._items.put(None)
        self._thread.join(timeout)
        self._stopped.set()
        self._syncer.join(timeout)
        return self._all_written

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            # Without this thread nobody is answered any more. Dying is better than hanging: what has no
            # answer yet is sent again by Kong to the process that takes this one's place.
            self._log.critical("spool_writer_crashed", exc_info=True)
            os._exit(os.EX_SOFTWARE)

    def _serve(self) -> None:
        while True:
            failing = any(queue.failing for queue in list(self._queues.values()))
            items, stop = self._take(_RETRY_AFTER if failing else None)
            self._commit(items)
            if stop:
                break
        unwritten = 0
        for queue in self._queues.values():
            self._retire(queue)
            unwritten += len(queue.waiting) + queue.lost
        if unwritten:
            self._log.critical("usage_lost", records=unwritten, reason="the disk took nothing up to the stop")
        self._all_written = not unwritten

    def _take(self, timeout: float | None) -> tuple[list[Item], bool]:
        """Wait for the first item and return it with all that stand behind it, and whether to stop."""
        items: list[Item] = []
        try:
            item = self._items.get(timeout=timeout)
            while item is not None:
                items.extend(item)
                item = self._items.get_nowait()
        except Empty:
            return items, False
        return items, True

    def _commit(self, items: Sequence[Item]) -> None:
        groups: dict[SpoolQueue, list[bytes]] = {q: [] for q in list(self._queues.values()) if q.failing}
        tokens: list[Any] = []
        for queue, record, token, description in items:
            group = groups.setdefault(queue, [])
            if description is not None:
                queue.description = description.after(queue.description)
            if record is not None:
                group.append(record)
                tokens.append(token)
        for queue, records in groups.items():
            self._write(queue, records)
        if tokens:
            self._notify(tokens)

    def _write(self, queue: SpoolQueue, records: list[bytes]) -> None:
        self._describe(queue)
        pending = queue.waiting + records
        if queue.lost:
            loss = {"count": queue.lost, "reason": "disk"}
            pending.insert(0, encode_record(LOST + orjson.dumps(loss)))
        if not pending:
            return
        error: OSError | None = None
        try:
            written = self._append(queue, pending)
        except OSError as caught:
            written, error = 0, caught
            self._retire(queue)  # to be delivered and removed, which may be what makes room
        rest = pending[written:]
        if queue.lost:  # its record goes first: it is in the file, or it is made anew for the next try
            if written:
                queue.lost = 0
            else:
                del rest[0]
        if rest:
            self._keep(queue, rest, error)
            return
        if queue.waiting:
            self._log.info("spool_writes_again", queue=queue.id)
        queue.waiting, queue.waiting_bytes = [], 0

    def _describe(self, queue: SpoolQueue) -> None:
        """Write the queue's description; where that fails its records are written nevertheless."""
        if queue.description is None:
            return
        try:
            write_destination(self._spool, queue.description, keep_token=self._keep_tokens)
            queue.description = None
        except OSError as error:
            if self._failure_limit.passes():
                self._log.error("destination_cannot_be_written", queue=queue.id, reason=error.strerror)

    def _append(self, queue: SpoolQueue, records: list[bytes]) -> int:
        """Write the records and return how many are completely in the file; raises OSError."""
        segment = queue.segment
        if segment is not None and (
            segment.size >= self._segment_bytes or time.monotonic() - segment.opened >= self._segment_seconds
        ):
            self._retire(queue)
            segment = None
        if segment is None:
            queue.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fitting = records[: _whole_records(records, _room(queue.directory))]
        if not fitting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if segment is None:
            segment = queue.segment = Segment(queue.directory)
        data = b"".join(fitting)
        written = segment.append(data)
        if written < len(data):
            # What follows half a record in this file would be damage; the rest starts a new one.
            self._retire(queue)
            return _whole_records(fitting, written)
        if self._fsync == "always":
            segment.sync()
        return len(fitting)

    def _keep(self, queue: SpoolQueue, records: list[bytes], error: OSError | None) -> None:
        """Hold records in memory until the disk takes them, the oldest first, and count what has no room."""
        others = sum(other.waiting_bytes for other in list(self._queues.values()) if other is not queue)
        waiting_bytes = 0
        kept: list[bytes] = []
        for record in records:
            if others + waiting_bytes + len(record) > self._max_waiting_bytes:
                queue.lost += 1
                continue
            waiting_bytes += len(record)
            kept.append(record)
        queue.waiting, queue.waiting_bytes = kept, waiting_bytes
        reason = error.strerror if error else "the disk took only a part"
        if self._failure_limit.passes():
            self._log.error("spool_cannot_write", queue=queue.id, reason=reason, records_in_memory=len(kept))
        if queue.lost and self._loss_limit.passes():
            self._log.critical("usage_lost", queue=queue.id, records=queue.lost, reason=reason)

    def _retire(self, queue: SpoolQueue) -> None:
        """Leave the queue's segment to the sync thread, which puts it on disk and unlocks it."""
        if queue.segment is not None:
            self._retired.put(queue.segment)
            queue.segment = None

    def _run_syncer(self) -> None:
        while not self._stopped.wait(self._fsync_interval):
            self._sync_open_segments()
            self._close_retired_segments()
        self._close_retired_segments()

    def _sync_open_segments(self) -> None:
        for queue in list(self._queues.values()):
            segment = queue.segment
            if segment is not None and segment.unsynced:
                self._sync(segment)

    def _close_retired_segments(self) -> None:
        while not self._retired.empty():
            segment = self._retired.get_nowait()
            self._sync(segment)
            segment.close()

    def _sync(self, segment: Segment) -> None:
        if self._fsync == "never":
            return
        try:
            segment.sync()
        except OSError as error:
            if self._failure_limit.passes():
                self._log.error("spool_cannot_sync", reason=error.strerror)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write the few bytes at once; raises OSError, also where the disk took only some of them."""
    if os.write(descriptor, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _room(directory: Path) -> int:
    """Return how many bytes may be written there.

    Some are left for delivery's memory: if it could not be written, nothing would be removed any more,
    and a spool that has filled its file system would stay full for ever.
    """
    system = os.statvfs(directory)
    return system.f_bavail * system.f_frsize - min(_LEFT_FREE, system.f_blocks * system.f_frsize // 8)


def _whole_records(records: list[bytes], written: int) -> int:
    """Return how many records lie completely within the first `written` bytes."""
    for index, record in enumerate(records):
        written -= len(record)
        if written < 0:
            return index
    return len(records)
