"""The spool's file format: whatever happens to a file, a reader finds the valid records and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.metering.ai_events import A2A_REQUEST, LLM_CACHE_HIT, LLM_CALL, LLM_REQUEST, MCP_REQUEST
from openmeter_plugin.metering.ai_usage import AiUsageGap
from openmeter_plugin.metering.event import API_REQUEST
from openmeter_plugin.spool.segment import (
    EVENTS,
    HEAD_SIZE,
    LOST,
    MAGIC,
    MARKER,
    MAX_EVENTS,
    MAX_PAYLOAD,
    QUARANTINED,
    SKIPPED,
    Damage,
    Record,
    Summary,
    encode_events,
    encode_record,
    encode_usage,
)
from tests.plugin.spools import scan

pytestmark = pytest.mark.slow

KINDS = [API_REQUEST, LLM_REQUEST, LLM_CACHE_HIT, LLM_CALL, MCP_REQUEST, A2A_REQUEST]

kinds = st.sampled_from([EVENTS, SKIPPED, QUARANTINED, LOST])
# Bodies that look like the format itself: markers, heads, whole records.
bodies = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=8).map(lambda b: b + MARKER),
    st.binary(max_size=8).map(lambda b: encode_record(SKIPPED + b) + b),
    st.binary(max_size=8).map(lambda b: encode_record(SKIPPED + b)[: HEAD_SIZE + 1]),
)
# A summary of two bytes is none; the plugin never writes one.
payloads = st.builds(lambda kind, body: kind + body, kinds, bodies).filter(
    lambda payload: payload[:1] != EVENTS or payload[2:4] != b"\x02\x00"
)


def records_of(payloads: list[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return a segment's content after its header, and the span of each record."""
    data = b""
    spans: list[tuple[int, int]] = []
    for payload in payloads:
        record = encode_record(payload)
        spans.append((len(data), len(data) + len(record)))
        data += record
    return data, spans


def found(data: bytes, *, final: bool = True) -> list[bytes]:
    return [item.kind + item.body for item in scan(data, 0, final=final) if isinstance(item, Record)]


def damage(data: bytes, *, final: bool = True) -> list[Damage]:
    return [item for item in scan(data, 0, final=final) if isinstance(item, Damage)]


@given(st.lists(payloads, max_size=8), st.integers(0, 2**40), st.booleans())
def test_written_records_are_read_back_in_their_order_and_place(
    written: list[bytes], base: int, final: bool
) -> None:
    data, spans = records_of(written)
    items: list[Any] = list(scan(data, base, final=final))
    assert [item.kind + item.body for item in items] == written
    assert [item.end for item in items] == [base + end for _, end in spans]


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=MAX_EVENTS))
def test_the_events_of_a_request_are_one_record_with_their_number(events: list[bytes]) -> None:
    (item,) = scan(encode_events(events), len(MAGIC), final=True)
    assert isinstance(item, Record)
    assert (item.kind, item.event_count, item.events) == (EVENTS, len(events), b",".join(events))


def test_a_request_has_at_most_255_events_in_a_record() -> None:
    encode_events([b"{}"] * MAX_EVENTS)
    with pytest.raises(ValueError, match="range"):
        encode_events([b"{}"] * (MAX_EVENTS + 1))


@given(st.lists(payloads, min_size=1, max_size=4), st.data())
def test_a_truncated_file_loses_only_the_record_that_was_cut(
    written: list[bytes], data: st.DataObject
) -> None:
    whole, spans = records_of(written)
    cut = data.draw(st.integers(0, len(whole)))
    complete = [payload for payload, (_, end) in zip(written, spans, strict=True) if end <= cut]
    last = max([end for _, end in spans if end <= cut], default=0)
    items = list(scan(whole[:cut], 0, final=True))
    assert [i.kind + i.body for i in items[: len(complete)] if isinstance(i, Record)] == complete
    # The rest of the cut record may contain valid records that a client wrote into its body.
    torn = items[len(complete) :]
    if cut > last:
        assert torn
        assert torn[-1].end == cut
    else:
        assert torn == []


@given(st.lists(st.binary(max_size=40).filter(lambda b: b"\xf5" not in b), min_size=1, max_size=4), st.data())
def test_a_torn_tail_is_reported_as_exactly_its_remaining_bytes(
    texts: list[bytes], data: st.DataObject
) -> None:
    whole, spans = records_of([SKIPPED + text for text in texts])
    cut = data.draw(st.integers(spans[-1][0] + 1, len(whole) - 1))
    assert damage(whole[:cut]) == [Damage(spans[-1][0], cut)]
    assert found(whole[:cut]) == [SKIPPED + text for text in texts[:-1]]


@given(st.lists(payloads, min_size=1, max_size=4), st.data())
def test_a_record_that_is_still_being_written_is_left_for_the_next_read(
    written: list[bytes], data: st.DataObject
) -> None:
    whole, spans = records_of(written)
    cut = data.draw(st.integers(0, len(whole)))
    complete = [payload for payload, (_, end) in zip(written, spans, strict=True) if end <= cut]
    assert found(whole[:cut], final=False) == complete
    assert damage(whole[:cut], final=False) == []


