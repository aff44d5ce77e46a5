"""Durations and sizes as people write them: 90s, 12h, 7d; 500MiB, 1GiB."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST: Final = timedelta(days=36_525)  # a hundred years: from any moment now, it still leads to a date
_BYTES: Final = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def duration(text: str) -> timedelta:
    """Return the duration; raises ValueError that says what one looks like."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 12h or 7d")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _LONGEST.total_seconds():
        raise ValueError(f"{text!r} is more than a hundred years")
    return timedelta(seconds=seconds)


def size(text: str) -> int:
    """Return the number of bytes; raises ValueError that says what a size looks like."""
    match = re.fullmatch(r"(\d+)\s*((?:[KMGT]iB)?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 500MiB or 1GiB")
    return int(match[1]) * _BYTES[match[2]]
