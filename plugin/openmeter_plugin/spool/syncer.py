"""The syncer thread: syncs segments to disk and closes retired ones, so that no other thread waits for it.

It also looks whether the open segments are still in their place. Somebody may remove or move a file that a
worker has open; what is written from then on would be in no file that delivery finds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.queue import Rotation
from openmeter_plugin.spool.segment_file import Segment


class Syncer:
    """Syncs the open segments every `interval` seconds; syncs and closes those that are retired.

    With `sync` false it only closes. Calls `on_due` if a segment is due for its successor: one that nothing
    is written to would otherwise stay open, and its queue would never be empty.
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
