"""Verification of a spool: reads every record and compares books, ledger and segments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import orjson

from openmeter_plugin.books.equations import Counts, violations
from openmeter_plugin.books.ledger_lines import add_lines, ledger_key, summary_of
from openmeter_plugin.books.models import NotAccounted, Verification
from openmeter_plugin.books.pruning import Pruned
from openmeter_plugin.books.read_models import (
    LedgerEntry,
    LedgerSum,
    SpoolError,
    all_counts,
    all_damage,
    all_positions,
    all_pruned,
    all_resent,
    damage_of_file,
    dead_letter_events,
    ledger_sums,
    queue_names,
    reading,
    row_counts,
)
from openmeter_plugin.books.status import QueueFiles, Unaccounted, books_numbers
from openmeter_plugin.books.store import LedgerKey, Lines
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.reader import Position, read_segment
from openmeter_plugin.spool.segment import EVENTS, MAGIC, Damage, Record
from openmeter_plugin.units import plural

_MAX_ATTEMPTS: Final = 5
_MAX_DIFFERENCES: Final = 1_000  # listed; the rest is counted


@dataclass(slots=True)
class _Books:
    """Everything in the books that is checked, read in one transaction."""

    counts: dict[str, Counts]
    positions: dict[str, dict[str, Position]]
    resent: dict[str, set[tuple[str, int]]]
    damage: dict[str, set[tuple[str, Damage]]]
    ledger: dict[str, LedgerSum]
    pruned: dict[str, Pruned]
    dead: dict[str, Lines]
    damaged: str | None
    quarantined: int


@dataclass(slots=True)
class _Recount:
    """Counts of what the segments of a queue hold."""

    records: int = 0
    events: int = 0
    accounted_events: int = 0
    damaged_bytes: int = 0
    damaged_accounted: int = 0
    new_damage: list[str] = field(default_factory=list)
    waiting: Lines = field(default_factory=Counter)
    not_accounted: Unaccounted = field(default_factory=Unaccounted)
    differences: list[str] = field(default_factory=list)


class _SegmentRemovedError(Exception):
    """A segment with waiting events was delivered and removed during the verification."""


def verify(spool: Path) -> Verification:
    """Check everything; raises SpoolError if the books cannot be read at all."""
    for _ in range(_MAX_ATTEMPTS):
        try:
            return _verify(spool)
        except _SegmentRemovedError:
            continue
    raise SpoolError(
        "segments are removed faster than they can be read; try again when there is less traffic"
    )


def _verify(spool: Path) -> Verification:
    books = _read_books(spool)
    differences = [f"books: {books.damaged}"] if books.damaged else []
    recounts: list[_Recount] = []
    segments = size = 0
    for queue in queue_names(spool, books.counts):
        files = QueueFiles.of(spool, queue, books.positions.get(queue, {}), books.resent.get(queue, ()))
        recount = _recount(files, books.damage.get(queue, set()))
        recounts.append(recount)
        segments += len(files.sizes)
        size += sum(files.sizes.values())
        found = [*recount.differences, *_differences(queue, books, recount)]
        differences += [f"{queue}: {difference}" for difference in found]
    counted = sum(counts["quarantined", ""] for counts in books.counts.values())
    if counted != books.quarantined:
        differences.append(
            f"the counts have {plural(counted, 'request')} in quarantine,"
            f" the quarantine has {books.quarantined}"
        )
    listed = differences[:_MAX_DIFFERENCES]
    if len(differences) > len(listed):
        listed.append(f"and {len(differences) - len(listed)} more")
    return Verification(
        ok=not differences,
        differences=listed,
        segments=segments,
        records=sum(r.records for r in recounts),
        events=sum(r.events for r in recounts),
        waiting=sum(r.waiting.total() for r in recounts),
        not_accounted=NotAccounted(
            requests=sum(r.not_accounted.requests for r in recounts),
            events=sum(r.not_accounted.events for r in recounts),
            lost=sum(r.not_accounted.lost for r in recounts),
        ),
        bytes=size,
        damaged_bytes=sum(r.damaged_bytes for r in recounts),
        ledger_lines=sum(ledger.lines for ledger in books.ledger.values()),
        pruned_events=sum(pruned.events for pruned in books.pruned.values()),
    )


def _read_books(spool: Path) -> _Books:
    with reading(spool) as db:
        damaged = damage_of_file(db)
        dead: dict[str, Lines] = {}
        for queue, event in dead_letter_events(db):
            dead.setdefault(queue, Counter())[ledger_key(orjson.loads(event))] += 1
        return _Books(
            counts=all_counts(db),
            positions=all_positions(db),
            resent=all_resent(db),
            damage=all_damage(db),
            ledger=ledger_sums(db),
            pruned=all_pruned(db),
            dead=dead,
            damaged=damaged,
            quarantined=row_counts(db)[1],
        )


def _recount(files: QueueFiles, known: Collection[tuple[str, Damage]]) -> _Recount:
    recount = _Recount()
    for name, size in files.sizes.items():
        position = files.position(name)
        if position.delivered > max(position.accounted, len(MAGIC)):
            recount.differences.append(
                f"{name} is delivered up to {position.delivered}, but accounted for up to"
                f" {position.accounted}"
            )
        path = files.directory / name
        try:
            with path.open("rb") as file:
                head = file.read(len(MAGIC))
        except FileNotFoundError:
            if position.delivered < size and files.directory.name != QUARANTINE:
                raise _SegmentRemovedError from None
            continue
        except OSError as error:
            recount.differences.append(f"{name} cannot be read: {error.strerror}")
            continue
        if head != MAGIC[: len(head)]:  # may be shorter: a power loss right after its creation
            recount.differences.append(f"{name} does not start with a segment header")
        if position.accounted > size:
            recount.differences.append(
                f"{name} is accounted for up to {position.accounted}, but has {plural(size, 'byte')}"
            )
        try:
            for item in read_segment(path):
                _add(recount, files, name, item, known)
        except OSError as error:
            recount.differences.append(f"{name} cannot be read to its end: {error.strerror}")
    return recount


def _add(
    recount: _Recount,
    files: QueueFiles,
    name: str,
    item: Record | Damage,
    known: Collection[tuple[str, Damage]],
) -> None:
    position = files.position(name)
    if isinstance(item, Damage):
        size = item.end - item.start
        recount.damaged_bytes += size
        if item.end <= position.accounted:
            recount.damaged_accounted += size
            if (name, item) not in known:
                when = "after" if item.end <= position.delivered else "before"
                recount.new_damage.append(
                    f"{size} bytes at {item.start} of {name} were damaged {when} delivery"
                )
        return
    recount.records += 1
    count = item.event_count if item.kind == EVENTS else 0
    recount.events += count
    if item.end > position.accounted:
        recount.not_accounted.add(item)
        return
    if not files.is_sent(name, item):
        return
    recount.accounted_events += count
    summary = summary_of(item) if item.end > position.delivered else None
    if summary is not None:
        add_lines(recount.waiting, summary)


def _differences(queue: str, books: _Books, recount: _Recount) -> list[str]:
    """Return the differences within one queue."""
    counts = books.counts.get(queue, Counter())
    ledger = books.ledger.get(queue, LedgerSum())
    pruned = books.pruned.get(queue, Pruned("", 0, 0)).events
    book = books_numbers(counts)
    found = [violation.text for violation in violations(counts)]
    waiting = recount.waiting.total()
    if book.waiting != waiting:
        waits = plural(book.waiting, "event waits", "events wait")
        found.append(f"{waits} by the counts, but {waiting} in the segments")
    for name, value, total, pruned_events in (
        ("accepted", book.events, ledger.total.accepted, pruned),
        ("delivered", book.delivered, ledger.total.delivered, pruned),
        ("dead-lettered", book.dead_lettered, ledger.total.dead_lettered, 0),
        ("lost", sum(book.lost_events.values()), ledger.total.lost, 0),
    ):
        if total + pruned_events != value:
            found.append(
                f"{name} events are {value} in the counts and {total} in the ledger,"
                f" with {pruned_events} pruned"
            )
    if recount.damaged_accounted > counts["damaged_bytes", ""]:
        # Books of versions before 0.1.0 do not know which bytes are damaged, only how many.
        found.append(
            f"damaged in the segments: {plural(recount.damaged_accounted, 'byte')}, but only"
            f" {counts['damaged_bytes', '']} when they were accounted for"
        )
        found += recount.new_damage
    return found + _ledger_differences(ledger.open, recount.waiting, books.dead.get(queue, Counter()))


def _ledger_differences(lines: dict[LedgerKey, LedgerEntry], waiting: Lines, dead: Lines) -> list[str]:
    found = []
    for key in sorted(lines.keys() | waiting.keys() | dead.keys()):
        line = lines.get(key)
        if line is None:
            found.append(
                f"ledger {key.hour} {key.type} {key.subject}: the line is missing or settled,"
                f" but {plural(waiting[key], 'event waits', 'events wait')} and"
                f" {plural(dead[key], 'dead letter is', 'dead letters are')} there"
            )
            continue
        if line.accepted != line.delivered + line.dead_lettered + line.lost + waiting[key]:
            found.append(
                f"ledger {key.hour} {key.type} {key.subject}: accepted {line.accepted}, but delivered"
                f" {line.delivered} + dead-lettered {line.dead_lettered} + lost {line.lost}"
                f" + waiting {waiting[key]}"
            )
        if line.dead_lettered != dead[key]:
            found.append(
                f"ledger {key.hour} {key.type} {key.subject}: dead-lettered {line.dead_lettered},"
                f" but {plural(dead[key], 'dead letter is', 'dead letters are')} there"
            )
    return found
