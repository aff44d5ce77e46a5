"""Formatting of values for people: untrusted names made safe, times, numbers."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal

from markupsafe import Markup

_ALLOWED_CONTROLS = frozenset("\n\t")
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories of invisible or text-steering characters: control, format (bidi), surrogates, ..."""


def visible(value: object) -> object:
    """Return a text with each invisible character written as ⟨U+202E⟩; other values unchanged.

    Used as Jinja2's `finalize`, so that no template can forget it. Markup is already safe.
    """
    if not isinstance(value, str) or isinstance(value, Markup) or (value.isascii() and value.isprintable()):
        return value
    return "".join(char if _is_visible(char) else f"⟨U+{ord(char):04X}⟩" for char in value)


def _is_visible(char: str) -> bool:
    return char in _ALLOWED_CONTROLS or unicodedata.category(char) not in _INVISIBLE


def moment(text: object) -> datetime | None:
    """Parse an RFC 3339 time; returns None if it is missing or invalid."""
    if not isinstance(text, str) or not text:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def clock(when: datetime | None) -> str:
    """Format a time: ``2026-11-22 07:03:11 UTC``."""
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if when else ""


def ago(when: datetime | None, now: datetime) -> str:
    """Format a time relative to now: ``5 min ago``, ``in 5 min``; below an hour without seconds."""
    if when is None:
        return "never"
    seconds = round((now - when).total_seconds())
    if seconds == 0:
        return "just now"
    apart = abs(seconds)
    text = duration(apart - apart % 60 if 60 <= apart < 3600 else apart)
    return f"{text} ago" if seconds > 0 else f"in {text}"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units: ``2 h 14 min``."""
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


def size(number_of_bytes: float) -> str:
    """Format a size in bytes: ``1.5 KiB``."""
    value = float(number_of_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


_WITHOUT_CENTS = frozenset({"CLP", "ISK", "JPY", "KRW", "PYG", "UGX", "VND", "XAF", "XOF"})


def money(amount: Decimal | None, currency: str) -> str:
    """Format an amount of money: ``1,204.50 EUR``; a part of a cent shows its first digits."""
    if amount is None:
        return ""
    places = 0 if currency in _WITHOUT_CENTS else 2
    least = Decimal(1).scaleb(-places)
    if amount and abs(amount) < least:
        places = min(12, places - amount.adjusted())
    rounded = amount.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP)
    return f"{rounded:,.{places}f} {currency}"
