"""Reading JSON that may be anything: what is not of the wanted type is as if it were not there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

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
