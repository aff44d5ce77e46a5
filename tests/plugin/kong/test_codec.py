"""Kong's ProtoBuf:1 messages: against every recorded frame, and against Google's protobuf package."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.kong import codec
from tests.harness.recordings import URI_CAPTURES, WIRE, frames, protobuf_requests

pytestmark = pytest.mark.slow

TO_US = "kong->pluginserver"
FROM_US = "pluginserver->kong"

PLUGIN_ID = "8f73791d-f6dc-5b96-8b25-7c1d82afe770"


def recorded(direction: str) -> list[bytes]:
    return [entry["frame"] for entry in frames() if "frame" in entry and entry["direction"] == direction]


def recorded_calls() -> list[codec.Call]:
    # Neither a log (0a) nor a value (2a, or 08 01: null).
    calls = [frame for frame in recorded(TO_US) if frame[:1] == b"\x08" and len(frame) > 2]
    return [codec.decode_call(frame) for frame in calls]


# Every recorded frame


def test_the_recorded_calls_decode_to_what_kong_meant_in_its_order() -> None:
    calls = recorded_calls()
    decoded = [
        (type(call).__name__, call.sequence, getattr(call, "instance_id", None), getattr(call, "name", None))
        for call in calls
    ]
    assert decoded == [
        ("StartInstance", 2, None, "fast-pb"),
        ("HandleEvent", 3, 1, None),
        ("HandleEvent", 4, 1, None),
        ("HandleEvent", 5, 1, None),
        ("HandleEvent", 6, 1, None),
        ("HandleEvent", 7, 1, None),
        ("HandleEvent", 8, 1, None),
        ("StartInstance", 9, None, "fast-pb"),
        ("HandleEvent", 10, 1, None),
        ("StartInstance", 11, None, "fast-pb"),
        ("CloseInstance", 12, 1, None),
        ("HandleEvent", 13, 2, None),
    ]
    assert {call.event_name for call in calls if isinstance(call, codec.HandleEvent)} == {"log"}


def test_the_recorded_start_calls_carry_kongs_configuration() -> None:
    starts = [call for call in recorded_calls() if isinstance(call, codec.StartInstance)]
    assert [json.loads(start.config)["__seq__"] for start in starts] == [8, 8, 13]
    assert {json.loads(start.config)["__ws_id"] for start in starts} == {
        "0dc6f45b-8f8d-40d2-a504-473544ee190b"
    }


def test_every_recorded_frame_from_kong_is_a_known_call_or_answer() -> None:
    kinds = {"call": 0, "log": 0, "null": 0, "struct": 0}
    for frame in recorded(TO_US):
        if frame[:1] == b"\x0a":
            assert json.loads(codec.decode_string(frame))["request"]["id"]
            kinds["log"] += 1
        elif frame == b"\x08\x01":
            assert codec.decode_value(frame) is None
            kinds["null"] += 1
        elif frame[:1] == b"\x2a":
            assert codec.decode_value(frame)["application_id"]
            kinds["struct"] += 1
        else:
            codec.decode_call(frame)
            kinds["call"] += 1
    assert kinds == {"call": 12, "log": 7, "null": 6, "struct": 1}


def test_the_recorded_application_context_decodes_to_its_four_ids() -> None:
    context = next(frame for frame in recorded(TO_US) if frame[:1] == b"\x2a")
    assert codec.decode_value(context) == {
        "application_id": "b15e2460-ba40-431d-9df0-4957fcffacda",
        "developer_id": "8cd9feff-b4da-4a9f-ba49-cbe83c75ff22",
        "organization_id": "5f9fd312-a987-4628-b4c5-bb4f4fddd5f7",
        "portal_id": "95606071-49c7-4c2e-ae49-8a86d72a8110",
    }


def test_the_logs_in_the_recorded_answers_are_those_of_the_harness() -> None:
    logs = [codec.decode_string(frame) for frame in recorded(TO_US) if frame[:1] == b"\x0a"]
    assert logs == [request.log for request in protobuf_requests()]


def test_our_pdk_queries_are_the_frames_of_the_recorded_server() -> None:
    sent = recorded(FROM_US)
    at = sent.index(b"kong.log.serialize")
    assert codec.frame(sent[at]) + codec.frame(sent[at + 1]) == codec.QUERY_LOG
    at = sent.index(b"kong.ctx.shared.get")
    assert codec.frame(sent[at]) + codec.frame(sent[at + 1]) == codec.QUERY_APPLICATION


def test_our_end_of_an_event_is_that_of_the_recorded_server() -> None:
    sent = recorded(FROM_US)
    ends = [sent[i : i + 2] for i in range(len(sent) - 1) if not sent[i] and sent[i + 1][:1] == b"\x08"]
    assert len(ends) == 7
    for (empty, answer), sequence in zip(ends, (3, 4, 5, 6, 7, 10, 13), strict=True):
        assert codec.END_OF_EVENT + codec.encode_return(sequence) == codec.frame(empty) + codec.frame(answer)


def test_our_answers_to_start_instance_are_those_of_the_recorded_server() -> None:
    started = [frame for frame in recorded(FROM_US) if len(frame) == 22]
    assert len(started) == 3
    for answer, (sequence, instance, at) in zip(
        started, ((2, 1, 1795327722), (9, 1, 1795327724), (11, 2, 1795327726)), strict=True
    ):
        assert codec.encode_instance_status(sequence, "fast-pb", instance, at) == codec.frame(answer)


def test_the_recorded_full_configuration_is_read_although_its_sequence_comes_last() -> None:
    recording = json.loads((WIRE / "start-instance-full-schema.json").read_text())
    call = codec.decode_call(bytes.fromhex(recording["frame_hex"]))
    assert isinstance(call, codec.StartInstance)
    assert (call.sequence, call.name) == (2, "fast-pb")
    assert json.loads(call.config) == recording["config"]
    assert recording["config"]["__plugin_id"] == PLUGIN_ID


def test_a_start_calls_repr_shows_nothing_of_the_configuration() -> None:
    call = codec.StartInstance(1, "openmeter", b'{"api_token":"om-token-from-vault"}')
    assert "om-token" not in repr(call)
    assert "om-token" not in f"{call}"


DECODERS = (codec.decode_call, codec.decode_string, codec.decode_value, codec.decode_captures)


def test_the_captures_that_kong_answered_are_read_by_their_names() -> None:
    assert codec.decode_captures(URI_CAPTURES) == {"named": {"city": "paris", "street": "rivoli"}}


def test_a_path_without_captures_has_none() -> None:
    assert codec.decode_captures(b"") == {"named": {}}


# Compared with Google's package

_TYPES = descriptor_pb2.FieldDescriptorProto


def _message(
    file: descriptor_pb2.FileDescriptorProto, name: str, *fields: tuple[str, int, int, str | None]
) -> None:
    message = file.message_type.add(name=name)
    for field, number, kind, type_name in fields:
        message.field.add(
            name=field, number=number, type=_TYPES.Type.ValueType(kind), label=_TYPES.LABEL_OPTIONAL
        )
        if type_name is not None:
            message.field[-1].type_name = f".kong.{type_name}"


def _kong_messages() -> dict[str, type[Message]]:
    """The needed part of Kong's pluginsocket.proto, rebuilt from its field numbers."""
    file = descriptor_pb2.FileDescriptorProto(name="kong.proto", package="kong", syntax="proto3")
    text, int32, int64 = _TYPES.TYPE_STRING, _TYPES.TYPE_INT32, _TYPES.TYPE_INT64
    raw, sub = _TYPES.TYPE_BYTES, _TYPES.TYPE_MESSAGE
    _message(file, "String", ("v", 1, text, None))
    _message(file, "CmdStartInstance", ("name", 1, text, None), ("config", 2, raw, None))
    _message(file, "CmdCloseInstance", ("instance_id", 1, int32, None))
    _message(file, "CmdHandleEvent", ("instance_id", 1, int32, None), ("event_name", 2, text, None))
    _message(
        file,
        "InstanceStatus",
        *(("name", 1, text, None), ("instance_id", 2, int32, None)),
        *(("config", 3, raw, None), ("started_at", 4, int64, None)),
    )
    _message(
        file,
        "RpcCall",
        ("sequence", 1, int64, None),
        ("cmd_start_instance", 33, sub, "CmdStartInstance"),
        ("cmd_close_instance", 35, sub, "CmdCloseInstance"),
        ("cmd_handle_event", 36, sub, "CmdHandleEvent"),
    )
    _message(file, "RpcReturn", ("sequence", 1, int64, None), ("instance_status", 33, sub, "InstanceStatus"))
    captures = file.message_type.add(name="UriCapturesResult")
    captures.field.add(name="unnamed", number=1, type=raw, label=_TYPES.LABEL_REPEATED)
    captures.field.add(
        name="named",
        number=2,
        type=sub,
        label=_TYPES.LABEL_REPEATED,
        type_name=".kong.UriCapturesResult.NamedEntry",
    )
    entry = captures.nested_type.add(name="NamedEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=text, label=_TYPES.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=raw, label=_TYPES.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"kong.{name}"))
        for name in ("String", "RpcCall", "RpcReturn", "UriCapturesResult")
    }


