"""Chunks hold in columns what `scan` finds, whatever the bytes are; batches are slices of chunks."""

from __future__ import annotations

import contextlib
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import orjson
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.delivery.pipeline import Batch, BatchReader
from openmeter_plugin.spool.destination import queues_directory
from openmeter_plugin.spool.reader import Chunk, QueueReader, read_chunk
from openmeter_plugin.spool.segment import (
    EVENTS,
    LOST,
    MAGIC,
    MARKER,
    SKIPPED,
    Damage,
    Record,
    encode_events,
    encode_record,
    encode_usage,
    item_at,
)
from tests.plugin.deliveries import event, ids, record
from tests.plugin.spools import QUEUE

texts = st.text(st.characters(codec="utf-8"), max_size=12)
usages = st.builds(
    lambda events, types, first_id, subject: encode_usage(
        events, types, "2026-11-22T07:00:00Z", first_id, subject
    ),
    st.lists(st.binary(max_size=30), min_size=1, max_size=3),
    st.lists(st.sampled_from(["kong.api_request", "kong.llm_request", "another"]), max_size=3),
    texts,
    texts,
)
records = st.one_of(
    usages,
    st.builds(encode_events, st.lists(st.binary(max_size=30), min_size=1, max_size=2)),
    texts.map(lambda reason: encode_record(SKIPPED + reason.encode())),
    st.just(encode_record(LOST + b'{"count":1,"reason":"disk"}')),
    st.binary(max_size=6).map(lambda body: encode_record(EVENTS + body)),
)
noise = st.one_of(
    st.binary(max_size=40),
    st.just(MARKER),
    st.just(MARKER + struct.pack("<II", 5, 0)),
    records.map(lambda whole: whole[:-1]),
)
contents = st.lists(st.one_of(records, records, records, noise), max_size=12).map(b"".join)


def scan(data: bytes, base: int, *, final: bool) -> Iterator[Record | Damage]:
    """Yield what is in `data`, item by item."""
    at = 0
    while at < len(data) and (item := item_at(data, at, base, final=final)) is not None:
        yield item
        at = item.end - base


def rows(chunk: Chunk) -> dict[int, tuple[int, bytes, bytes, bytes]]:
    columns = (chunk.counts, chunk.events, chunk.ids, chunk.usage_keys)
    return dict(zip(chunk.ends, zip(*columns, strict=True), strict=True))


def usage_of(item: Record | Damage) -> tuple[int, bytes, bytes, bytes] | None:
    """Return a record's row, or None if it is not usage or its lengths do not fit."""
    if not isinstance(item, Record) or item.kind != EVENTS:
        return None
    with contextlib.suppress(IndexError):
        size = item.body[1] + 256 * item.body[2]
        events = item.body[3 + size :]
        summary = item.body[3 : 3 + size]
        behind_id = 2 + summary[0] + 256 * summary[1] if size else 0
        if events and behind_id <= size:
            return item.body[0], events, summary[2:behind_id], summary[behind_id:]
    return None


@given(contents, st.booleans(), st.integers(0, 10**12))
def test_a_chunk_holds_what_a_scan_finds_and_ends_where_it_ends(data: bytes, final: bool, base: int) -> None:
    found = list(scan(data, base, final=final))
    chunk = read_chunk(data, base, final=final)
    assert (chunk.start, chunk.end) == (base, found[-1].end if found else base)
    assert chunk.records == len(found)
    assert [item.end for item in chunk.items()] == [item.end for item in found]
    odd_summary = [
        n for n, item in enumerate(found) if isinstance(item, Record) and item.body[1:3] == b"\2\0"
    ]
    pairs = enumerate(zip(chunk.items(), found, strict=True))
    assert all(item == same for n, (item, same) in pairs if n not in odd_summary)
    assert list(chunk.ends) == sorted(chunk.ends)
    usage = {item.end: row for item in found if (row := usage_of(item)) is not None}
    # Usage that is too short for the fast path may be among the others.
    odd = {item.end: row for item in chunk.others if (row := usage_of(item)) is not None}
    assert rows(chunk) | odd == usage
    assert [item for item in chunk.others if item.end not in odd] == [
        item for item in found if item.end not in usage
    ]
    assert all(len(events) < 2 for _, events, _, _ in odd.values())


