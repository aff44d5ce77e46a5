"""The spool's file format: segment files, appended to by one process and read by another.

Constraints
  * What Kong has an answer for survives kill -9 of all our processes: before the answer is sent, its
    whole group is in the file, passed to the kernel in one write(2). `fsync` decides about power loss
    (see `writer`).
  * One request is one record, whether it has events or is skipped. The books are counted from committed
    records, so they cannot disagree with the spool.
  * A reader may look at any moment, and a writer may die at any byte.

Layout of `<spool>/queues/<destination>/<created ns>-<pid>-<n>.seg`, all numbers little-endian
  header  8 bytes  `OMSPOOL1`
  record  4 bytes  marker F5 'O' 'M' 'R'
          4 bytes  length of the payload
          4 bytes  CRC-32 of the payload
          payload  1 byte kind, then by kind:
            E  1 byte number of events, 2 bytes length of the summary, the summary, then the
               CloudEvents as JSON, separated by commas. The summary is what accounting needs,
               so that it parses no JSON (empty where there is none): 2 bytes length of the first
               event's id, that id, a capital letter for the gap in its AI usage if it has one, a
               letter for the type of each event, the hour of their time as 2026-11-22T07, the
               subject
            S  the skip reason
            Q  JSON {"reason", "log", "application"}: a quarantined request, redacted, for replay
            L  JSON {"count", "reason"}: requests that could not be written and are lost

Invariants
  * A segment grows only while its writer holds an exclusive flock on it, and never after that. It gets
    its final name once it is locked; before that it is a `.tmp`, which readers ignore.
  * A record is valid if its marker, length and checksum are. An incomplete record at the end of a locked
    segment is still being written. At the end of an unlocked one it is a torn tail: Kong got no answer
    for it, so it is reported and passed over.
  * After a damaged record, reading resumes at the next marker whose record is valid.
  * A writer whose write fails leaves the segment as it is and starts a new one with the first record
    that is not entirely in the old one.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

MAGIC: Final = b"OMSPOOL1"
MARKER: Final = b"\xf5OMR"
SUFFIX: Final = ".seg"

MAX_PAYLOAD: Final = 65 * 1024 * 1024
"""Bytes: a record made from a frame of the largest size still fits."""

EVENTS: Final = b"E"
SKIPPED: Final = b"S"
QUARANTINED: Final = b"Q"
LOST: Final = b"L"

MAX_EVENTS: Final = 255

_SHORT: Final = struct.Struct("<H")
_USAGE: Final = struct.Struct("<cBHH")  # up to the first event's id
_HEAD: Final = struct.Struct("<4sII")
HEAD_SIZE: Final = _HEAD.size


def encode_record(payload: bytes) -> bytes:
    """Return the payload as an encoded record."""
    return _HEAD.pack(MARKER, len(payload), zlib.crc32(payload)) + payload


class Summary(NamedTuple):
    """What a record's events have in common, and the type of each event."""

    types: tuple[str, ...]
    hour: str
    first_id: str
    subject: str
    gap: str | None = None


_LETTER: Final = {
    "kong.api_request": "r",
    "kong.llm_request": "l",
    "kong.llm_cache_hit": "h",
    "kong.llm_call": "c",
    "kong.mcp_request": "m",
    "kong.a2a_request": "a",
}
_GAP_LETTER: Final = {
    None: "",
    "ai_statistics_off": "S",
    "ai_output_unknown": "O",
    "ai_usage_estimated": "E",
}
_TYPES: Final = {ord(letter): name for name, letter in _LETTER.items()}
_GAPS: Final = {ord(letter): name for name, letter in _GAP_LETTER.items() if letter}
_LETTERS: Final = "".join([*_LETTER.values(), *_GAP_LETTER.values()]).encode()
_HOUR_SIZE: Final = len("2026-11-22T07")