KONG = _kong_messages()


def encoded(message: str, **values: Any) -> bytes:
    built: Any = KONG[message](**values)
    result: bytes = built.SerializeToString()
    return result


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=15,
)


def google_value(value: Any) -> struct_pb2.Value:
    """Build a Value by hand: json_format refuses values that Kong may well send, such as infinity."""
    result = struct_pb2.Value()
    if value is None:
        result.null_value = struct_pb2.NULL_VALUE
    elif isinstance(value, bool):
        result.bool_value = value
    elif isinstance(value, float):
        result.number_value = value
    elif isinstance(value, str):
        result.string_value = value
    elif isinstance(value, list):
        result.list_value.SetInParent()
        result.list_value.values.extend(google_value(item) for item in value)
    else:
        result.struct_value.SetInParent()
        for key, item in value.items():
            result.struct_value.fields[key].CopyFrom(google_value(item))
    return result


@given(json_values)
def test_a_value_that_google_encoded_decodes_to_itself(value: Any) -> None:
    decoded = codec.decode_value(google_value(value).SerializeToString())
    assert decoded == value
    assert type(decoded) is type(value)


def test_a_number_that_is_not_a_number_decodes_to_nan() -> None:
    assert math.isnan(codec.decode_value(google_value(math.nan).SerializeToString()))


