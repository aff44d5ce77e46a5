"""Writing the spool: what is handed over is in a file before Kong has its answer.

A thread of its own writes, so that the thread that serves Kong never waits for a disk in trouble: what
arrives while one write(2) is under way forms the next one (group commit). While all is well, that is
the open segment has room and writes have been quick (`pace`), the serving thread calls write(2) itself:
handing a record to another thread and back costs several times as much. So of a disk that turns slow it
meets one slow write, and then leaves it to the other thread.

Power loss costs what `fsync` leaves open: `always` nothing, `interval` at most what came in one interval,
`never` what the kernel had not written back by itself. kill -9 costs nothing in any of them.

When the disk fails, Kong is answered all the same: records wait in bounded memory and are written as
soon as the disk takes them; past the bound they are counted as lost, and the count goes into the spool.
The same holds for a disk that neither takes nor refuses a write for longer than `STALLED_AFTER`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Literal

import orjson

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.destination import Destination, write_destination
from openmeter_plugin.spool.queue import Item, Rotation, SpoolQueue
from openmeter_plugin.spool.segment import LOST, encode_record
from openmeter_plugin.spool.segment_file import Segment
from openmeter_plugin.spool.syncer import Syncer

# MERGED: Whether the disk is quick enough to be written to by the thread that serves Kong.

SLOW: Final = 0.005  # seconds of one write(2); into the page cache one takes some microseconds
_FIRST_PAUSE: Final = 10.0
_MAX_PAUSE: Final = 300.0


class DiskSpeed:
    """Remembers slow writes, whoever made them, and for how long they tell against the disk.

    After a slow write the disk is not trusted for a pause, which doubles for as long as the disk is slow
    again soon after.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = _FIRST_PAUSE
        self._trusted_from = float("-inf")

    @property
    def trusted(self) -> bool:
        """Whether the next write may be expected to be quick."""
        return self._clock() >= self._trusted_from

    def took(self, seconds: float) -> None:
        """Note how long a write took."""
        if seconds < SLOW:
            return
        now = self._clock()
        if now < self._trusted_from:
            pass  # known already: the pause begins anew
        elif now - self._trusted_from < self._pause:
            self._pause = min(2 * self._pause, _MAX_PAUSE)
        else:
            self._pause = _FIRST_PAUSE
        self._trusted_from = now + self._pause


Fsync = Literal["always", "interval", "never"]

STALLED_AFTER: Final = 2.0
"""Seconds of one commit after which the disk counts as stalled."""
_RETRY_AFTER: Final = 0.5  # seconds between two tries on a disk that failed

Notify = Callable[[list[Any]], None]


class SpoolWriter:
    """Takes records from the serving thread and gives their tokens back when they are in a file.

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
        self._max_waiting_bytes = max_waiting_bytes
        self._keep_tokens = keep_tokens
        self._items: SimpleQueue[Sequence[Item] | None] = SimpleQueue()
        self._queues: dict[str, SpoolQueue] = {}
        retired: SimpleQueue[Segment] = SimpleQueue()
        self._rotation = Rotation(segment_bytes, segment_seconds, retired)
        self._disk = threading.Lock()  # whoever holds it writes
        self._pace = DiskSpeed()
        self._commit_began: float | None = None
        self._unanswered_bytes = 0
        self._overflow: SimpleQueue[SpoolQueue] = SimpleQueue()
        self._all_written = False
        self._log = get_logger()
        self._failure_limit, self._loss_limit = RateLimit(), RateLimit()
        self._thread = threading.Thread(target=self._run, name="spool-writer", daemon=True)
        self._syncer = Syncer(self._open_segments, retired, sync=fsync != "never", interval=fsync_interval)

    def start(self) -> None:
        """Start the threads; in the process that writes, after any fork."""
        self._thread.start()
        self._syncer.start()

    def queue(self, queue_id: str) -> SpoolQueue:
        """Return the queue with this id. Touches no disk."""
        queue = self._queues.get(queue_id)
        if queue is None:
            queue = self._queues[queue_id] = SpoolQueue(self._spool, queue_id, self._rotation)
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

    def append_now(self, items: Sequence[Item]) -> tuple[list[Any], Sequence[Item]]:
        """Write records on the calling thread, as far as that is sure to be quick.

        Returns the tokens of those that are in a file now, and what is left to hand over.
        """
        if self._fsync == "always" or not self._pace.trusted or not self._disk.acquire(blocking=False):
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
                self._pace.took(time.perf_counter() - began)
                tokens += [item[2] for item in group[:written]]
                left += group[written:]
        finally:
            self._disk.release()
        return tokens, left

    @property
    def stalled(self) -> bool:
        """Whether the disk has neither taken nor refused a write for so long that Kong must not wait."""
        began = self._commit_began
        return began is not None and time.monotonic() - began > STALLED_AFTER

    def keep_for_later(self, items: Sequence[Item]) -> None:
        """Hand over records that Kong has its answer for, while the disk is `stalled`; the serving thread's.

        What has no room in memory is counted as lost.
        """
        kept: list[Item] = []
        for item in items:
            size = len(item[1] or b"")
            if self._unanswered_bytes + size > self._max_waiting_bytes:
                self._overflow.put(item[0])
                if self._loss_limit.passes():
                    self._log.critical("usage_lost", queue=item[0].id, reason="the disk hangs")
            else:
                self._unanswered_bytes += size
                kept.append(item)
        self._items.put(kept)

    def moves_again(self) -> None:
        """Forget how much memory the last stall took: the disk has had it; the serving thread's."""
        self._unanswered_bytes = 0

    def close(self, timeout: float) -> bool:
        """Write what was handed over and stop; returns whether all was written within `timeout` seconds."""
        self._items.put(None)
        self._thread.join(timeout)
        self._syncer.close(timeout)
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
            self._commit_began = time.monotonic()
            with self._disk:
                self._commit(items)
            self._commit_began = None
            if stop:
                break
        unwritten = 0
        for queue in self._queues.values():
            queue.retire()
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
        while not self._overflow.empty():
            self._overflow.get_nowait().lost += 1
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
        began = time.perf_counter()
        try:
            written = queue.append(pending)
            if self._fsync == "always" and queue.segment is not None:
                queue.segment.sync()
        except OSError as caught:
            written, error = 0, caught
            queue.retire()  # to be delivered and removed, which may be what makes room
        self._pace.took(time.perf_counter() - began)
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

    def _open_segments(self) -> Iterator[Segment]:
        for queue in list(self._queues.values()):
            if (segment := queue.segment) is not None:
                yield segment