@given(contents, st.integers(1, 300))
def test_reading_in_pieces_finds_the_same_records(data: bytes, size: int) -> None:
    whole = read_chunk(data, 0, final=True)
    ends: list[int] = []
    records, at, step = 0, 0, size
    while at < len(data):
        at_end = at + step >= len(data)
        chunk = read_chunk(data[at : at + step], at, final=at_end)
        ends += chunk.ends
        records += sum(isinstance(item, Record) for item in chunk.others)
        step = size if chunk.end > at else step * 4
        at = chunk.end
    assert ends == whole.ends
    assert records == sum(isinstance(item, Record) for item in whole.others)


def test_usage_without_a_summary_can_be_converted_back_to_a_record() -> None:
    chunk = read_chunk(encode_events([event(1), event(2)]), 8, final=True)
    assert (chunk.ids, chunk.usage_keys) == ([b""], [b""])
    found = chunk.record(0)
    assert (found.event_count, found.events, found.summary) == (2, event(1) + b"," + event(2), None)
    assert found.end == chunk.ends[0]


# Batches


def events_of(counts: list[int], unsent: set[int]) -> list[str]:
    return [
        event_id
        for number, count in enumerate(counts)
        if number not in unsent
        for event_id in ids(range(10 * number, 10 * number + count))
    ]


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=30),
    st.lists(st.integers(1, 7), min_size=1, max_size=30),
    st.sets(st.integers(0, 29)),
    st.lists(st.integers(0, 29)),
)
def test_batches_hold_every_event_once_in_order_except_the_unsent_and_keep_to_their_limits(
    counts: list[int], limits: list[int], unsent: set[int], accounted: list[int]
) -> None:
    content, ends = MAGIC, []
    for number, count in enumerate(counts):
        content += record(*range(10 * number, 10 * number + count))
        ends.append(len(content))
    with tempfile.TemporaryDirectory() as directory:
        queue = queues_directory(Path(directory)) / QUEUE
        queue.mkdir(parents=True)
        (queue / "0.seg").write_bytes(content)
        never = [("0.seg", ends[number]) for number in unsent if number < len(ends)]
        with closing(QueueReader(queue, {}, unsent=never)) as reader:
            batches = BatchReader(reader)
            (segment,) = reader.find()
            sent: list[str] = []
            for step in [*sorted(accounted), len(ends) - 1]:
                limit = ends[min(step, len(ends) - 1)]
                segment.accounted = limit
                for most in [*limits, *[5] * 200]:
                    batch = Batch()
                    all_there_is = batches.extend(batch, most)
                    found = [e["id"] for e in orjson.loads(b"[" + b",".join(batch.events) + b"]")]
                    assert len(found) == batch.event_count == batch.lines().total()
                    assert len(found) <= most or len(batch.events) == 1
                    sent += found
                    if not batch.positions:
                        break
                    position = batch.positions["0.seg"]
                    assert position <= limit
                    assert sent == events_of(counts[: bisect_right(ends, position)], unsent)
                    assert all_there_is or position < limit
                assert sent == events_of(counts[: bisect_right(ends, limit)], unsent)
    assert sent == events_of(counts, unsent)


def test_a_record_whose_id_is_longer_than_its_summary_is_not_usage() -> None:
    summary = struct.pack("<H", 500) + b"id"
    whole = encode_record(EVENTS + struct.pack("<BH", 1, len(summary)) + summary + event(1))
    chunk = read_chunk(record(0) + whole + record(2), 0, final=True)
    assert chunk.ids == [b"event-000000", b"event-000002"]
    (other,) = chunk.others
    assert isinstance(other, Record)
    assert other.kind == EVENTS
