"""Lines of Kong segments: damage costs the lines that it hits, and no other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.segments.line_format import LOST_CAUSES, Flaw, head_version, parse_lost, scan
from tests.harness.kong_segments import encode_head, encode_line, encode_lost

PAYLOADS = st.lists(
    st.binary(min_size=1, max_size=40).map(lambda body: b'{"i":"' + body.hex().encode() + b'"}'),
    min_size=1,
    max_size=8,
    unique=True,
)


def valid(data: bytes, *, final: bool = True) -> list[bytes]:
    return [line.content for line in scan(data, 0, final=final) if not isinstance(line.content, Flaw)]


def flaws(data: bytes, *, final: bool = True) -> int:
    """Return how many lines are lost."""
    found = [line.content for line in scan(data, 0, final=final)]
    return found.count(Flaw.DAMAGED) + found.count(Flaw.TORN)


@given(PAYLOADS)
def test_what_is_written_is_read(payloads: list[bytes]) -> None:
    data = b"".join(map(encode_line, payloads))
    lines = scan(data, 1000, final=False)
    assert [line.content for line in lines] == payloads
    assert lines[-1].end == 1000 + len(data)


@given(PAYLOADS, st.data())
@settings(max_examples=300)
def test_a_truncated_segment_costs_the_line_that_was_cut(payloads: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(map(encode_line, payloads))
    cut = data.draw(st.integers(0, len(whole)))
    complete, at = [], 0
    for payload in payloads:
        at += len(encode_line(payload))
        if cut >= at - 1:  # only its newline is missing
            complete.append(payload)
    torn = whole[:cut].rpartition(b"\n")[2]
    assert valid(whole[:cut]) == complete
    assert flaws(whole[:cut]) == (1 if torn and torn + b"\n" not in map(encode_line, payloads) else 0)
    assert valid(whole[:cut], final=False) == [p for p in complete if encode_line(p) in whole[:cut]]
    assert flaws(whole[:cut], final=False) == 0


@pytest.mark.slow
@given(PAYLOADS, st.data())
@settings(max_examples=500)
def test_a_flipped_bit_costs_the_line_that_it_hits_and_no_other(
    payloads: list[bytes], data: st.DataObject
) -> None:
    lines = list(map(encode_line, payloads))
    whole = bytearray(b"".join(lines))
    at = data.draw(st.integers(0, len(whole) - 1))
    was = whole[at]
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    hit = next(n for n in range(len(lines)) if at < sum(map(len, lines[: n + 1])))
    # The lines that a flipped newline joins have their checksums.
    kept = payloads if was == ord("\n") else payloads[:hit] + payloads[hit + 1 :]
    assert valid(bytes(whole)) == kept
    assert flaws(bytes(whole)) == len(payloads) - len(kept)


@given(PAYLOADS, st.binary(min_size=1, max_size=30), st.data())
def test_a_torn_line_that_was_closed_before_the_next_one_costs_itself(
    payloads: list[bytes], filler: bytes, data: st.DataObject
) -> None:
    lines = list(map(encode_line, payloads))
    torn = encode_line(b'{"torn":"' + filler.hex().encode() + b'"}')
    part = torn[: data.draw(st.integers(1, len(torn) - 2))]
    at = data.draw(st.integers(0, len(lines)))
    whole = b"".join([*lines[:at], part + b"\n", *lines[at:]])
    assert valid(whole) == payloads
    assert flaws(whole) == 1


@given(st.binary(max_size=2000))
def test_any_bytes_are_read_to_their_end_without_an_error(data: bytes) -> None:
    lines = scan(data, 0, final=True)
    assert (lines[-1].end if lines else 0) == len(data)
    assert [line.end for line in lines] == sorted(line.end for line in lines)


@given(st.binary(max_size=64), st.integers(0, 2**40))
def test_counters_are_read_as_written_and_only_behind_their_magic(start: bytes, count: int) -> None:
    counts = {cause: count + number for number, cause in enumerate(LOST_CAUSES)}
    page = encode_lost(counts)
    assert parse_lost(page) == {cause: value for cause, value in counts.items() if value}
    assert parse_lost(start + bytes(4096)) is None
    assert parse_lost(page[:1030]) is None
    assert parse_lost(b"\xff" * 64 + page[64:]) is None


def test_a_head_names_its_version_and_a_request_none() -> None:
    (head,) = scan(encode_head(worker="1-2-ab", kong="3.9.1"), 0, final=False)
    assert head_version(bytes(head.content)) == 1 if isinstance(head.content, bytes) else False
    assert head_version(b'{"i":"x","log":{"format":1}}') is None
