"""Status of a spool: books and segment files, by destination and in total.

The backlog on disk is part of it: records that are not in the books yet, and the oldest event that waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import orjson

from openmeter_plugin.books.equations import Counts
from openmeter_plugin.books.ledger_lines import add_lines, summary_of
from openmeter_plugin.books.models import (
    BooksNumbers,
    DestinationStatus,
    NotAccounted,
    OldestWaiting,
    PrunedLedger,
    SpoolStatus,
    SpoolTotal,
)
from openmeter_plugin.books.pruning import Pruned
from openmeter_plugin.books.read_models import (
    all_counts,
    all_positions,
    all_pruned,
    all_resent,
    delivery_runs,
    queue_names,
    reading,
    row_counts,
)
from openmeter_plugin.books.store import Lines
from openmeter_plugin.spool.destination import QUARANTINE, queues_directory, read_destination
from openmeter_plugin.spool.reader import Position, read_segment
from openmeter_plugin.spool.segment import EVENTS, LOST, MAGIC, SUFFIX, Damage, Record

_FIRST_READ: Final = 8 * 1024  # bytes of a segment: its next event is nearly always in there
_START: Final = Position(0, 0)


@dataclass(slots=True)
class QueueFiles:
    """The segment files of a queue, with the books' position in each."""

    directory: Path
    positions: Mapping[str, Position]
    resent: Collection[tuple[str, int]] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        spool: Path,
        queue: str,
        positions: Mapping[str, Position],
        resent: Collection[tuple[str, int]] = (),
    ) -> QueueFiles:
        """List a queue's directory. Read the books first: what arrives later then shows as not accounted."""
        files = cls(queues_directory(spool) / queue, positions, resent)
        for path in sorted(files.directory.glob(f"*{SUFFIX}")):
            with suppress(FileNotFoundError):
                files.sizes[path.name] = path.stat().st_size
        return files

    def position(self, segment: str) -> Position:
        """Return the books' position in a segment."""
        return self.positions.get(segment, _START)

    def is_sent(self, segment: str, item: Record | Damage) -> bool:
        """Return whether the item holds events that are sent to the metering API."""
        return isinstance(item, Record) and item.kind == EVENTS and (segment, item.end) not in self.resent


@dataclass(slots=True)
class Unaccounted:
    """Records after the accounted positions; `unreadable` names the segments that could not be read."""

    requests: int = 0
    events: int = 0
    lost: int = 0
    lines: Lines = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def model(self) -> NotAccounted:
        """Return the counts as the API's model."""
        return NotAccounted(requests=self.requests, events=self.events, lost=self.lost)

    def add(self, record: Record) -> None:
        """Count a record."""
        if record.kind == LOST:
            with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                self.lost += int(orjson.loads(record.body)["count"])
            return
        self.requests += 1
        if record.kind == EVENTS and (summary := summary_of(record)) is not None:
            self.events += len(summary.types)
            add_lines(self.lines, summary)


def unaccounted(files: QueueFiles) -> Unaccounted:
    """Count the records that are written but not in the books yet."""
    found = Unaccounted()
    for name, size in files.sizes.items():
        accounted = files.position(name).accounted
        if size > max(accounted, len(MAGIC)):
            try:
                for item in read_segment(files.directory / name, accounted):
                    if isinstance(item, Record):
                        found.add(item)
            except OSError:
                found.unreadable.append(name)
    return found


def oldest_waiting(files: QueueFiles, now: datetime | None = None) -> OldestWaiting | None:
    """Return the oldest of the segments' next events; within a segment, events are in order."""
    if files.directory.name == QUARANTINE:
        return None
    times = [
        time
        for name, size in files.sizes.items()
        if size > max(files.position(name).delivered, len(MAGIC))
        if (time := _next_event_time(files, name)) is not None
    ]
    if not times:
        return None
    oldest = min(times)
    age = 0.0
    with suppress(ValueError):
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(oldest)).total_seconds()
    return OldestWaiting(time=oldest, age_seconds=round(max(age, 0.0), 3))


def _next_event_time(files: QueueFiles, name: str) -> str | None:
    with suppress(OSError):
        for item in read_segment(files.directory / name, files.position(name).delivered, size=_FIRST_READ):
            if files.is_sent(name, item):
                return _event_time(item)
    return None


def _event_time(item: Record | Damage) -> str | None:
    events = events_of(item)
    return str(events[0].get("time", "")) if events else None


