"""The accountant: counts records in the books as soon as they are in the spool, delivered or not.

Delivery never passes accounting, so every event is in the books before it is sent. If a connection breaks,
Kong may hand over a request twice. The accountant recognises the second by the id of its first event,
counts it as resent, and it is not sent.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, KeysView
from pathlib import Path
from typing import Final

import orjson

from openmeter_plugin.books.ledger_lines import add_lines, add_usage, summary_of
from openmeter_plugin.books.store import Accounting, Books
from openmeter_plugin.log import get_logger
from openmeter_plugin.metering.lenient_json import json_object
from openmeter_plugin.metering.rules import SkipReason
from openmeter_plugin.spool.destination import queues_directory, write_atomically
from openmeter_plugin.spool.reader import (
    Chunk,
    Other,
    QueueReader,
    SegmentReader,
    Tries,
    read_span,
)
from openmeter_plugin.spool.segment import (
    EVENTS,
    HEAD_SIZE,
    LOST,
    MAGIC,
    QUARANTINED,
    SKIPPED,
    Damage,
    Record,
    gap_of_usage_key,
)

MAX_RECORDS: Final = 5_000
"""Records per commit, or a few more: a chunk is never split."""

_MAX_RECENT_IDS: Final = 50_000  # Kong resends at once, so the ids of a few seconds are enough
_RECENT_SEGMENTS: Final = 8  # segments whose last ids are read again after a restart
_RECENT_BYTES: Final = 2 * 1024 * 1024  # read at the end of each of them


class RecentIds:
    """The ids of the last requests, to detect those that Kong resends.

    Holds at most `maximum` ids and at least half as many, in two halves. The older half is dropped as a
    whole: dropping ids one by one would cost more than adding them.
    """

    def __init__(self, maximum: int) -> None:
        self._half = max(1, maximum // 2)
        self._younger: dict[bytes, None] = {}
        self._older: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)

    def __contains__(self, event_id: bytes) -> bool:
        return event_id in self._younger or event_id in self._older

    def isdisjoint(self, ids: KeysView[bytes]) -> bool:
        """Return whether none of the ids is among the recent ones."""
        return ids.isdisjoint(self._younger.keys()) and ids.isdisjoint(self._older.keys())

    def add(self, ids: Iterable[bytes]) -> None:
        """Add ids; if they are too many, the last ones."""
        new = list(ids)[-self._half :]
        if len(self._younger) + len(new) > self._half:
            self._older, self._younger = self._younger, {}
        self._younger.update(dict.fromkeys(new))


class Accountant:
    """Counts the records of one queue in the books, and moves the reader's `accounted` cursors."""

    def __init__(self, spool: Path, queue: str, books: Books, reader: QueueReader) -> None:
        self._spool = spool
        self._queue = queue
        self._books = books
        self._reader = reader
        self._log = get_logger().bind(queue=queue)
        self._directory = queues_directory(spool) / queue
        self._recent = RecentIds(_MAX_RECENT_IDS)
        reader.find()
        self._unrestored = self._last_segments()
        self._restore_tries = Tries()

    def work(self) -> int | None:
        """Count new records, about MAX_RECORDS at once; returns how many, or None if it cannot begin yet.

        Raises sqlite3.Error; the same records are then read again.
        """
        if not self._restore_recent_ids():
            return None
        read: dict[SegmentReader, list[Chunk]] = {}
        number = 0
        self._reader.find()
        for segment in self._reader.segments:
            while number < MAX_RECORDS and (chunk := self._reader.next_unaccounted(segment)) is not None:
                read.setdefault(segment, []).append(chunk)
                number += chunk.records
            if number >= MAX_RECORDS:
                break
        if read:
            self._account(read)
        return number

    def _account(self, read: dict[SegmentReader, list[Chunk]]) -> None:
        accounting = Accounting(positions={segment.name: chunks[-1].end for segment, chunks in read.items()})
        new_ids: dict[bytes, None] = {}
        by_usage_key: Counter[bytes] = Counter()
        for segment, chunks in read.items():
            for chunk in chunks:
                self._count_usage(segment.name, chunk, accounting, new_ids, by_usage_key)
                for other in chunk.others:
                    self._count_other(segment.name, other, accounting, new_ids)
        accounting.counts["metered", ""] += by_usage_key.total()
        accounting.counts["events", ""] += add_usage(accounting.accepted, by_usage_key)
        for usage_key, requests in by_usage_key.items():
            accounting.count_gap(gap_of_usage_key(usage_key), requests)
        accounting.count_requests()
        try:
            self._books.account(self._queue, accounting)
        except BaseException:
            for segment in read:
                segment.rollback()
            raise
        self._reader.add_unsent([*accounting.resent, *accounting.unsendable])
        self._reader.commit(read)
        self._recent.add(new_ids)

    def _count_usage(
        self,
        segment: str,
        chunk: Chunk,
        accounting: Accounting,
        new_ids: dict[bytes, None],
        by_usage_key: Counter[bytes],
    ) -> None:
        """Count a chunk's usage; adds its ids to `new_ids` and its requests to `by_usage_key`."""
        ids = dict.fromkeys(chunk.ids)
        unique = len(ids) == len(chunk.ids) and b"" not in ids
        if unique and self._recent.isdisjoint(ids.keys()) and ids.keys().isdisjoint(new_ids.keys()):
            # Fast path for nearly all chunks: every record has a summary and none is resent.
            new_ids.update(ids)
            by_usage_key.update(chunk.usage_keys)
            return
        for row, (event_id, usage_key) in enumerate(zip(chunk.ids, chunk.usage_keys, strict=True)):
            if not usage_key:
                self._count_other(segment, chunk.record(row), accounting, new_ids)
            elif event_id in self._recent or event_id in new_ids:
                accounting.resent.append((segment, chunk.ends[row]))
            else:
                new_ids[event_id] = None
                by_usage_key[usage_key] += 1

    def _count_other(
        self, segment: str, record: Other, accounting: Accounting, new_ids: dict[bytes, None]
    ) -> None:
        """Count a record that is not usage, usage without a summary, or damage."""
        if isinstance(record, Damage):
            self._count_damage(segment, record, accounting)
            return
        counts = accounting.counts
        kind, body = record.kind, record.body
        event_id = _id_of(record)
        if kind == SKIPPED:
            reason = body.decode("utf-8", "replace")
            counts["skipped", reason] += 1
            accounting.count_gap(reason if reason == SkipReason.AI_STATISTICS_OFF else None)
        elif kind == LOST and (loss := _parse_loss(body)):
            counts["lost", loss[0]] += loss[1]
        elif event_id is None or kind not in (EVENTS, QUARANTINED):
            # Its checksum is right, so the disk is fine: a later version or an internal error wrote it.
            self._count_damage(
                segment, Damage(record.end - len(body) - 1 - HEAD_SIZE, record.end), accounting
            )
            accounting.unsendable.append((segment, record.end))
        elif event_id and (event_id in self._recent or event_id in new_ids):
            accounting.resent.append((segment, record.end))
        else:
            if event_id:
                new_ids[event_id] = None
            if kind == QUARANTINED:
                accounting.quarantined.append((str(json_object(orjson.loads(body)).get("reason")), body))
            elif (summary := summary_of(record)) is not None:
                counts["metered", ""] += 1
                counts["events", ""] += len(summary.types)
                accounting.count_gap(summary.gap)
                add_lines(accounting.accepted, summary)

    def _count_damage(self, segment: str, damage: Damage, accounting: Accounting) -> None:
        """Count damaged bytes and save a copy of them, which a person may still be able to recover."""
        size = damage.end - damage.start
        accounting.counts["damaged_bytes", ""] += size
        accounting.damage.append((segment, damage))
        copy_damage(self._spool, self._queue, segment, damage)
        self._log.error("spool_damaged", segment=segment, offset=damage.start, size=size)

    def _last_segments(self) -> list[SegmentReader]:
        """Return the segments with the ids that were counted last before a restart, oldest first.

        A resent request is at the end of a segment, whose writer was killed or lost its connection to Kong.
        """
        found = []
        for segment in self._reader.segments:
            if segment.accounted <= len(MAGIC):
                continue  # a backlog has many of these
            with contextlib.suppress(OSError):
                found.append((segment.path.stat().st_mtime, segment.name, segment))
        return [segment for _, _, segment in sorted(found)[-_RECENT_SEGMENTS:]]

    def _restore_recent_ids(self) -> bool:
        """Read the ids of the last segments; returns whether that is done, so that accounting may begin.

        A disk that fails to read is tried again: without the ids, a resent request would be counted again.
        """
        if not self._unrestored or time.monotonic() < self._restore_tries.again_at:
            return not self._unrestored
        unread = []
        for segment in self._unrestored:
            try:
                self._restore_ids_of(segment)
            except OSError as error:
                unread.append(segment)
                self._log.error("recent_ids_unreadable", segment=segment.name, reason=error.strerror)
        self._unrestored = [] if unread and self._restore_tries.fail() else unread
        return not self._unrestored

    def _restore_ids_of(self, segment: SegmentReader) -> None:
        end = segment.accounted
        start = max(len(MAGIC), end - _RECENT_BYTES)
        with contextlib.suppress(FileNotFoundError), segment.path.open("rb") as file:
            self._add_ids_of(read_span(file.fileno(), start, end, end - start))

    def _add_ids_of(self, chunk: Chunk) -> None:
        without_summary = [chunk.record(row) for row, key in enumerate(chunk.usage_keys) if not key]
        others = [item for item in [*without_summary, *chunk.others] if isinstance(item, Record)]
        self._recent.add(filter(None, [*chunk.ids, *map(_id_of, others)]))


def copy_damage(spool: Path, queue: str, segment: str, damage: Damage) -> None:
    """Save a copy of damaged bytes under `damaged`, as far as the disk allows."""
    copy = spool / "damaged" / f"{queue}-{segment}-{damage.start}"
    with contextlib.suppress(OSError):
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        with (queues_directory(spool) / queue / segment).open("rb") as file:
            file.seek(damage.start)
            write_atomically(copy, file.read(damage.end - damage.start))


def _id_of(record: Record) -> bytes | None:
    """Return the id that identifies a request; None if the record is no request or cannot be parsed.

    Returns an empty id if the request has none: it then counts as new, since it cannot be recognised.
    """
    if record.kind == EVENTS:
        summary = summary_of(record)
        return None if summary is None else summary.first_id.encode()
    if record.kind != QUARANTINED:
        return None
    try:
        quarantined = json_object(orjson.loads(record.body))
    except orjson.JSONDecodeError:
        return None
    event_id = json_object(json_object(quarantined.get("log")).get("request")).get("id")
    return str(event_id).encode() if event_id else b""


def _parse_loss(body: bytes) -> tuple[str, int] | None:
    try:
        loss = json_object(orjson.loads(body))
        return str(loss["reason"]), int(loss["count"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
