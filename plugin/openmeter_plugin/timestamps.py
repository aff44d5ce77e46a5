"""Times as CloudEvents write them."""

from __future__ import annotations

import time
from typing import Final

from openmeter_plugin.values import count

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
