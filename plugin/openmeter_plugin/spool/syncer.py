"""The syncer thread: syncs segments to disk and closes retired ones, so that no other thread waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.spool.segment_file import Segment


class Syncer:
    """Syncs the open segments every `interval` seconds; syncs and closes those in `retired`.

    With `sync` false it only closes.
    """

    def __init__(
        self,
        open_segments: Callable[[], Iterable[Segment]],
        retired: SimpleQueue[Segment],
        *,
        sync: bool,
        interval: float,
    ) -> None:
        self._open_segments = open_segments
        self._retired = retired
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
            for segment in self._open_segments():
                if segment.unsynced:
                    self._sync(segment)
            self._close_retired()
        self._close_retired()

    def _close_retired(self) -> None:
        while not self._retired.empty():
            segment = self._retired.get_nowait()
            self._sync(segment)
            segment.close()

    def _sync(self, segment: Segment) -> None:
        if not self._syncs:
            return
        try:
            segment.sync()
        except OSError as error:
            if self._failure_limit.passes():
                get_logger().error("spool_sync_failed", reason=error.strerror)
