"""Decoding of a serialized log: the bill must not depend on what a client sends in a header."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.metering.event import decide, encode_event
from openmeter_plugin.metering.kong_log import QueryResults, decode_log
from openmeter_plugin.metering.lenient_json import encode_json, parse_log
from openmeter_plugin.metering.rules import Rules
from tests.harness.recordings import all_serialized, protobuf_requests, serialized

ALICE = "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"
AGENT = b'"user-agent":"curl\\/7.88.1"'


def billed(raw: bytes) -> dict[str, Any]:
    found = decide(decode_log(raw), QueryResults(None, None), Rules(source="kong"), lambda: 1, lambda: "none")
    assert isinstance(found, list)
    (event,) = found
    decoded: dict[str, Any] = orjson.loads(encode_event(event))
    return decoded


def with_agent(value: bytes) -> bytes:
    raw = serialized("authenticated").log
    assert raw.count(AGENT) == 1
    return raw.replace(AGENT, b'"user-agent":"' + value + b'"')


@pytest.mark.parametrize("recording", [*all_serialized(), *protobuf_requests()], ids=lambda r: r.name)
def test_a_recording_parses_as_the_standard_library_parses_it(recording: Any) -> None:
    assert parse_log(recording.log) == json.loads(recording.log)


@pytest.mark.parametrize(
    "value",
    [
        b"\xe9t\xe9",  # Latin-1
        b"\xff\xfe",
        b"\xc3",
        b"\xed\xa0\x80",  # half of a surrogate pair in UTF-8
        b"\xf5OMR",
        b"\x01\x1f",  # bare control characters, which strict JSON refuses
        b"\\ud800",  # an escaped half
        b"\\udfff\\ud800",
    ],
)
def test_a_request_is_billed_whatever_bytes_are_in_its_headers(value: bytes) -> None:
    event = billed(with_agent(value))
    assert (event["id"], event["subject"]) == ("9ec5b3159fe16f1be3fabe698d170a33", ALICE)
    assert event == billed(serialized("authenticated").log)


def test_text_that_is_not_utf_8_is_replaced_in_the_event() -> None:
    raw = serialized("authenticated").log.replace(b'"username":"alice"', b'"username":"al\xefce"')
    assert billed(raw)["data"]["consumer_username"] == "al\N{REPLACEMENT CHARACTER}ce"


def test_a_lone_surrogate_is_encoded_as_a_question_mark() -> None:
    raw = serialized("authenticated").log.replace(b'"username":"alice"', b'"username":"a\\ud800"')
    assert json.loads(encode_json(billed(raw)))["data"]["consumer_username"] == "a?"


def test_a_surrogate_pair_is_its_character() -> None:
    raw = serialized("authenticated").log.replace(b'"username":"alice"', b'"username":"\\ud83d\\ude00"')
    assert billed(raw)["data"]["consumer_username"] == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"nul", b"\xff", b'{"a":1}}', b"[" * 200_000, b'{"a":' * 100_000, b"9" * 10_000, b'"\x00'],
    ids=lambda raw: repr(raw[:8]),
)
def test_bytes_that_are_not_json_have_no_log(raw: bytes) -> None:
    assert parse_log(raw) is None


def test_a_deeply_nested_log_is_billed() -> None:
    deep = b"[" * 1000 + b"]" * 1000
    raw = serialized("authenticated").log
    assert billed(b'{"deep":' + deep + b"," + raw[1:]) == billed(raw)


@settings(max_examples=300)
@given(st.binary(max_size=100))
def test_no_bytes_raise(raw: bytes) -> None:
    parse_log(raw)
    parse_log(with_agent(raw))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_encoding_is_lossless(value: object) -> None:
    assert json.loads(encode_json(value)) == value


@given(st.text(st.characters(categories=["Cs", "L", "Nd", "Cc"]), max_size=20))
def test_any_text_is_encoded_as_valid_json_in_valid_utf_8(text: str) -> None:
    assert len(json.loads(encode_json({"text": text}).decode())["text"]) >= bool(text)