sequences = st.integers(0, 2**63 - 1)
instance_numbers = st.integers(0, 2**31 - 1)


@given(sequences, instance_numbers, st.text(max_size=10))
def test_a_handle_event_call_that_google_encoded_is_read(sequence: int, instance: int, event: str) -> None:
    raw = encoded(
        "RpcCall", sequence=sequence, cmd_handle_event={"instance_id": instance, "event_name": event}
    )
    assert codec.decode_call(raw) == codec.HandleEvent(sequence, instance, event)


@given(sequences, st.text(max_size=10), st.binary(max_size=300))
def test_a_start_call_that_google_encoded_is_read(sequence: int, name: str, config: bytes) -> None:
    raw = encoded("RpcCall", sequence=sequence, cmd_start_instance={"name": name, "config": config})
    assert codec.decode_call(raw) == codec.StartInstance(sequence, name, config)


@given(sequences, instance_numbers)
def test_a_close_call_that_google_encoded_is_read(sequence: int, instance: int) -> None:
    raw = encoded("RpcCall", sequence=sequence, cmd_close_instance={"instance_id": instance})
    assert codec.decode_call(raw) == codec.CloseInstance(sequence, instance)


def test_a_negative_instance_id_is_read_as_one_that_is_never_assigned() -> None:
    call = codec.decode_call(encoded("RpcCall", cmd_handle_event={"instance_id": -1, "event_name": "log"}))
    assert isinstance(call, codec.HandleEvent)
    assert call.instance_id > 2**31 - 1


@given(sequences)
def test_google_reads_our_bare_return(sequence: int) -> None:
    answer: Any = KONG["RpcReturn"].FromString(codec.encode_return(sequence)[4:])
    assert answer.sequence == sequence
    assert not answer.HasField("instance_status")


