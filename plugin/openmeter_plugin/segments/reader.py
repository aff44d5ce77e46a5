"""Reader of the folder: moves what Kong's workers have written into the spool, each request exactly once.

It works in batches. A batch is written down in the spool's journal before it is written, as the spans of
segments that it comes from. If the process is killed, its successor reads the same spans, which give the same
records, and writes those that are missing. A segment is removed once the journal has it as written.

A batch whose configurations are not all there any more stays unfinished: its segments wait, others are read.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from openmeter_plugin.instances.instance import Instance
from openmeter_plugin.instances.record import RoutedRecord
from openmeter_plugin.log import RateLimit, get_logger
from openmeter_plugin.segments.conversion import convert, lost_record, split_records
from openmeter_plugin.segments.folder import Folder
from openmeter_plugin.segments.instance_files import InstanceDirectory
from openmeter_plugin.segments.line_format import MAX_LINE, Flaw
from openmeter_plugin.segments.lost_counters import LostCounters
from openmeter_plugin.segments.sources import Source, Sources
from openmeter_plugin.segments.stats import ReaderState, ReaderStats
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.journal import Journal, written
from openmeter_plugin.spool.queue import Item, SpoolQueue
from openmeter_plugin.spool.writer import SpoolWriter

_MAX_BATCH: Final = 1024 * 1024  # bytes of segments, or a chunk more
_LOOK_SECONDS: Final = 2.0  # at most between two looks for new files, if nothing shows that there are some
_MANY_PENDING: Final = 64
"""With more segments to open than this, the folder is not looked through after each change: every removal is
one, and a look at 100,000 names takes 0.4 s."""
_LOOK_SHARE: Final = 10  # a look is due after this many times its duration, at most this many seconds:
_MAX_LOOK_SECONDS: Final = 30.0
_FRESH_SECONDS: Final = 0.1
"""A folder's time of change is that of the last clock tick, so a file may come without a new one."""
_INSTANCES_SECONDS: Final = 5.0
_COUNTERS_SECONDS: Final = 1.0
_REFUSED_SECONDS: Final = 30.0
_CLEANING_SECONDS: Final = 600.0
_PUBLISH_SECONDS: Final = 0.5
_WARN_SECONDS: Final = 30.0
_MAX_POSITIONS: Final = 20_000
_WRITE_POLL: Final = 0.05


class Span(NamedTuple):
    """A part of a segment. `long` is a part without any line end, which counts as one damaged line."""

    name: str
    start: int
    end: int
    long: bool = False


@dataclass(slots=True)
class Batch:
    """What is read and written together."""

    spans: list[Span] = field(default_factory=list)
    counters: dict[str, dict[str, int]] = field(default_factory=dict)
    """By worker: its counts of lost requests, up to which they are taken over with this batch."""
    records: list[RoutedRecord] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    """Lines that hold no request any more, by cause."""
    counted: Counter[str] = field(default_factory=Counter)
    """By how much the counters grew, by cause."""
    is_all: bool = True
    """Whether the segments that it comes from had no more when they were read."""


class StoppedError(Exception):
    """The process was asked to stop while the disk could not be written. Its successor continues."""