@given(st.lists(payloads, min_size=1, max_size=5), st.lists(st.integers(0, 400), max_size=4))
def test_repeated_reads_of_a_growing_file_return_each_record_once(
    written: list[bytes], cuts: list[int]
) -> None:
    whole, _ = records_of(written)
    read: list[bytes] = []
    position = 0
    for cut in [*sorted(min(cut, len(whole)) for cut in cuts), len(whole)]:
        for item in scan(whole[position:cut], position, final=False):
            assert isinstance(item, Record)
            read.append(item.kind + item.body)
            position = item.end
    assert read == written
    assert position == len(whole)


plain = payloads.filter(lambda payload: b"\xf5" not in payload)


@settings(max_examples=300)
@given(st.lists(plain, min_size=1, max_size=5), st.data())
def test_a_flipped_byte_loses_at_most_its_record_and_never_makes_a_wrong_one(
    written: list[bytes], data: st.DataObject
) -> None:
    whole, spans = records_of(written)
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytes((whole[at] ^ data.draw(st.integers(1, 255)),))
    damaged = whole[:at] + flipped + whole[at + 1 :]
    others = [p for p, (start, end) in zip(written, spans, strict=True) if not start <= at < end]
    ((start, end),) = [span for span in spans if span[0] <= at < span[1]]
    assert found(damaged) == others
    assert damage(damaged) == [Damage(start, end)]


@given(
    st.lists(plain, max_size=3), st.binary(min_size=1, max_size=100), st.lists(plain, min_size=1, max_size=3)
)
def test_valid_records_after_any_garbage_are_read(
    before: list[bytes], garbage: bytes, after: list[bytes]
) -> None:
    front, _ = records_of(before)
    back, _ = records_of(after)
    read = found(front + garbage + back)
    assert read[: len(before)] == before
    assert read[-len(after) :] == after
    assert damage(front + garbage + back)


def test_damage_spans_from_its_first_byte_to_where_reading_resumes() -> None:
    first, second = encode_record(SKIPPED + b"one"), encode_record(SKIPPED + b"two")
    data = first + b"garbage" + MARKER + b"more" + second
    start = len(first)
    assert list(scan(data, 100, final=False)) == [
        Record(SKIPPED, b"one", 100 + start),
        Damage(100 + start, 100 + len(data) - len(second)),
        Record(SKIPPED, b"two", 100 + len(data)),
    ]


def test_a_page_of_zeros_left_by_a_power_loss_is_damage() -> None:
    first, second = encode_record(SKIPPED + b"one"), encode_record(SKIPPED + b"two")
    assert found(first + bytes(4096) + second) == [SKIPPED + b"one", SKIPPED + b"two"]
    assert damage(first + bytes(4096)) == [Damage(len(first), len(first) + 4096)]


@pytest.mark.parametrize("length", [0, MAX_PAYLOAD + 1, 2**32 - 1])
def test_an_impossible_length_is_damage_at_once_even_in_a_growing_file(length: int) -> None:
    bad = MARKER + length.to_bytes(4, "little") + bytes(4)
    second = encode_record(SKIPPED + b"two")
    assert list(scan(bad + second, 0, final=False)) == [
        Damage(0, len(bad)),
        Record(SKIPPED, b"two", len(bad) + len(second)),
    ]


def test_garbage_at_the_end_of_a_growing_file_is_not_damage_yet() -> None:
    first, second = encode_record(SKIPPED + b"one"), encode_record(SKIPPED + b"two")
    assert [type(i) for i in scan(first + b"garbage", 0, final=False)] == [Record]
    assert [type(i) for i in scan(first + b"garbage" + second, 0, final=False)] == [Record, Damage, Record]


@settings(max_examples=300)
@given(st.binary(max_size=300), st.booleans())
def test_arbitrary_bytes_are_scanned_without_error_or_gap(data: bytes, final: bool) -> None:
    at = 0
    for item in scan(data, 0, final=final):
        if isinstance(item, Damage):
            assert item.start == at
        assert item.end > at
        at = item.end
    assert at <= len(data)
    if final:
        assert at == len(data)


def test_a_record_has_the_documented_layout() -> None:
    record = encode_record(SKIPPED + b"no_consumer")
    assert record[:4] == b"\xf5OMR"
    assert int.from_bytes(record[4:8], "little") == 12
    assert record[8:12].hex() == "b9caecaa"
    assert record[12:] == b"Sno_consumer"


@pytest.mark.parametrize(
    ("types", "first_id", "subject"),
    [
        (["another"], "id", "s"),
        (["kong.api_request"], "i" * 70_000, "s"),
        (["kong.api_request"], "id", "s" * 70_000),
        (["kong.api_request"], "\ud800", "s"),
    ],
    ids=["type", "id", "subject", "half a character"],
)
def test_a_summary_that_the_format_cannot_express_is_left_out(
    types: list[str], first_id: str, subject: str
) -> None:
    encoded = encode_usage([b"{}"], types, "2026-11-22T07:00:00Z", first_id, subject)
    (record,) = scan(encoded, 0, final=True)
    assert isinstance(record, Record)
    assert (record.summary, record.events) == (None, b"{}")


def test_a_summary_names_each_type_of_event_and_the_gap_in_the_ai_usage() -> None:
    for gap in (None, *AiUsageGap):
        encoded = encode_usage([b"{}"] * len(KINDS), KINDS, "2026-11-22T07:00:00Z", "id", "Subject", gap)
        (record,) = scan(encoded, 0, final=True)
        assert isinstance(record, Record)
        assert record.summary == Summary(tuple(KINDS), "2026-11-22T07", "id", "Subject", gap)
