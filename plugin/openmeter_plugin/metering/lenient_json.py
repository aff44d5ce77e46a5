"""Reading JSON that may be anything: what is not of the wanted type is as if it were not there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, Final

import orjson

MAX_TEXT: Final = 1024
"""Characters kept of any text that a client can choose, so that no event grows without bound."""

LARGEST_COUNT: Final = 2**53  # beyond it JSON numbers are no longer exact

_EMPTY: Final[Mapping[str, Any]] = {}


def table(value: object) -> Mapping[str, Any]:
    """Return the value where it is a JSON object, else an empty one."""
    return value if type(value) is dict else _EMPTY


def text(value: object) -> str | None:
    """Return a text that is not empty, cut to MAX_TEXT."""
    if type(value) is str and value:
        return value if len(value) <= MAX_TEXT else value[:MAX_TEXT]
    return None


def identifier(value: object) -> str | None:
    """Return a text that names somebody or something: never cut short, since that would name another."""
    return value if type(value) is str and 0 < len(value) <= MAX_TEXT else None


def count(value: object) -> int | None:
    """Return a non-negative number as a whole one; Kong has written sizes as text in some versions."""
    if type(value) is int:
        return value if 0 <= value <= LARGEST_COUNT else None
    if type(value) is float:
        return round(value) if 0 <= value <= LARGEST_COUNT else None
    if type(value) is str and value.isascii() and value.isdecimal() and len(value) <= 16:
        return count(int(value))
    return None


def first(value: object) -> object:
    """Return a header or query argument, the first where it was given several times."""
    return value[0] if type(value) is list and value else value


def put(data: dict[str, Any], key: str, value: object) -> None:
    """Set a member unless there is no value for it: what is absent in the log is absent in the event."""
    if value is not None:
        data[key] = value


# MERGED: Reading a serialized log's bytes: anything that Kong can send becomes a value, never an exception.


def parse_log(raw: bytes) -> Any:
    """Return the JSON value, or None where there is none.

    Kong writes header values as the bytes that they are, so a client that sends Latin-1 in a header
    makes a log that is not UTF-8. The bill must not depend on that: such bytes are replaced.
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
    """Return a JSON value as UTF-8 bytes; half of a surrogate pair, which UTF-8 cannot hold, becomes `?`."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


# MERGED: Times as CloudEvents write them.

LATEST: Final = 253_402_300_799_999
"""Milliseconds: the end of the year 9999, the last that RFC 3339 can write."""


class _Clock:
    """RFC 3339 with milliseconds; the part up to the second is made once per second, not per event."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = (-1, "")

    def text(self, milliseconds: int) -> str:
        second, rest = divmod(milliseconds, 1000)
        known, prefix = self._last  # one object: under kong-pdk other threads write it meanwhile
        if second != known:
            prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._last = (second, prefix)
        return f"{prefix}.{rest:03d}Z"


_clock: Final = _Clock()


def usable_time(value: object) -> int | None:
    """Return a time in milliseconds since 1970, or None where the value is none that RFC 3339 can write."""
    milliseconds = count(value)
    return milliseconds if milliseconds and milliseconds <= LATEST else None


def rfc3339(milliseconds: int) -> str:
    """Return a time in milliseconds since 1970 as RFC 3339 in UTC with milliseconds."""
    return _clock.text(milliseconds)
