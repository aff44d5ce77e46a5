"""Codec for the messages of Kong's ProtoBuf:1 plugin protocol that a log-phase plugin needs.

A frame is a 4-byte little-endian length and that many bytes (Kong 3.9, `rpc/pb_rpc.lua`). Calls and
returns, by field number:

    RpcCall    1 sequence, 33 CmdStartInstance{1 name, 2 config}, 35 CmdCloseInstance{1 id},
               36 CmdHandleEvent{1 instance id, 2 event name}
    RpcReturn  1 sequence, 33 InstanceStatus{1 name, 2 instance id, 3 config, 4 started_at}

During an event the plugin server sends the name of a PDK function and its encoded arguments as two frames,
and Kong answers with one: String{1} for `kong.log.serialize`, google.protobuf.Value for
`kong.ctx.shared.get`, UriCapturesResult{1 unnamed, 2 map named} for `kong.request.get_uri_captures`. An empty
frame ends the event; the RpcReturn follows. Seven messages do not justify a code generator, and decoding them
by hand costs half of what the protobuf package takes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

MAX_FRAME: Final = 64 * 1024 * 1024
"""Bytes. Kong sends at most a serialized log, some KiB; a larger length means a corrupt or foreign stream."""

_MAX_VARINT: Final = 10  # bytes of a 64-bit number
_MAX_NESTING: Final = 32
_LENGTH: Final = struct.Struct("<I")
_DOUBLE: Final = struct.Struct("<d")


class ProtocolError(ValueError):
    """The bytes are not a message of the protocol; the connection that they came on must be closed."""


@dataclass(frozen=True, slots=True)
class StartInstance:
    """Kong starts a plugin instance; `config` is JSON as Kong encoded it, including secrets."""

    sequence: int
    name: str
    config: bytes

    def __repr__(self) -> str:
        return f"StartInstance(sequence={self.sequence}, name={self.name!r})"


@dataclass(frozen=True, slots=True)
class CloseInstance:
    """Kong no longer uses an instance."""

    sequence: int
    instance_id: int


@dataclass(frozen=True, slots=True)
class HandleEvent:
    """A phase of a request for an instance; the plugin declares only the phase `log`."""

    sequence: int
    instance_id: int
    event_name: str


Call = StartInstance | CloseInstance | HandleEvent


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        try:
            byte = data[at]
        except IndexError:
            raise ProtocolError("a number is truncated") from None
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            raise ProtocolError("a number is longer than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one message: int for varints, bytes for everything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ProtocolError(f"wire type {kind} is not supported")
        if at + size > end:
            raise ProtocolError("a field is truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ProtocolError("expected a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ProtocolError("expected bytes")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode("utf-8", "replace")


def decode_call(frame: bytes) -> Call:
    """Return the call in an RpcCall frame; raises ProtocolError for a corrupt message or an unknown RPC."""
    sequence = 0
    command: tuple[int, bytes] | None = None
    for number, value in _fields(frame):
        if number == 1:
            sequence = _int(value)
        elif number in (33, 35, 36):
            command = number, _bytes(value)
    if command is None:
        raise ProtocolError("the call names no RPC of a log-phase plugin")
    number, body = command
    fields: dict[int, int | bytes] = dict(_fields(body))
    if number == 36:
        return HandleEvent(sequence, _int(fields.get(1, 0)), _text(fields.get(2, b"")))
    if number == 33:
        return StartInstance(sequence, _text(fields.get(1, b"")), _bytes(fields.get(2, b"")))
    return CloseInstance(sequence, _int(fields.get(1, 0)))


def split_call(frame: bytes) -> tuple[bytes, bytes] | None:
    """Split a call into its sequence number, still encoded, and the undecoded rest of the frame.

    The rest is the same for every event of an instance, so it needs decoding only once. Returns None if the
    sequence does not come first: Kong's encoder writes the fields in any order.
    """
    if frame[:1] != b"\x08":
        return None
    for at, byte in enumerate(frame[1 : _MAX_VARINT + 1], 2):
        if byte < 0x80:
            return frame[1:at], frame[at:]
    return None


def decode_string(frame: bytes) -> bytes:
    """Return field 1 of a String message as bytes, which is what the JSON parser takes."""
    if frame[:1] == b"\x0a":  # fast path: that field and nothing else
        size, at = _varint(frame, 1)
        if at + size == len(frame):
            return frame[at:]
    for number, value in _fields(frame):
        if number == 1:
            return _bytes(value)
    return b""


def decode_value(frame: bytes, nesting: int = 0) -> Any:
    """Return a google.protobuf.Value as plain Python: None, float, str, bool, dict or list."""
    if nesting > _MAX_NESTING:
        raise ProtocolError("a value is nested too deeply")
    for number, value in _fields(frame):
        if number == 2:
            raw = _bytes(value)
            if len(raw) != _DOUBLE.size:
                raise ProtocolError("a double is not 8 bytes long")
            return _DOUBLE.unpack(raw)[0]
        if number == 3:
            return _text(value)
        if number == 4:
            return bool(_int(value))
        if number == 5:
            return _decode_struct(_bytes(value), nesting + 1)
        if number == 6:
            return [decode_value(_bytes(v), nesting + 1) for n, v in _fields(_bytes(value)) if n == 1]
    return None


def _decode_struct(data: bytes, nesting: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for number, entry in _fields(data):
        if number == 1:
            pair = dict(_fields(_bytes(entry)))
            result[_text(pair.get(1, b""))] = decode_value(_bytes(pair.get(2, b"")), nesting)
    return result


def decode_captures(frame: bytes) -> dict[str, Any]:
    """Return the named captures of a UriCapturesResult, in the PDK's form."""
    named: dict[str, str] = {}
    for number, entry in _fields(frame):
        if number == 2:
            pair = dict(_fields(_bytes(entry)))
            named[_text(pair.get(1, b""))] = _text(pair.get(2, b""))
    return {"named": named}


def encode_varint(value: int) -> bytes:
    """Return a non-negative integer as a protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_bytes(number: int, value: bytes) -> bytes:
    """Return a length-delimited field."""
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def frame(message: bytes) -> bytes:
    """Return the message prefixed with its length."""
    return _LENGTH.pack(len(message)) + message


def encode_return(sequence: int) -> bytes:
    """Return an RpcReturn frame that holds only the sequence number of its call."""
    return frame(b"\x08" + encode_varint(sequence))


def encode_event_end(sequence: bytes) -> bytes:
    """Return the frames that end an event and return from its call; `sequence` is that of `split_call`."""
    return END_OF_EVENT + frame(b"\x08" + sequence)


def encode_instance_status(sequence: int, name: str, instance_id: int, started_at: int) -> bytes:
    """Return the RpcReturn frame for StartInstance; `started_at` is in seconds.

    The message's `config` field stays empty, because the configuration holds the API token.
    """
    status = (
        encode_bytes(1, name.encode())
        + b"\x10"
        + encode_varint(instance_id)
        + b"\x20"
        + encode_varint(started_at)
    )
    return frame(b"\x08" + encode_varint(sequence) + encode_bytes(33, status))


def encode_pdk_call(method: str, argument: bytes = b"") -> bytes:
    """Return the two frames that have Kong run a PDK function."""
    return frame(method.encode()) + frame(argument)


END_OF_EVENT: Final = frame(b"")
QUERY_LOG: Final = encode_pdk_call("kong.log.serialize")
QUERY_APPLICATION: Final = encode_pdk_call("kong.ctx.shared.get", encode_bytes(1, b"kaa_application_context"))
QUERY_CAPTURES: Final = encode_pdk_call("kong.request.get_uri_captures")