class Reader:
    """Reads one folder into one spool. Everything happens on the thread that calls `step`.

    `beat` is called in between, at least each `_WRITE_POLL` seconds while the disk can be read and written;
    it raises StoppedError to give up waiting.
    """

    def __init__(
        self,
        folder: Folder,
        spool: Path,
        journal: Journal,
        writer: SpoolWriter,
        name: str,
        *,
        stats: ReaderStats | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder, self._spool = folder, spool
        self._journal, self._writer, self._name = journal, writer, name
        self._beat = beat
        self._stats = stats or ReaderStats()
        self._requests = self._stats.read().requests
        self._instances = InstanceDirectory(writer)
        self._sources = Sources()
        self._counters = LostCounters(journal.state.get("lost", {}))
        self._positions: dict[str, int] = dict(journal.state.get("positions", {}))
        self._unfinished: list[dict[str, Any]] = list(journal.state.get("batches", []))
        """Batches of earlier processes, as in the journal."""
        for noted in self._unfinished:  # what has come since must not be taken over with it
            self._counters.taken.update(noted["counters"])
            noted["counters"] = {}
        self._withhold()
        self._settled = True
        self._generation = 0
        self._loaded = 0.0
        self._due: dict[str, float] = {}
        self._warn_limit = RateLimit(_WARN_SECONDS)
        self._failure_limit = RateLimit()

    def step(self) -> bool:
        """Read and write one batch; returns whether there is more to read at once.

        Raises OSError if the disk fails; the next step tries again.
        """
        if not self._folder.ready():
            self._stats.publish(self._stats.read()._replace(readable=0.0))
            return False
        if self._folder.generation != self._generation:
            self._sources.close()
            self._generation, self._due = self._folder.generation, {}
        self._refresh_instances()
        for noted in list(self._unfinished):
            self._recover(noted)
        self._look()
        self._resume_waiting()
        self._sources.fill(self._folder.files, self._positions)
        batch, finished = self._collect()
        if batch.spans or batch.counters:
            try:
                self._write(batch)
            except OSError:
                self._undo(batch)
                raise
        self._remove(finished)
        self._publish()
        return not batch.is_all or bool(finished and self._sources.number_pending)

    def close(self) -> None:
        """Note that all is written, and close the files."""
        self._settle()
        self._sources.close()

    # ---- what is there -------------------------------------------------------------------------------------

    def _is_due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + seconds
        return True

    def _refresh_instances(self) -> None:
        files = self._folder.instances
        changed = files.changed() / 1e9
        if changed != self._loaded or self._is_due("instances", _INSTANCES_SECONDS):
            self._instances.refresh(files, self._beat)
            self._loaded = changed if time.time() - changed > _FRESH_SECONDS else 0.0

    def _look(self) -> None:
        """Look for new files, if the folder has changed."""
        files = self._folder.files
        changed = files.changed() / 1e9
        if self._is_due("refused", _REFUSED_SECONDS):
            self._sources.unrecognised.clear()
            self._looked = 0.0
        pending = self._sources.number_pending
        needless = pending > _MANY_PENDING or (
            changed == self._looked and (pending or self._sources.complete)
        )
        started = time.monotonic()
        if needless and started < self._due.get("look", 0.0):
            return
        others = self._sources.look(files, self._beat)
        took = time.monotonic() - started
        pause = min(max(_LOOK_SECONDS, _LOOK_SHARE * took), _MAX_LOOK_SECONDS)
        self._due["look"] = started + took + pause
        self._counters.found(others, files)
        self._looked = changed if time.time() - changed > _FRESH_SECONDS else 0.0

    def _resume_waiting(self) -> None:
        """Resume segments whose instance is known by now."""
        known: dict[str, bool] = {}
        for source in list(self._sources.waiting.values()):
            name = source.unknown or ""
            if name not in known:
                known[name] = self._find(name) is not None
            if known[name]:
                self._sources.set_open(self._folder.files, source)
        unknown = [name for name, found in known.items() if not found]
        if unknown and self._warn_limit.passes():
            get_logger().warning(
                "kong_segments_wait",
                instances=sorted(unknown)[:10],
                segments=len(self._sources.waiting),
                reason="the file with this configuration is not in the folder",
                consequence="their requests are not billed until it is there",
                remedy="reload Kong: it writes the file again",
            )

    def _find(self, name: str) -> Instance | None:
        return self._instances.get(self._folder.instances, name)

    # ---- reading -------------------------------------------------------------------------------------------

    def _collect(self) -> tuple[Batch, list[Source]]:
        """Read a batch; returns it, and the segments that are read to their end and have no writer."""
        batch = Batch()
        finished: list[Source] = []
        size = 0
        for source in list(self._sources.open.values()):
            if size >= _MAX_BATCH:
                batch.is_all = False
                break
            # The next batch begins with the segments that had no turn.
            self._sources.open[source.name] = self._sources.open.pop(source.name)
            try:
                span, ended = self._read(source, batch)
            except OSError as error:
                self._report("kong_segment_unreadable", source.name, error)
                continue
            if span is not None:
                size += span.end - span.start
                batch.spans.append(span)
            if ended:
                finished.append(source)
            self._beat()
        if self._is_due("counters", _COUNTERS_SECONDS):
            for worker, counts, lost in self._counters.new(self._folder.files):
                batch.counters[worker] = counts
                batch.counted.update(lost)
        self._add_lost(batch)
        return batch, finished

    def _read(self, source: Source, batch: Batch) -> tuple[Span | None, bool]:
        """Add what follows in a segment to the batch; returns its span, and whether that was the last."""
        data, at_end, final = source.read()
        batch.is_all &= at_end
        start = source.position
        if len(data) > MAX_LINE and b"\n" not in data:
            end = source.end_of_long_line(final=final, beat=self._beat)
            if end is None:
                return None, False
            source.moved(end)
            batch.lost[Flaw.DAMAGED.value] += 1
            return Span(source.name, start, end, long=True), False
        converted = convert(data, start, self._find, final=final)
        batch.records += converted.records
        batch.lost.update(converted.lost)
        if converted.unknown is not None:
            source.unknown = converted.unknown
        source.moved(converted.end)
        if converted.unknown is not None:
            self._sources.set_waiting(source)
        elif not data:
            source.since = time.time()
        span = Span(source.name, start, converted.end) if converted.end > start else None
        return span, final and converted.unknown is None

    def _add_lost(self, batch: Batch) -> None:
        """Add the records of lost requests. Whose they were is unknown: they count for the gateway."""
        queue = self._writer.queue(QUARANTINE)
        lost = batch.lost + batch.counted
        batch.records += [(queue, lost_record(cause, count)) for cause, count in sorted(lost.items())]

    # ---- writing -------------------------------------------------------------------------------------------

    def _write(
        self, batch: Batch, skip: Mapping[str, int] | None = None, completes: Mapping[str, Any] | None = None
    ) -> None:
        """Write a batch's records, without the first ones of each queue that are written already.

        It takes the place of the unfinished one that it completes.
        """
        groups: dict[SpoolQueue, list[bytes]] = {}
        for queue, record in batch.records:
            groups.setdefault(queue, []).append(record)
        for queue, records in groups.items():
            done = (skip or {}).get(queue.id, 0)
            if done:
                groups[queue] = split_records(b"".join(records))[done:]
        unfinished = [noted for noted in self._unfinished if noted is not completes]
        noted = {
            "writer": self._name,
            "spans": [list(span) for span in batch.spans],
            "counters": batch.counters,
            "counted": batch.counted,
            "marks": {queue.id: queue.mark for queue in groups},
            "skip": dict(skip or {}),
        }
        self._write_journal([*unfinished, noted])
        self._unfinished, self._settled = unfinished, False
        self._append([(queue, record, None, None) for queue, group in groups.items() for record in group])
        for cause, count in (batch.lost + batch.counted).items():
            get_logger().critical("usage_lost", records=count, reason=cause, input="Kong segments")
        for span in batch.spans:
            self._positions[span.name] = span.end
        for worker, counts in batch.counters.items():
            self._counters.taken[worker] = counts
        self._requests += len(batch.records)

    def _undo(self, batch: Batch) -> None:
        """Read a batch again that was not begun to be written."""
        for span in batch.spans:
            waiting = self._sources.waiting.get(span.name)
            if waiting is not None:
                self._sources.set_open(self._folder.files, waiting)
            if (source := self._sources.open.get(span.name)) is not None:
                source.moved(span.start)

    def _append(self, items: list[Item]) -> None:
        """Return once the records are in files; raises StoppedError."""
        if not items:
            return
        _, left = self._writer.append_now(items)
        if left:
            done = threading.Event()
            queue, record, _, _ = left[-1]
            self._writer.append_all([*left[:-1], (queue, record, done, None)])
            while not done.wait(_WRITE_POLL):
                self._beat()
        queues = {item[0] for item in items}
        while any(queue.waiting or queue.lost for queue in queues):
            self._beat()
            time.sleep(_WRITE_POLL)

    def _write_journal(self, batches: list[dict[str, Any]]) -> None:
        if len(self._positions) > _MAX_POSITIONS:  # mostly of files that another process has removed
            sources = self._sources
            known = sources.open.keys() | sources.waiting.keys() | sources.finished | sources.withheld
            for name in [name for name in self._positions if name not in known][: _MAX_POSITIONS // 2]:
                del self._positions[name]
        self._journal.write({"positions": self._positions, "lost": self._counters.taken, "batches": batches})

    def _settle(self) -> None:
        """Note that the last batch is written."""
        if not self._settled:
            self._write_journal(self._unfinished)
            self._settled = True

    # ---- after a kill --------------------------------------------------------------------------------------

    def _recover(self, noted: Mapping[str, Any]) -> None:
        """Complete a batch during which a process before this one was killed."""
        batch = Batch([Span(*span) for span in noted["spans"]])
        for span in batch.spans:
            if not self._read_again(span, batch):
                return
        batch.counted.update(noted["counted"])
        self._add_lost(batch)
        marks = {queue: (number, size) for queue, (number, size) in noted["marks"].items()}
        done = Counter(noted["skip"])
        done.update(written(self._spool, noted["writer"], marks))
        self._write(batch, done, noted)
        get_logger().info("kong_segments_recovered", records=len(batch.records), written=done.total())
        self._withhold()

    def _withhold(self) -> None:
        """Leave segments of unfinished batches alone: how much of each is written is not known yet."""
        self._sources.withheld = {name for noted in self._unfinished for name, *_ in noted["spans"]}
        self._looked = 0.0

    def _read_again(self, span: Span, batch: Batch) -> bool:
        """Add the records of a span; returns False if an instance that it names is unknown now."""
        if span.long:
            batch.lost[Flaw.DAMAGED.value] += 1
            return True
        descriptor = self._folder.files.open(span.name)
        if descriptor is None:
            get_logger().error("kong_segment_vanished", segment=span.name)
            return True
        try:
            data = os.pread(descriptor, span.end - span.start, span.start)
        finally:
            os.close(descriptor)
        converted = convert(data, span.start, self._find, final=True)
        if converted.unknown is not None:
            if self._warn_limit.passes():
                get_logger().error(
                    "kong_segments_wait",
                    instances=[converted.unknown],
                    reason="the file with this configuration is gone, and a batch was not written completely",
                    segments=len(self._sources.withheld),
                    consequence="the segments of that batch are not read until it is there",
                    remedy="reload Kong: it writes the file again",
                )
            return False
        batch.records += converted.records
        batch.lost.update(converted.lost)
        return True

    # ---- afterwards ----------------------------------------------------------------------------------------

    def _remove(self, finished: list[Source]) -> None:
        """Remove what is written."""
        if self._is_due("finished", _REFUSED_SECONDS):
            for name in list(self._sources.finished):
                self._remove_file(name, None)
        if finished:
            self._settle()
        for source in finished:
            del self._sources.open[source.name]
            self._sources.finished.add(source.name)
            self._remove_file(source.name, source.descriptor)
            source.close()
        if self._counters.ended:
            self._settle()
            self._counters.remove_ended(self._folder.files)
        if self._caught_up and self._is_due("cleaning", _CLEANING_SECONDS):
            self._settle()  # or a successor would need the files to complete the last batch
            self._instances.remove_unused(self._folder.instances)

    @property
    def _caught_up(self) -> bool:
        sources = self._sources
        return (
            sources.complete
            and not sources.number_pending
            and not sources.waiting
            and not sources.withheld
            and not sources.unrecognised
            and not any(source.unread() for source in sources.open.values())
        )

    def _remove_file(self, name: str, descriptor: int | None) -> None:
        try:
            self._folder.files.remove(name, descriptor)
        except OSError as error:
            self._report("kong_segment_not_removed", name, error)
            return
        self._sources.finished.discard(name)
        self._positions.pop(name, None)

    def _report(self, event: str, name: str, error: OSError) -> None:
        if self._failure_limit.passes():
            get_logger().error(event, segment=name, reason=error.strerror or str(error))

    def _publish(self) -> None:
        if not self._is_due("publish", _PUBLISH_SECONDS):
            return
        sources = self._sources
        lag = sources.lag(self._folder.files)
        self._stats.publish(
            ReaderState(
                requests=self._requests,
                lag_bytes=lag.size,
                lag_seconds=lag.seconds,
                waiting=len(sources.waiting) + len(sources.withheld),
                unrecognised=len(sources.unrecognised),
                kept=len(sources.finished),
                readable=1.0,
                segments=len(sources.open)
                + len(sources.waiting)
                + len(sources.withheld)
                + sources.number_pending,
            )
        )