@given(sequences, st.text(max_size=10), instance_numbers, st.integers(0, 2**40))
def test_google_reads_our_instance_status(sequence: int, name: str, instance: int, at: int) -> None:
    answer: Any = KONG["RpcReturn"].FromString(codec.encode_instance_status(sequence, name, instance, at)[4:])
    status = answer.instance_status
    assert (answer.sequence, status.name, status.instance_id, status.started_at) == (
        *(sequence, name, instance),
        at,
    )


def test_the_configuration_is_never_sent_back() -> None:
    answer: Any = KONG["RpcReturn"].FromString(codec.encode_instance_status(1, "openmeter", 7, 1)[4:])
    assert answer.instance_status.config == b""


@given(st.text(max_size=300))
def test_a_string_that_google_encoded_is_read(text: str) -> None:
    assert codec.decode_string(encoded("String", v=text)) == text.encode()


@given(st.lists(st.binary(max_size=20)), st.dictionaries(st.text(max_size=20), st.binary(max_size=20)))
def test_captures_that_google_encoded_are_read(unnamed: list[bytes], named: dict[str, bytes]) -> None:
    frame = encoded("UriCapturesResult", unnamed=unnamed, named=named)
    texts = {name: value.decode("utf-8", "replace") for name, value in named.items()}
    assert codec.decode_captures(frame) == {"named": texts}


# Bytes that are not a message of the protocol


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_a_protocol_error(data: bytes) -> None:
    for decode in DECODERS:
        with contextlib.suppress(codec.ProtocolError):
            decode(data)


@settings(max_examples=300)
@given(st.sampled_from([f for f in recorded(TO_US) if len(f) < 400]), st.data())
def test_a_recorded_frame_with_any_byte_changed_raises_nothing_but_a_protocol_error(
    frame: bytes, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(frame) - 1))
    changed = frame[:at] + bytes((data.draw(st.integers(0, 255)),)) + frame[at + 1 :]
    for decode in DECODERS:
        with contextlib.suppress(codec.ProtocolError):
            decode(changed)


def test_a_call_that_is_cut_anywhere_is_an_error() -> None:
    frame = next(f for f in recorded(TO_US) if f[:1] == b"\x08" and len(f) == 12)
    for end in range(len(frame)):
        with pytest.raises(codec.ProtocolError):
            codec.decode_call(frame[:end])


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"\x08\x02", "no RPC"),
        (encoded("RpcCall", sequence=4) + codec.encode_bytes(34, b"\x08\x01"), "no RPC"),
        (b"\x08" + b"\xff" * 10, "longer than 64 bits"),
        (b"\x08\x02\xa2\x02\x09\x08\x01", "truncated"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x01x" + codec.encode_bytes(36, b""), "expected a number"),
        (b"\xa0\x02\x01", "expected bytes"),
    ],
)
def test_an_invalid_call_is_refused_with_the_reason(frame: bytes, reason: str) -> None:
    with pytest.raises(codec.ProtocolError, match=reason):
        codec.decode_call(frame)


def test_a_value_nested_deeper_than_any_context_is_refused_instead_of_filling_the_stack() -> None:
    deep = b""
    for _ in range(1000):
        deep = codec.encode_bytes(6, codec.encode_bytes(1, deep))
    with pytest.raises(codec.ProtocolError, match="deeply"):
        codec.decode_value(deep)


def test_a_field_that_a_later_kong_adds_is_ignored() -> None:
    raw = encoded("RpcCall", sequence=5, cmd_handle_event={"instance_id": 9, "event_name": "log"})
    added = b"\x10\x07" + codec.encode_bytes(99, b"new") + b"\x1d" + b"1234" + b"\x21" + b"12345678"
    assert codec.decode_call(added + raw + added) == codec.HandleEvent(5, 9, "log")


def test_text_that_is_not_utf_8_is_still_read() -> None:
    value = codec.decode_value(b"\x1a\x02\xe9a")
    assert value == "\N{REPLACEMENT CHARACTER}a"
