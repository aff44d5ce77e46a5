"""Status of a spool: books and segment files, by destination and in total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from openmeter_plugin.books.backlog import QueueFiles, oldest_waiting, unaccounted
from openmeter_plugin.books.equations import Counts
from openmeter_plugin.books.models import (
    BooksNumbers,
    DestinationStatus,
    NotAccounted,
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
from openmeter_plugin.spool.destination import read_destination


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
