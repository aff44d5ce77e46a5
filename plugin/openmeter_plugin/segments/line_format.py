"""Format of a Kong segment: lines with checksums, written by an nginx worker while this side reads behind.

A line is the CRC-32 of its payload as 8 hex digits, a space, the payload and a newline. The payload is JSON:
in the first line of a file its head, in every other one the log of a request. Damage costs the lines that it
hits and no other: a newline that was flipped hits none, because the two lines that it joins still have their
checksums, and a byte that became a newline hits one, although two pieces of it are found.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple

import msgspec
import orjson

from openmeter_plugin.metering.lenient_json import json_object

FORMAT: Final = "openmeter-kong-segment"
INSTANCE_FORMAT: Final = "openmeter-kong-instance"
VERSION: Final = 1
MAX_LINE: Final = 1024 * 1024
"""Bytes. A longer line is damage: the writer cuts a payload to 64 KiB."""

_WORKER: Final = r"(?P<worker>[0-9]{1,20}-[0-9]{1,20}-[0-9a-f]{1,64})"
SEGMENT_NAME: Final = re.compile(_WORKER + r"-(?P<number>[0-9]{6,12})\.segment")
LOST_NAME: Final = re.compile(_WORKER + r"\.lost")
UNFINISHED_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,250}\.[0-9]{1,20}-[0-9]{1,20}-[0-9a-f]{1,64}\.tmp")
"""A file that a worker has not given its name yet."""
INSTANCE_ID: Final = "[A-Za-z0-9_-]{1,64}"
INSTANCE_NAME: Final = re.compile(rf"(?P<id>{INSTANCE_ID})\.json")

_CHECKSUM_SIZE: Final = 9  # with the space
_LINE_BEGIN: Final = re.compile(rb"[0-9a-f]{8} \{")
_MAX_CANDIDATES: Final = 64  # of a line within a damaged one; each costs a checksum of the rest


class Flaw(StrEnum):
    """A line that is not valid; the first two are counted as lost requests, with this reason."""

    DAMAGED = "damaged"
    TORN = "torn"
    REMAINDER = "remainder"
    """A further piece of a damaged line, or an empty one."""


class Line(NamedTuple):
    """A payload or a flaw, and the offset after it."""

    content: bytes | Flaw
    end: int


def scan(data: bytes, base: int, *, final: bool) -> list[Line]:
    """Return the lines of `data`, which starts with a line at offset `base` of a segment.

    An incomplete line at the end is left for the next time. With `final` nothing will follow: it is torn.
    """
    found: list[Line] = []
    pieces = data.split(b"\n")
    rest = pieces.pop()
    at = base
    for piece in pieces:
        at += len(piece) + 1
        payload = piece[_CHECKSUM_SIZE:]
        if piece[:_CHECKSUM_SIZE] == b"%08x " % zlib.crc32(payload):
            found.append(Line(payload, at))
        else:
            _add_damaged(found, piece, at, Flaw.DAMAGED)
    if rest and final:
        _add_damaged(found, rest, at + len(rest), Flaw.TORN)
    return found


def _add_damaged(found: list[Line], piece: bytes, end: int, flaw: Flaw) -> None:
    """Add what is in a piece that was not written as one line: lines that were joined, and flaws."""
    # At a segment's end, only the newline may be missing or damaged.
    for whole in (piece, piece[:-1]):
        payload = _payload(whole)
        if payload is not None:
            found.append(Line(payload, end))
            return
    start = end - len(piece) - (flaw is Flaw.DAMAGED)
    for candidate in _last_line_begins(piece):
        last = _payload(piece[candidate:])
        if last is not None:
            # Without the byte before it if that was the newline, or else directly after a torn line.
            first = piece[: candidate - 1] if _payload(piece[:candidate]) is None else piece[:candidate]
            _add_damaged(found, first, start + candidate, Flaw.DAMAGED)
            found[-1] = found[-1]._replace(end=start + candidate)
            found.append(Line(last, end))
            return
    follows = bool(found) and isinstance(found[-1].content, Flaw) and not _LINE_BEGIN.match(piece)
    found.append(Line(Flaw.REMAINDER if follows or not piece else flaw, end))


def _last_line_begins(piece: bytes) -> list[int]:
    begins = [match.start() for match in _LINE_BEGIN.finditer(piece) if match.start() > 0]
    return begins[-_MAX_CANDIDATES:][::-1]


def _payload(line: bytes) -> bytes | None:
    payload = line[_CHECKSUM_SIZE:]
    return payload if line[:_CHECKSUM_SIZE] == b"%08x " % zlib.crc32(payload) else None


def head_version(payload: bytes) -> int | None:
    """Return the version of the format that a head names; None if the payload is no head."""
    if not payload.startswith(b'{"format":') and b'"format"' not in payload[:4096]:
        return None
    try:
        head = json_object(orjson.loads(payload))
    except orjson.JSONDecodeError:
        return None
    version = head.get("version")
    return version if head.get("format") == FORMAT and type(version) is int else None


class Configuration(NamedTuple):
    """A configuration of the plugin, as Kong passes it, and when a worker wrote it, in milliseconds."""

    config: bytes
    created: int


class _InstanceFile(msgspec.Struct):
    format: str
    version: int
    id: str
    created: int
    config: msgspec.Raw


def parse_instance(content: bytes, name: str) -> Configuration | None:
    """Return the configuration in the file of an instance; None if it is damaged, or another one's."""
    payload = _payload(content.removesuffix(b"\n"))
    try:
        file = msgspec.json.decode(payload or b"", type=_InstanceFile)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if (file.format, file.version, file.id) != (INSTANCE_FORMAT, VERSION, name):
        return None
    return Configuration(bytes(file.config), file.created)


LOST_CAUSES: Final = ("no_folder", "disk_full", "read_only", "write_failed", "too_large", "internal_error")
"""Why the writer could not write a request, by the number of the counter."""
LOST_SIZE: Final = 4096
_LOST_MAGIC: Final = b"openmeter-lost-1"
_LOST_MAGIC_AT: Final = 1024
_COUNTERS: Final = struct.Struct("<16Q")
_MAX_COUNTER: Final = 2**48
"""More than any worker can lose: damage, which the books could not hold."""

Counters = Mapping[str, int]


def parse_lost(content: bytes) -> dict[str, int] | None:
    """Return a worker's counts of lost requests by cause, those above 0; None if the file is damaged."""
    if content[_LOST_MAGIC_AT : _LOST_MAGIC_AT + len(_LOST_MAGIC)] != _LOST_MAGIC:
        return None
    values = _COUNTERS.unpack_from(content)
    if max(values) > _MAX_COUNTER:
        return None
    counts: dict[str, int] = {}
    for number, value in enumerate(values):
        if value:
            counts[LOST_CAUSES[number] if number < len(LOST_CAUSES) else f"cause_{number}"] = value
    return counts
