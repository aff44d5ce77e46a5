"""Writer of the spool: a record is in a file before Kong gets its answer.

A separate thread writes, so that the thread that serves Kong never waits for a failing disk. What arrives
during one write(2) forms the next one (group commit). While the open segment has room and writes are quick
(`DiskSpeed`), the serving thread calls write(2) itself, because handing a record to another thread and
back costs several times as much. If the disk turns slow, the serving thread meets one slow write and then
leaves writing to the other thread.

What power loss costs depends on `fsync`: with `always` nothing, with `interval` at most what arrived in
one interval, with `never` what the kernel had not written back by itself. kill -9 costs nothing in any mode.

When the disk fails, Kong still gets its answers: records wait in bounded memory and are written as soon as
the disk accepts them. Beyond the bound they are counted as lost, and the count goes into the spool. The
same holds for a disk that neither completes nor refuses a write for longer than `stalled_after` seconds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Literal

import orjson

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import Destination, write_destination
from openmeter_plugin.spool.queue import Item, Rotation, Segment, SpoolQueue
from openmeter_plugin.spool.segment import LOST, encode_record


class Syncer:
    """Syncs the open segments every `interval` seconds; syncs and closes those that are retired.

    It has a thread of its own, so that no other waits for it. With `sync` false it only closes. Calls
    `on_due` if a segment is due for its successor: one that nothing is written to would otherwise stay open,
    and its queue would never be empty.

    It also looks whether the open segments are still in their place. Somebody may remove or move a file that
    a worker has open; what is written from then on would be in no file that delivery finds.
    """

    def __init__(
        self,
        open_segments: Callable[[], Iterable[Segment]],
        rotation: Rotation,
        on_due: Callable[[], None],
        *,
        sync: bool,
        interval: float,
    ) -> None:
        self._open_segments = open_segments
        self._rotation = rotation
        self._retired = rotation.retired
        self._on_due = on_due
        self._syncs = sync
        self._interval = interval
        self._stopped = threading.Event()
        self._failure_limit = RateLimit()
        self._thread = threading.Thread(target=self._run, name="spool-sync", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Close the segments that are retired by now, and stop."""
        self._stopped.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._look_after_open()
            self._close_retired()
        self._close_retired()

    def _look_after_open(self) -> None:
        for segment in self._open_segments():
            if segment.size > segment.size_in_place:
                self._check_place(segment)
            if segment.unsynced:
                self._sync(segment)
            if self._rotation.is_due(segment):
                self._on_due()

    def _check_place(self, segment: Segment) -> None:
        """Have a new segment replace this one if it is gone."""
        try:
            if segment.in_place():
                return
        except OSError:
            return  # the next look will show
        # Due for its successor: the writer's path needs no check of its own.
        segment.opened = float("-inf")

    def _close_retired(self) -> None:
        unsaved = []
        while not self._retired.empty():
            segment = self._retired.get_nowait()
            self._sync(segment)
            if self._save_removed(segment):
                segment.close()
            else:
                unsaved.append(segment)
        for segment in unsaved:
            self._retired.put(segment)

    def _save_removed(self, segment: Segment) -> bool:
        """Save what a segment got after it was removed; returns whether nothing is left to save."""
        try:
            if segment.in_place():
                return True
            saved = segment.save_removed()
        except OSError as error:
            if self._failure_limit.passes():
                get_logger().error("removed_segment_not_saved", segment=segment.path.name, reason=str(error))
            return False
        get_logger().error(
            "open_segment_removed",
            queue=segment.path.parent.name,
            segment=segment.path.name,
            saved_bytes=saved,
            remedy="never remove or move files of a spool: what was in this one may be lost",
        )
        return True

    def _sync(self, segment: Segment) -> None:
        if not self._syncs:
            return
        try:
            segment.sync()
        except OSError as error:
            if self._failure_limit.passes():
                get_logger().error("spool_sync_failed", reason=error.strerror)


Fsync = Literal["always", "interval", "never"]
Notify = Callable[[list[Any]], None]

STALLED_AFTER: Final = 2.0
"""Seconds of one commit after which the disk counts as stalled."""
SLOW_WRITE: Final = 0.005  # seconds of one write(2); a write into the page cache takes some microseconds
_FIRST_PAUSE: Final = 10.0  # seconds
_MAX_PAUSE: Final = 300.0


