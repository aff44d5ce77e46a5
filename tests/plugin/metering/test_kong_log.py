"""Decoding of a log: the typed decoder and the repair of an unusual log read the same."""

from __future__ import annotations

import copy
import json
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openmeter_plugin.metering import kong_log
from openmeter_plugin.metering.kong_log import KongLog, decode_log, log_of
from openmeter_plugin.metering.lenient_json import MAX_COUNT, MAX_TEXT, parse_log
from tests.harness.recordings import WIRE, serialized

RECORDINGS = {
    path.stem: serialized(path.stem.removeprefix("serialize-")).log
    for path in sorted(WIRE.glob("serialize-*"))
}


def typed(raw: bytes) -> KongLog | None:
    """Return the log if the typed decoder accepts it."""
    try:
        return kong_log._decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _number(text: str) -> str:
    """Return a number's text; of integers beyond 64 bits, which no rule reads, one decoder makes floats."""
    return text if text.lstrip("-").isdigit() and abs(int(text)) < 2**64 else repr(float(text))


def read(log: KongLog | None) -> Any:
    """Return all that a log says as JSON, with what counts as missing left out."""
    value = json.loads(msgspec.json.encode(log), parse_float=_number, parse_int=_number)
    latencies = value and value["latencies"]
    if latencies and latencies["proxy"] is not None and not 0 <= float(latencies["proxy"]) <= MAX_COUNT:
        latencies["proxy"] = None  # the typed decoder leaves it to `event`: -1 is usual
    return value


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_recording_decodes_without_repair(name: str) -> None:
    log = typed(RECORDINGS[name])
    assert log is not None
    assert read(log) == read(log_of(parse_log(RECORDINGS[name])))


def test_every_member_has_its_repair() -> None:
    for kind, repairs in kong_log._REPAIRS.items():
        assert tuple(repairs) == kind.__struct_fields__


def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key, member in value.items():
            found += paths(member, (*path, key))
    return found


LOG = serialized("authenticated").parsed
LOG["consumer"]["tags"] = ["customer:acme", "gold"]
LOG["ai"] = {"proxy": {"usage": {"prompt_tokens": 12}}}
PATHS = [p for p in paths(LOG) if p[0] in KongLog.__struct_fields__ and "headers" not in p]

TEXTS = st.one_of(
    st.text(),
    st.sampled_from(["", "a" * MAX_TEXT, "ä" * (MAX_TEXT + 1), 'quote " \\ \u2028 \x00 \x1f \x7f', "😀"]),
)
NUMBERS = st.one_of(
    st.integers(-5, 10),
    st.sampled_from([2**53, 2**53 + 1, 2**63, 2**64, 10**30, 253_402_300_799_999, 253_402_300_800_000]),
    st.floats(allow_nan=False, allow_infinity=False),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.sampled_from(["12", "customer:b"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
CHANGES = st.lists(st.tuples(st.sampled_from(PATHS), VALUES | st.just(...)), max_size=4)


def changed(log: dict[str, Any], changes: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Return the log with the values at some paths replaced, or removed for `...`."""
    log = copy.deepcopy(log)
    for path, value in changes:
        place: Any = log
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if value is ...:
            place.pop(path[-1], None)
        else:
            place[path[-1]] = value
    return log


UNUSUAL: list[Any] = [..., None, "", "12", "x" * (MAX_TEXT + 1), 0, -1, 7.0, 7.5, 2**60, True, [], {}, ["x"]]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_any_value_in_one_place_is_read_the_same_by_both(path: tuple[str, ...]) -> None:
    for value in UNUSUAL:
        raw = orjson.dumps(changed(LOG, [(path, value)]))
        log = typed(raw)
        assert log is None or read(log) == read(log_of(parse_log(raw))), value


@given(changes=CHANGES)
@example(changes=[(("latencies", "proxy"), -1.0)])
@example(changes=[(("request", "size"), 1e3)])
@example(changes=[(("consumer", "tags"), 2**64)])
def test_any_log_is_read_the_same_by_both(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    raw = json.dumps(changed(LOG, changes)).encode()
    log = typed(raw)
    assert log is None or read(log) == read(log_of(parse_log(raw)))


@given(cut=st.integers(0, 2500), noise=st.binary(max_size=4), at=st.integers(0, 2500))
def test_damaged_bytes_never_raise_and_are_read_the_same_by_both(cut: int, noise: bytes, at: int) -> None:
    raw = orjson.dumps(LOG)
    raw = (raw[:at] + noise + raw[at:])[: cut or None]
    decode_log(raw)
    log = typed(raw)
    assert log is None or read(log) == read(log_of(parse_log(raw)))


def test_the_last_of_a_repeated_member_counts() -> None:
    raw = orjson.dumps(LOG)
    repeated = b'{"consumer":{"id":"other"},"route":17,' + raw[1:]
    assert read(decode_log(repeated)) == read(decode_log(raw))
    last = decode_log(raw[:-1] + b',"consumer":{"id":"other"}}')
    assert last is not None
    assert last.consumer is not None
    assert last.consumer.id == "other"


@pytest.mark.parametrize("raw", [b"", b"null", b"17", b'"text"', b"[]", b"{", b"nonsense", b"[{}]", b"\xff"])
def test_what_is_no_json_object_is_no_log(raw: bytes) -> None:
    assert decode_log(raw) is None


def test_a_log_as_deep_as_lua_cjson_writes_is_read() -> None:
    deep = b'{"payload":' + b'{"a":' * 998 + b"1" + b"}" * 998 + b"," + orjson.dumps(LOG)[1:]
    assert read(decode_log(deep)) == read(decode_log(orjson.dumps(LOG)))
