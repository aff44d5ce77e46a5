"""Entries of a post: those of the array, whatever they contain."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.http_log import receiver
from openmeter_plugin.http_log.receiver import NotJsonError, entries

_ODD_TEXT = st.text(st.sampled_from('},{"[]\\ aé'), max_size=12)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | _ODD_TEXT | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_ODD_TEXT, inner, max_size=4),
    max_leaves=12,
)
_LOGS = st.lists(_VALUES | st.dictionaries(_ODD_TEXT, _VALUES))
_SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), ("\n,\t", " :")])
_PIECES = st.sampled_from(
    [b"[", b"]", b"{", b"}", b",", b'"', b"\\", b"a", b"1", b'{"a":1}', b" ", b'},{"', b"\xff"]
)


def split(body: bytes) -> list[Any]:
    """Return the values of a body's entries."""
    return [json.loads(raw) for raw in entries(body)]


@pytest.mark.slow
@given(_LOGS, _SEPARATORS, st.booleans(), st.booleans())
def test_the_entries_are_those_of_the_array_by_either_way(
    logs: list[Any], separators: tuple[str, str], escaped: bool, fast: bool
) -> None:
    body = json.dumps(logs, separators=separators, ensure_ascii=escaped).encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        if not fast:
            patch.setattr(receiver, "MAX_FAST_COMMAS", -1)
        assert split(body) == json.loads(body)
        assert split(b" \r\n" + body + b"\t ") == json.loads(body)


@pytest.mark.slow
@given(st.dictionaries(_ODD_TEXT, _VALUES))
def test_an_object_alone_is_the_one_entry(log: dict[str, Any]) -> None:
    body = json.dumps(log).encode("utf-8", "replace")
    assert split(body) == split(b" " + body + b"\n") == [json.loads(body)]


def parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8", "replace"))
    except ValueError:
        return None


@given(st.lists(_PIECES, max_size=12).map(b"".join))
def test_a_body_is_refused_only_if_it_is_neither_an_array_nor_an_object(body: bytes) -> None:
    value = parsed(body)
    try:
        found = list(entries(body))
    except NotJsonError:
        assert not isinstance(value, (list, dict))
        return
    if isinstance(value, (list, dict)):
        assert [parsed(raw) for raw in found] == (value if isinstance(value, list) else [value])


@pytest.mark.parametrize(
    "bad",
    [
        *(b"null", b"17", b'"text"', b"[]", b"[[]]", b"nonsense", b'{"a":oops}', b"NaN", b'{"a":NaN}', b""),
        *(b'"\x01"', b'{"a":"\\x"}', b'{"a":"},{"}', b'{"a":"caf\xe9 \xff},{"}', b'{"a":}', b"1 2"),
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    ],
)
def test_a_bad_entry_leaves_its_neighbours_alone(bad: bytes) -> None:
    assert list(entries(b'[{"a":1},' + bad + b',{"b":"\xff"}]')) == [b'{"a":1}', bad, b'{"b":"\xff"}']


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        *((body, "empty") for body in (b"", b" \n")),
        *((body, "neither") for body in (b"nonsense", b"17", b'"text"', b"null", b"]")),
        *((body, "ends within") for body in (b"[", b"[1,", b'["', b'[{"a":1}', b'{"a":1', b'{"a":"', b"[{]")),
        *((body, "follows") for body in (b"[]]", b"[] []", b'[{"a":1}]x', b'{"a":1},{"b":1}')),
    ],
)
def test_a_body_that_is_not_one_array_or_object_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    with pytest.raises(NotJsonError, match=reason):
        list(entries(body))


def test_millions_of_empty_entries_are_not_all_split_before_the_first_is_looked_at() -> None:
    found = entries(b"[" + b"{}," * 3_000_000 + b"{}]")
    assert [next(found) for _ in range(1000)] == [b"{}"] * 1000
