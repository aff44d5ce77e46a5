"""Splitter: the entries are those of the parsed body, however it arrives."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.http_log.scanner import Limits
from openmeter_plugin.http_log.splitter import Encode, EncodedRecord, EntrySplitter, NotJsonError
from openmeter_plugin.metering.fast_path import fast_path_for
from tests.plugin.metering.test_fast_path import LOG, rules, slow_record

pytestmark = pytest.mark.slow

_ODD_TEXT = st.text(st.sampled_from('},{"[]\\ aé'), max_size=12)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | _ODD_TEXT | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_ODD_TEXT, inner, max_size=4),
    max_leaves=12,
)
_LARGE = st.recursive(
    st.integers(-(10**6), 10**6)
    | st.builds(str.__mul__, st.text(min_size=1, max_size=20), st.sampled_from([1, 30, 300])),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(_ODD_TEXT, inner, max_size=8),
    max_leaves=40,
)
_CUTS = st.lists(st.integers(0, 400), max_size=6)
_SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), ("\n,\t", " :")])
_PIECES = st.sampled_from(
    [b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"a", b"1", b'{"a":1}', b" ", b'},{"', b"\xff"]
)


_SMALL: Limits = Limits(parsed=300, text=256, container=40)


def split(
    body: bytes,
    cuts: list[int] | None = None,
    limits: Limits = Limits(),  # noqa: B008
    encode: Encode | None = None,
) -> list[Any]:
    """Return the values of the entries of a body that arrives in pieces."""
    splitter = EntrySplitter(limits, encode)
    found = []
    at = 0
    for cut in [*sorted(cuts or []), len(body)]:
        found += [entry for entry in splitter.feed(body[at:cut]) if entry]
        at = max(at, cut)
    found += [entry for entry in splitter.finish() if entry]
    return [value for value, _ in found]


@given(st.lists(_VALUES | st.dictionaries(_ODD_TEXT, _VALUES)), _CUTS, _SEPARATORS, st.booleans())
def test_the_entries_are_those_of_the_array_wherever_it_is_cut(
    entries: list[Any], cuts: list[int], separators: tuple[str, str], escaped: bool
) -> None:
    body = json.dumps(entries, separators=separators, ensure_ascii=escaped).encode()
    assert split(body, cuts) == entries


@given(
    st.lists(st.just(LOG) | _VALUES.map(lambda value: LOG | {"route": value, "new": value}) | _VALUES), _CUTS
)
def test_with_a_fast_path_each_entry_is_its_record_or_the_parsed_value(
    entries: list[Any], cuts: list[int]
) -> None:
    fast_path = fast_path_for(rules())
    assert fast_path is not None
    body = json.dumps(entries, separators=(",", ":")).encode()
    found = split(body, cuts, encode=fast_path.record)
    assert len(found) == len(entries)
    for value, entry in zip(found, entries, strict=True):
        if isinstance(value, EncodedRecord):
            assert value.record == slow_record(json.dumps(entry).encode(), rules())
        else:
            assert value == entry


@given(st.integers(1, 5), _CUTS)
def test_ordinary_requests_all_take_the_fast_path(count: int, cuts: list[int]) -> None:
    fast_path = fast_path_for(rules())
    assert fast_path is not None
    body = json.dumps([LOG] * count, separators=(",", ":")).encode()
    record = slow_record(json.dumps(LOG).encode(), rules())
    assert record is not None
    assert split(body, cuts, encode=fast_path.record) == [EncodedRecord(record)] * count


@given(st.dictionaries(_ODD_TEXT, _VALUES), _CUTS, _SEPARATORS)
def test_an_object_alone_is_the_one_entry(
    entry: dict[str, Any], cuts: list[int], separators: tuple[str, str]
) -> None:
    assert split(json.dumps(entry, separators=separators).encode(), cuts) == [entry]


def result(body: bytes, cuts: list[int], limits: Limits) -> object:
    """Return the entries, or the error message."""
    try:
        return split(body, cuts, limits)
    except NotJsonError as error:
        return str(error)


@settings(max_examples=500)
@given(
    st.lists(_PIECES, max_size=30).map(b"".join),
    _CUTS,
    st.sampled_from([Limits(), Limits(parsed=3, text=256, container=5)]),
)
def test_for_any_body_the_result_depends_on_the_bytes_and_not_on_the_cuts(
    body: bytes, cuts: list[int], limits: Limits
) -> None:
    assert result(body, cuts, limits) == result(body, [], limits)


@given(st.lists(_LARGE, max_size=5), _CUTS, _SEPARATORS, st.booleans())
def test_shortened_entries_depend_on_the_bytes_and_not_on_the_cuts(
    entries: list[Any], cuts: list[int], separators: tuple[str, str], escaped: bool
) -> None:
    body = json.dumps(entries, separators=separators, ensure_ascii=escaped).encode()
    assert result(body, cuts, _SMALL) == result(body, [], _SMALL)


@pytest.mark.parametrize(
    ("bad", "value"),
    [
        (b"null", None),
        (b"17", 17),
        (b'"},{"', "},{"),
        (b"nonsense", None),
        (b'{"a":oops}', None),
        (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, None),  # 3.13 takes 10,000 levels, 3.11 and 3.12 fewer
        (b'{"a":"\xe9"}', {"a": "�"}),
        (b"[]", []),
        (b"", None),
    ],
    ids=["null", "number", "text", "no JSON", "broken", "too deep", "not UTF-8", "array", "nothing"],
)
def test_a_bad_entry_leaves_its_neighbours_alone(bad: bytes, value: object) -> None:
    assert split(b'[{"n":1},%b,{"n":2}]' % bad) == [{"n": 1}, value, {"n": 2}]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"  ", b"nonsense", b"17", b'"text"', b"[", b"[{", b'[{"a":1}', b'[{"a":1},', b'{"a":1'),
        *(b'["', b'["\\', b'{"a":1}{"b":2}', b"[]]", b'[{"a":1}] x', b"\xff\xfe[\x00]\x00"),
    ],
)
def test_a_body_that_is_not_one_array_or_object_is_refused(body: bytes) -> None:
    with pytest.raises(NotJsonError):
        split(body)