def events_of(item: Record | Damage) -> list[dict[str, Any]]:
    """Return the events of a record; an empty list if it is not usage or cannot be parsed."""
    if not isinstance(item, Record) or item.kind != EVENTS:
        return []
    try:
        events = orjson.loads(b"[" + item.events + b"]")
    except orjson.JSONDecodeError:
        return []
    return [event for event in events if isinstance(event, dict)]


def read_status(spool: Path) -> SpoolStatus:
    """Read the status; raises SpoolError."""
    with reading(spool) as db:
        counts, positions, resent = all_counts(db), all_positions(db), all_resent(db)
        pruned = all_pruned(db)
        dead, quarantined = row_counts(db)
    destinations = [
        _destination(
            spool,
            queue,
            counts.get(queue, Counter()),
            QueueFiles.of(spool, queue, positions.get(queue, {}), resent.get(queue, ())),
            pruned.get(queue),
        )
        for queue in queue_names(spool, counts)
    ]
    return SpoolStatus(
        delivery_running=delivery_runs(spool),
        total=_total(counts, destinations, pruned.values()),
        destinations=destinations,
        dead_letters=dead,
        quarantined=quarantined,
    )


def _destination(
    spool: Path, queue: str, counts: Counts, files: QueueFiles, pruned: Pruned | None
) -> DestinationStatus:
    books, not_accounted = books_numbers(counts), unaccounted(files)
    return DestinationStatus(
        id=queue,
        endpoint=shown_endpoint(spool, queue),
        books=books,
        not_accounted=not_accounted.model(),
        backlog=books.waiting + not_accounted.events,
        oldest_waiting=oldest_waiting(files),
        segments=len(files.sizes),
        unreadable=len(not_accounted.unreadable),
        bytes=sum(files.sizes.values()),
        pruned=_pruned([pruned] if pruned else []),
    )


def _pruned(queues: Collection[Pruned]) -> PrunedLedger | None:
    if not queues:
        return None
    return PrunedLedger(
        up_to=max(queue.up_to for queue in queues),
        lines=sum(queue.lines for queue in queues),
        events=sum(queue.events for queue in queues),
    )


def _total(
    counts: dict[str, Counts], destinations: list[DestinationStatus], pruned: Collection[Pruned]
) -> SpoolTotal:
    total: Counts = Counter()
    for one in counts.values():
        total.update(one)
    waits = [d.oldest_waiting for d in destinations if d.oldest_waiting is not None]
    return SpoolTotal(
        books=books_numbers(total),
        not_accounted=NotAccounted(
            requests=sum(d.not_accounted.requests for d in destinations),
            events=sum(d.not_accounted.events for d in destinations),
            lost=sum(d.not_accounted.lost for d in destinations),
        ),
        backlog=sum(d.backlog for d in destinations),
        oldest_waiting=max(waits, key=lambda wait: wait.age_seconds, default=None),
        segments=sum(d.segments for d in destinations),
        unreadable=sum(d.unreadable for d in destinations),
        bytes=sum(d.bytes for d in destinations),
        pruned=_pruned(pruned),
    )


def books_numbers(counts: Counts) -> BooksNumbers:
    """Return a queue's counts as a model."""
    return BooksNumbers(
        requests=counts["requests", ""],
        metered=counts["metered", ""],
        skipped=by_reason(counts, "skipped"),
        quarantined=counts["quarantined", ""],
        resent=counts["resent", ""],
        events=counts["events", ""],
        delivered=counts["delivered", ""],
        dead_lettered=counts["dead_lettered", ""],
        lost_events=by_reason(counts, "lost_events"),
        waiting=counts["waiting", ""],
        lost=by_reason(counts, "lost"),
        ai_usage_gaps=by_reason(counts, "ai_usage_gaps"),
        damaged_bytes=counts["damaged_bytes", ""],
        unreadable_segments=counts["unreadable_segments", ""],
        redelivered=counts["redelivered", ""],
        violations=counts["violations", ""],
    )


def by_reason(counts: Counts, name: str) -> dict[str, int]:
    """Return the counts with this name, by reason."""
    return {reason: value for (found, reason), value in sorted(counts.items()) if found == name}


def shown_endpoint(spool: Path, queue: str) -> str | None:
    """Return a queue's endpoint without parts that may contain a secret; None if it is unknown."""
    try:
        destination = read_destination(spool, queue)
    except (OSError, ValueError):
        return None
    if destination is None:
        return None
    try:
        parts = urlsplit(str(destination.endpoint))
    except ValueError:
        return None
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