class DiskSpeed:
    """Tracks whether the disk is quick enough for writes on the thread that serves Kong.

    After a slow write the disk is not trusted for a pause. The pause doubles each time the disk is slow
    again soon afterwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = _FIRST_PAUSE
        self._trusted_from = float("-inf")

    @property
    def trusted(self) -> bool:
        """Whether the next write is expected to be quick."""
        return self._clock() >= self._trusted_from

    def observe(self, seconds: float) -> None:
        """Record how long a write took."""
        if seconds < SLOW_WRITE:
            return
        now = self._clock()
        if now < self._trusted_from:
            pass  # already known to be slow: the pause restarts
        elif now - self._trusted_from < self._pause:
            self._pause = min(2 * self._pause, _MAX_PAUSE)
        else:
            self._pause = _FIRST_PAUSE
        self._trusted_from = now + self._pause


class SpoolWriter:
    """Writes the serving thread's records and returns their tokens once they are in a file.

    `notify` is called on the writer's thread with the tokens of a committed group, in order. After a
    failed write the writer waits `retry_seconds` before it tries again. `name` is the middle part of the
    segments' names, the pid by default.
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
        retry_seconds: float = 0.5,
        stalled_after: float = STALLED_AFTER,
        name: str = "",
    ) -> None:
        self._spool = spool
        self._notify = notify
        self._fsync = fsync
        self._max_waiting_bytes = max_waiting_bytes
        self._keep_tokens = keep_tokens
        self._retry_seconds = retry_seconds
        self.stalled_after = stalled_after
        self._items: SimpleQueue[Sequence[Item] | None] = SimpleQueue()
        self._queues: dict[str, SpoolQueue] = {}
        self._rotation = Rotation(segment_bytes, segment_seconds, SimpleQueue(), fsync == "always", name)
        self._write_lock = threading.Lock()  # held by the thread that writes
        self._disk_speed = DiskSpeed()
        self._commit_began: float | None = None
        self._stall_bytes = 0
        self._overflow: SimpleQueue[SpoolQueue] = SimpleQueue()
        self._all_written = False
        self._log = get_logger()
        self._failure_limit, self._loss_limit = RateLimit(), RateLimit()
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._syncer = Syncer(
            self._open_segments,
            self._rotation,
            lambda: self._items.put(()),  # the writer's thread then retires what is due
            sync=fsync != "never",
            interval=fsync_interval,
        )

    def start(self) -> None:
        """Start the threads. Call it in the process that writes, after any fork."""
        self._thread.start()
        self._syncer.start()

    def queue(self, queue_id: str) -> SpoolQueue:
        """Return the queue with this id. Touches no disk."""
        queue = self._queues.get(queue_id)
        if queue is None:
            queue = self._queues[queue_id] = SpoolQueue(self._spool, queue_id, self._rotation)
        return queue

    def describe(self, destination: Destination) -> SpoolQueue:
        """Return the destination's queue and schedule the write of its description."""
        queue = self.queue(destination.id)
        self._items.put(((queue, None, None, destination),))
        return queue

    def append(self, queue: SpoolQueue, record: bytes, token: Any) -> None:
        """Hand over a record; `notify` gets its token once Kong may get its answer. Never blocks."""
        self._items.put(((queue, record, token, None),))

    def append_all(self, items: Sequence[Item]) -> None:
        """Hand over several items at once: waking the writer's thread costs more than writing a record."""
        self._items.put(items)

    def append_now(self, items: Sequence[Item]) -> tuple[list[Any], Sequence[Item]]:
        """Write records on the calling thread, as far as that is certain to be quick.

        Returns the tokens of the records that are in a file now, and the items left to hand over.
        """
        if (
            self._fsync == "always"
            or not self._disk_speed.trusted
            or not self._write_lock.acquire(blocking=False)
        ):
            return [], items
        groups: dict[SpoolQueue, list[Item]] = {}
        for item in items:
            groups.setdefault(item[0], []).append(item)
        tokens: list[Any] = []
        left: list[Item] = []
        try:
            for queue, group in groups.items():
                began = time.perf_counter()
                written = queue.append_quickly([item[1] or b"" for item in group])
                self._disk_speed.observe(time.perf_counter() - began)
                tokens += [item[2] for item in group[:written]]
                left += group[written:]
        finally:
            self._write_lock.release()
        return tokens, left

    @property
    def stalled(self) -> bool:
        """Whether a write has lasted so long that Kong should not wait for it any longer."""
        began = self._commit_began
        return began is not None and time.monotonic() - began > self.stalled_after

    def append_while_stalled(self, items: Sequence[Item]) -> None:
        """Hand over records that Kong is answered for at once, because the disk is `stalled`.

        Records that do not fit into memory are counted as lost. Only the serving thread calls this.
        """
        accepted: list[Item] = []
        for item in items:
            size = len(item[1] or b"")
            if self._stall_bytes + size > self._max_waiting_bytes:
                self._overflow.put(item[0])
                if self._loss_limit.passes():
                    self._log.critical("usage_lost", queue=item[0].id, reason="the disk is stalled")
            else:
                self._stall_bytes += size
                accepted.append(item)
        self._items.put(accepted)

    def end_stall(self) -> None:
        """Free the memory budget of the last stall, whose records are written by now.

        Only the serving thread calls this.
        """
        self._stall_bytes = 0

    def close(self, timeout: float) -> bool:
        """Write what was handed over and stop; returns whether that succeeded within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        self._items.put(None)
        self._thread.join(timeout)
        self._syncer.close(max(0.0, deadline - time.monotonic()))
        return self._all_written

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            # Without this thread Kong gets no more answers. Dying is better than hanging: Kong resends
            # unanswered requests to the process that replaces this one.
            self._log.critical("spool_writer_crashed", exc_info=True)
            os._exit(os.EX_SOFTWARE)

    def _serve(self) -> None:
        while True:
            failing = any(queue.failing for queue in list(self._queues.values()))
            items, stop = self._next_items(self._retry_seconds if failing else None)
            self._commit_began = time.monotonic()
            with self._write_lock:
                self._commit(items)
            self._commit_began = None
            if stop:
                break
        unwritten = 0
        for queue in self._queues.values():
            queue.retire()
            unwritten += len(queue.waiting) + queue.lost
        if unwritten:
            self._log.critical("usage_lost", records=unwritten, reason="the disk failed until the stop")
        self._all_written = not unwritten

    def _next_items(self, timeout: float | None) -> tuple[list[Item], bool]:
        """Wait for the first item and return it with all queued ones, and whether to stop."""
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
        while not self._overflow.empty():
            self._overflow.get_nowait().lost += 1
        queues = list(self._queues.values())
        for queue in queues:
            queue.rotate()
        groups: dict[SpoolQueue, list[bytes]] = {queue: [] for queue in queues if queue.failing}
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
        began = time.perf_counter()
        try:
            written = queue.append(pending)
            if self._fsync == "always" and queue.segment is not None:
                queue.segment.sync()
        except OSError as caught:
            written, error = 0, caught
            queue.retire()  # so that it can be delivered and removed, which may be what frees space
        self._disk_speed.observe(time.perf_counter() - began)
        rest = pending[written:]
        if queue.lost:  # the loss record goes first: it is in the file, or the next try makes a new one
            if written:
                queue.lost = 0
            else:
                del rest[0]
        if rest:
            self._hold_in_memory(queue, rest, error)
            return
        if queue.waiting:
            self._log.info("spool_write_recovered", queue=queue.id)
        queue.waiting, queue.waiting_bytes = [], 0

    def _describe(self, queue: SpoolQueue) -> None:
        """Write the queue's description; if that fails, its records are written anyway."""
        description = queue.description_to_write
        if description is None:
            return
        try:
            write_destination(self._spool, description, keep_token=self._keep_tokens)
            queue.description, queue.described = None, description
        except OSError as error:
            queue.description = description
            if self._failure_limit.passes():
                self._log.error("destination_write_failed", queue=queue.id, reason=error.strerror)

    def _hold_in_memory(self, queue: SpoolQueue, records: list[bytes], error: OSError | None) -> None:
        """Hold records in memory until the disk works, oldest first; beyond the bound they are lost."""
        others = sum(other.waiting_bytes for other in list(self._queues.values()) if other is not queue)
        waiting_bytes = 0
        held: list[bytes] = []
        for record in records:
            if others + waiting_bytes + len(record) > self._max_waiting_bytes:
                queue.lost += 1
                continue
            waiting_bytes += len(record)
            held.append(record)
        queue.waiting, queue.waiting_bytes = held, waiting_bytes
        reason = error.strerror if error else "the disk accepted only a part"
        if self._failure_limit.passes():
            self._log.error("spool_write_failed", queue=queue.id, reason=reason, records_in_memory=len(held))
        if queue.lost and self._loss_limit.passes():
            self._log.critical("usage_lost", queue=queue.id, records=queue.lost, reason=reason)

    def _open_segments(self) -> Iterator[Segment]:
        for queue in list(self._queues.values()):
            if (segment := queue.segment) is not None:
                yield segment