def encode_usage(
    events: list[bytes], types: list[str], time: str, first_id: str, subject: str, gap: str | None = None
) -> bytes:
    """Return the record of a request's events with their summary, if the format can express it."""
    try:
        letters = _LETTER[types[0]] if len(types) == 1 else "".join([_LETTER[name] for name in types])
        if gap is not None:
            letters = _GAP_LETTER[gap] + letters
        identifier = first_id.encode()
        rest = f"{letters}{time[:_HOUR_SIZE]}{subject}".encode()
        size = _SHORT.size + len(identifier) + len(rest)
        head = _USAGE.pack(EVENTS, len(events), size, len(identifier))
    except (KeyError, UnicodeEncodeError, struct.error):
        return encode_events(events)
    payload = head + identifier + rest + b",".join(events)
    return _HEAD.pack(MARKER, len(payload), zlib.crc32(payload)) + payload


def encode_events(events: list[bytes]) -> bytes:
    """Return the record of a request's events, each already encoded as JSON; at most 255."""
    head = EVENTS + bytes((len(events),)) + _SHORT.pack(0)
    return encode_record(head + b",".join(events))


class Record(NamedTuple):
    """A valid record: its kind, its payload after the kind byte, and the offset after the record."""

    kind: bytes
    body: bytes
    end: int

    @property
    def event_count(self) -> int:
        """How many events an E record holds."""
        return self.body[0]

    @property
    def events(self) -> bytes:
        """The events of an E record, JSON objects separated by commas."""
        return self.body[3 + self.body[1] + 256 * self.body[2] :]

    @property
    def summary(self) -> Summary | None:
        """The summary of an E record, if it has one."""
        body = self.body
        size = body[1] + 256 * body[2]
        if not size:
            return None
        key = 5 + body[3] + 256 * body[4]
        return decode_usage_key(body[key : 3 + size], body[5:key].decode())


def decode_usage_key(key: bytes, first_id: str = "") -> Summary:
    """Return the summary with this usage key: the part after the id, equal for requests counted alike."""
    subject = key.lstrip(_LETTERS)  # an hour begins with a digit
    letters, gap = key[: len(key) - len(subject)], gap_of_usage_key(key)
    types = tuple([_TYPES[letter] for letter in letters[gap is not None :]])
    return Summary(types, subject[:_HOUR_SIZE].decode(), first_id, subject[_HOUR_SIZE:].decode(), gap)


def gap_of_usage_key(key: bytes) -> str | None:
    """Return the gap in the AI usage of requests with this usage key."""
    return _GAPS.get(key[0])


class Damage(NamedTuple):
    """Bytes that are not a valid record, from `start` to `end`, where reading resumes."""

    start: int
    end: int


def item_at(data: bytes, at: int, base: int, *, final: bool) -> Record | Damage | None:
    """Return the record or the damage at an offset of `data`, which starts at offset `base` of a segment.

    With `final` (the writer is gone and this is everything) an incomplete end is Damage. Otherwise it is
    left for the next read: None.
    """
    stop = _record_end(data, at)
    if stop:
        start = at + HEAD_SIZE
        return Record(data[start : start + 1], data[start + 1 : stop], base + stop)
    if stop is None and not final:
        return None
    following = _next_valid(data, at + 1, final=final)
    if following is None and not final:
        return None
    return Damage(base + at, base + (len(data) if following is None else following))


def _record_end(data: bytes, at: int) -> int | None:
    """Return where the record at `at` ends, 0 if there is none, None if it may still be incomplete."""
    if len(data) - at < HEAD_SIZE:
        return None if MARKER.startswith(data[at : at + 4]) or data.startswith(MARKER, at) else 0
    marker, length, checksum = _HEAD.unpack_from(data, at)
    if marker != MARKER or not 0 < length <= MAX_PAYLOAD:
        return 0
    stop: int = at + HEAD_SIZE + length
    if stop > len(data):
        return None
    return stop if zlib.crc32(data[at + HEAD_SIZE : stop]) == checksum else 0


def _next_valid(data: bytes, at: int, *, final: bool) -> int | None:
    """Return the offset of the next record that is valid, or may be valid once it is complete."""
    while (at := data.find(MARKER, at)) >= 0:
        stop = _record_end(data, at)
        if stop or (stop is None and not final):
            return at
        at += 1
    return None
