"""How values are written for people: names from outside made harmless, times, numbers."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime

from markupsafe import Markup

_PLAIN = frozenset("\n\t")
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories of what is not seen, or steers what is: control, format (bidi), surrogates, ..."""


def visible(value: object) -> object:
    """Return a text with each unseen character written out as ⟨U+202E⟩; anything else as it is.

    For Jinja2's `finalize`, so no template can forget it. Markup is ours already.
    """
    if not isinstance(value, str) or isinstance(value, Markup) or (value.isascii() and value.isprintable()):
        return value
    return "".join(char if _is_seen(char) else f"⟨U+{ord(char):04X}⟩" for char in value)


def _is_seen(char: str) -> bool:
    return char in _PLAIN or unicodedata.category(char) not in _UNSEEN


def moment(text: object) -> datetime | None:
    """Return an RFC 3339 time as it stands in runs, None for none."""
    if not isinstance(text, str) or not text:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def clock(when: datetime | None) -> str:
    """Write a time: ``2026-11-22 07:03:11 UTC``."""
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if when else ""


def ago(when: datetime | None, now: datetime) -> str:
    """Write how long ago a time is, or in how long it comes."""
    if when is None:
        return "never"
    seconds = round((now - when).total_seconds())
    if seconds == 0:
        return "just now"
    return f"{duration(seconds)} ago" if seconds > 0 else f"in {duration(-seconds)}"


def duration(seconds: float) -> str:
    """Write a length of time in its two largest units: ``2 h 14 min``."""
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    if seconds < 10 and not float(seconds).is_integer():
        return f"{seconds:.1f} s"
    total = int(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next(place for place, (_, size) in enumerate(units) if total >= size)
    parts = []
    for name, size in units[first : first + 2]:
        count, total = divmod(total, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts)


def number(value: float) -> str:
    """Write a count with a separator for thousands."""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.2f}"


def size(number_of_bytes: float) -> str:
    """Write a size: ``1.5 KiB``."""
    value = float(number_of_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def plural(count: float, one: str, many: str | None = None) -> str:
    """Write a count with its noun: ``1 change``, ``1,200 changes``."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"
