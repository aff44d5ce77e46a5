"""Lenient JSON: reads any value that Kong can send and never raises.

Accessors for untrusted values (a value of the wrong type counts as missing), decoding and encoding of a
log, and the times of CloudEvents.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Final

import orjson

MAX_TEXT: Final = 1024
"""Characters kept of any text that a client can choose, so that no event grows without limit."""

MAX_COUNT: Final = 2**53  # beyond it JSON numbers are no longer exact

_EMPTY: Final[Mapping[str, Any]] = {}


def json_object(value: object) -> Mapping[str, Any]:
    """Return the value if it is a JSON object, else an empty object."""
    return value if type(value) is dict else _EMPTY


def text(value: object) -> str | None:
    """Return a non-empty text, cut to MAX_TEXT."""
    if type(value) is str and value:
        return value if len(value) <= MAX_TEXT else value[:MAX_TEXT]
    return None


def identifier(value: object) -> str | None:
    """Return an identifier. It is never cut, since a cut one would identify something else."""
    return value if type(value) is str and 0 < len(value) <= MAX_TEXT else None


def count(value: object) -> int | None:
    """Return a non-negative number as an integer. Some Kong versions write sizes as text."""
    if type(value) is int:
        return value if 0 <= value <= MAX_COUNT else None
    if type(value) is float:
        return round(value) if 0 <= value <= MAX_COUNT else None
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) <= 16:
        return count(int(value))
    return None


def first(value: object) -> object:
    """Return a header or query argument, the first one if it was sent several times."""
    return value[0] if type(value) is list and value else value


def put(data: dict[str, Any], key: str, value: object) -> None:
    """Set a member if it has a value: what the log lacks, the event lacks."""
    if value is not None:
        data[key] = value


# Decoding and encoding


def parse_log(raw: bytes) -> Any:
    """Return the JSON value of a serialized log, or None if the bytes are not JSON.

    Kong writes header values as raw bytes, so a client that sends Latin-1 in a header makes a log that is
    not UTF-8. The bill must not depend on that: such bytes are replaced.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(raw.decode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError):
        return None


def encode_json(value: object) -> bytes:
    """Return a JSON value as UTF-8 bytes; a lone surrogate, which UTF-8 cannot encode, becomes `?`."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# Times

MAX_TIMESTAMP: Final = 253_402_300_799_999
"""Milliseconds: the end of the year 9999, the last time that RFC 3339 can express."""


def usable_time(value: object) -> int | None:
    """Return a time in milliseconds since 1970, or None if RFC 3339 cannot express the value."""
    milliseconds = count(value)
    return milliseconds if milliseconds and milliseconds <= MAX_TIMESTAMP else None


_FRACTIONS: Final = [f".{rest:03d}Z" for rest in range(1000)]
_last_second = (-1, "")  # and its text: the requests of a second share it


def rfc3339(milliseconds: int) -> str:
    """Return a time in milliseconds since 1970 as RFC 3339 in UTC with milliseconds."""
    global _last_second  # noqa: PLW0603 - a cache of one
    second, rest = divmod(milliseconds, 1000)
    known, prefix = _last_second  # read once: under kong-pdk other threads replace it concurrently
    if second != known:
        prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _last_second = (second, prefix)
    return prefix + _FRACTIONS[rest]
