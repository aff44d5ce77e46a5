"""Accounting: what was handed over is counted as soon as it is in the spool, delivered or not.

Delivery goes no further than accounting, so every event is in the books before it is sent. A request that
Kong handed over twice, because its connection broke, is recognised here by the id of its first event: the
second is counted as resent and not sent at all.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, KeysView
from pathlib import Path
from typing import Final

import orjson

from openmeter_plugin.books.ledger_lines import add_alike, add_lines, summary_of
from openmeter_plugin.books.store import Accounting, Books
from openmeter_plugin.log import get_logger
from openmeter_plugin.metering.lenient_json import json_object
from openmeter_plugin.spool.destination import queues_directory, write_atomically
from openmeter_plugin.spool.reader import (
    UNREADABLE,
    Chunk,
    Other,
    QueueReader,
    SegmentReader,
    read_chunk,
    segment_names,
)
from openmeter_plugin.spool.segment import (
    EVENTS,
    HEAD_SIZE,
    LOST,
    MAGIC,
    QUARANTINED,
    SKIPPED,
    SUFFIX,
    Damage,
    Record,
)

# MERGED: The ids of the last requests, by which one that Kong hands over a second time is known.


class RecentIds:
    """Remembers so many ids at most, and half as many at least.

    In two halves, of which the older is forgotten as a whole: forgetting one by one would cost more than
    remembering.
    """

    def __init__(self, most: int) -> None:
        self._half = max(1, most // 2)
        self._younger: dict[bytes, None] = {}
        self._older: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)

    def __contains__(self, event_id: bytes) -> bool:
        return event_id in self._younger or event_id in self._older

    def has_none_of(self, ids: KeysView[bytes]) -> bool:
        """Tell whether none of the ids is remembered."""
        return ids.isdisjoint(self._younger.keys()) and ids.isdisjoint(self._older.keys())

    def remember(self, ids: Iterable[bytes]) -> None:
        """Remember ids, the last of them in any case."""
        new = list(ids)[-self._half :]
        if len(self._younger) + len(new) > self._half:
            self._older, self._younger = self._younger, {}
        self._younger.update(dict.fromkeys(new))


__all__ = ["MOST_RECORDS", "Accountant", "add_lines", "summary_of"]

MOST_RECORDS: Final = 5_000
"""Of one commit, or a few more: what is read at once is accounted for at once."""

_REMEMBERED: Final = 50_000
"""Ids by which a request that comes again is known. Kong sends it again at once, so seconds are enough."""

_SEGMENTS_REMEMBERED: Final = 8  # after a restart, the last of each
_BYTES_REMEMBERED: Final = 2 * 1024 * 1024


class Accountant:
    """Accounts for one queue."""

    def __init__(self, spool: Path, queue: str, books: Books) -> None:
        self._spool = spool
        self._queue = queue
        self._books = books
        self._log = get_logger().bind(queue=queue)
        self._directory = queues_directory(spool) / queue
        positions = books.positions(queue)
        present = set(segment_names(self._directory))
        for segment in positions.keys() - present - _set_aside(self._directory):
            books.forget(queue, segment)
        self.accounted = {name: p.accounted for name, p in positions.items() if name in present}
        """The offset up to which each segment is accounted for: as far as it may be delivered."""
        self.finished: set[str] = set()
        """The segments that are accounted for to the end and will never grow."""
        self.resent: dict[str, set[int]] = {}
        """By segment, the offset behind each record that must not be sent."""
        self._add_resent(books.resent(queue))
        self.read: dict[str, list[Chunk]] = {}
        """What the last `work` has read of each segment: who delivers need not read it again."""
        self._recent = RecentIds(_REMEMBERED)
        self._remember()
        self.reader = QueueReader(self._directory, dict(self.accounted))

    def close(self) -> None:
        """Close the files."""
        self.reader.close()

    def work(self) -> int:
        """Account for what has come, some MOST_RECORDS at once; returns how many records that was.

        Raises sqlite3.Error; what was read then is read again.
        """
        read: dict[str, list[Chunk]] = {}
        touched: list[SegmentReader] = []
        number = 0
        for segment in self.reader.segments():
            touched.append(segment)
            while number < MOST_RECORDS and self.reader.chunk(segment) is not None:
                chunk = segment.take()
                read.setdefault(segment.name, []).append(chunk)
                number += chunk.records
            if number >= MOST_RECORDS:
                break
        if read:
            self._account(read)
        for segment in touched:
            if segment.exhausted and segment.chunk() is None:
                self.accounted.setdefault(segment.name, 0)
                self.finished.add(segment.name)
                self.reader.done(segment.name)
        return number

    def forget(self, segment: str) -> None:
        """Forget a segment whose file is removed."""
        self.finished.discard(segment)
        self.accounted.pop(segment, None)
        self.resent.pop(segment, None)
        self.reader.forget(segment)

    def _account(self, read: dict[str, list[Chunk]]) -> None:
        accounting = Accounting(positions={name: chunks[-1].end for name, chunks in read.items()})
        fresh: dict[bytes, None] = {}
        alike: Counter[bytes] = Counter()
        for name, chunks in read.items():
            for chunk in chunks:
                self._enter_usage(name, chunk, accounting, fresh, alike)
                for other in chunk.others:
                    self._enter_other(name, other, accounting, fresh)
        accounting.counts["metered", ""] += alike.total()
        accounting.counts["events", ""] += add_alike(accounting.accepted, alike)
        accounting.count_requests()
        try:
            self._books.account(self._queue, accounting)
        except BaseException:
            for name, chunks in read.items():
                self.reader.start_over(name, chunks[0].start)
            raise
        self.accounted |= accounting.positions
        self._add_resent(accounting.resent)
        self._add_resent(accounting.unsendable)
        self._recent.remember(fresh)
        self.read = read

    def _enter_usage(
        self,
        segment: str,
        chunk: Chunk,
        accounting: Accounting,
        fresh: dict[bytes, None],
        alike: Counter[bytes],
    ) -> None:
        """Enter a chunk's usage: `fresh` takes the ids that are in no committed entry, `alike` the rests."""
        ids = dict.fromkeys(chunk.ids)
        unique = len(ids) == len(chunk.ids) and b"" not in ids
        if unique and self._recent.has_none_of(ids.keys()) and ids.keys().isdisjoint(fresh.keys()):
            # What nearly all of them are: none without a summary, none that came before.
            fresh.update(ids)
            alike.update(chunk.rests)
            return
        for row, (event_id, rest) in enumerate(zip(chunk.ids, chunk.rests, strict=True)):
            if not rest:
                self._enter_other(segment, chunk.record(row), accounting, fresh)
            elif event_id in self._recent or event_id in fresh:
                accounting.resent.append((segment, chunk.ends[row]))
            else:
                fresh[event_id] = None
                alike[rest] += 1

    def _enter_other(
        self, segment: str, record: Other, accounting: Accounting, fresh: dict[bytes, None]
    ) -> None:
        """Enter what is no usage, or usage without a summary."""
        if isinstance(record, Damage):
            self._enter_damage(segment, record, accounting)
            return
        counts = accounting.counts
        kind, body = record.kind, record.body
        event_id = _id_of(record)
        if kind == SKIPPED:
            counts["skipped", body.decode("utf-8", "replace")] += 1
        elif kind == LOST and (loss := _loss(body)):
            counts["lost", loss[0]] += loss[1]
        elif event_id is None or kind not in (EVENTS, QUARANTINED):
            # Its checksum is right, so it is not the disk: a later version wrote it, or a fault of ours.
            self._enter_damage(
                segment, Damage(record.end - len(body) - 1 - HEAD_SIZE, record.end), accounting
            )
            accounting.unsendable.append((segment, record.end))
        elif event_id and (event_id in self._recent or event_id in fresh):
            accounting.resent.append((segment, record.end))
        else:
            if event_id:
                fresh[event_id] = None
            if kind == QUARANTINED:
                accounting.quarantined.append((str(json_object(orjson.loads(body)).get("reason")), body))
            elif (summary := summary_of(record)) is not None:
                counts["metered", ""] += 1
                counts["events", ""] += len(summary.types)
                add_lines(accounting.accepted, summary)

    def _enter_damage(self, segment: str, damage: Damage, accounting: Accounting) -> None:
        """Count damaged bytes and keep them aside: somebody may still make something of them."""
        size = damage.end - damage.start
        accounting.counts["damaged_bytes", ""] += size
        aside = self._spool / "damaged" / f"{self._queue}-{segment}-{damage.start}"
        with contextlib.suppress(OSError):
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            with (self._directory / segment).open("rb") as file:
                file.seek(damage.start)
                write_atomically(aside, file.read(size))
        self._log.error("spool_damaged", segment=segment, offset=damage.start, size=size)

    def _remember(self) -> None:
        """Learn the ids again that were accounted for last, before a restart.

        What comes again stood at the end of a segment, whose writer was killed or was cut off from Kong.
        """
        found = []
        for name in self.accounted:
            with contextlib.suppress(OSError):
                found.append(((self._directory / name).stat().st_mtime, name))
        for _, name in sorted(found)[-_SEGMENTS_REMEMBERED:]:
            end = self.accounted[name]
            start = max(len(MAGIC), end - _BYTES_REMEMBERED)
            with contextlib.suppress(OSError), (self._directory / name).open("rb") as file:
                file.seek(start)
                self._remember_chunk(read_chunk(file.read(end - start), start, final=True))

    def _remember_chunk(self, chunk: Chunk) -> None:
        without_summary = [chunk.record(row) for row, rest in enumerate(chunk.rests) if not rest]
        others = [item for item in [*without_summary, *chunk.others] if isinstance(item, Record)]
        self._recent.remember(filter(None, [*chunk.ids, *map(_id_of, others)]))

    def _add_resent(self, records: Iterable[tuple[str, int]]) -> None:
        for segment, end in records:
            self.resent.setdefault(segment, set()).add(end)


def _id_of(record: Record) -> bytes | None:
    """Return what a request is known by, None where the record is none or nothing can be read in it.

    Empty where it has no id: then it cannot be known again, so it is one of its own.
    """
    if record.kind == EVENTS:
        summary = summary_of(record)
        return None if summary is None else summary.first_id.encode()
    if record.kind != QUARANTINED:
        return None
    try:
        kept = json_object(orjson.loads(record.body))
    except orjson.JSONDecodeError:
        return None
    event_id = json_object(json_object(kept.get("log")).get("request")).get("id")
    return str(event_id).encode() if event_id else b""


def _loss(body: bytes) -> tuple[str, int] | None:
    try:
        loss = json_object(orjson.loads(body))
        return str(loss["reason"]), int(loss["count"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def _set_aside(directory: Path) -> set[str]:
    """Return the names of the segments that were set aside: what is known of them is kept."""
    with contextlib.suppress(OSError):
        return {path.stem for path in directory.glob(f"*{SUFFIX}{UNREADABLE}")}
    return set()
