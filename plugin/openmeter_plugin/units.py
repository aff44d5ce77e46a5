"""Durations and sizes as people write them (90s, 12h, 7d; 500MiB, 1GiB), and counts as they read them."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_DURATION: Final = timedelta(days=36_525)  # a hundred years: added to any date of today, still a date
_BYTES: Final = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def duration(text: str) -> timedelta:
    """Parse a duration; the ValueError shows an example of one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 12h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _MAX_DURATION.total_seconds():
        raise ValueError(f"{text!r} is more than a hundred years")
    return timedelta(seconds=seconds)


def size(text: str) -> int:
    """Parse a size in bytes; the ValueError shows an example of one."""
    match = re.fullmatch(r"(\d+)\s*((?:[KMGT]iB)?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 500MiB or 1GiB")
    return int(match[1]) * _BYTES[match[2]]


def number(value: float) -> str:
    """Format a number with thousands separators."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.2f}"


def plural(count: float, one: str, many: str | None = None) -> str:
    """Format a count with its noun, and verb if given: ``1 change``, ``1,200 changes``, ``2 events wait``."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"
