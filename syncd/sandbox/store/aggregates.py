"""SQL functions missing from SQLite: exact sums of decimals, and calendar windows in a time zone."""

import sqlite3
from datetime import datetime, timedelta
from decimal import Context, Decimal
from functools import lru_cache
from zoneinfo import ZoneInfo

from syncd.sandbox.values import parse_number

WINDOW_SECONDS = {"MINUTE": 60, "HOUR": 3600}
"""Lengths of the fixed windows; DAY and MONTH follow the calendar."""

# Every UTC offset since 1986 is a multiple of 15 minutes, so all times in one quarter share their window.
_QUARTER = 900

# Python's default of 28 digits is fewer than OpenMeter's Decimal128 has.
_EXACT = Context(prec=100)


def register_functions(connection: sqlite3.Connection) -> None:
    """Register decimal_sum(value), number(value) and window_start(seconds, size, zone) on a connection."""
    connection.create_aggregate("decimal_sum", 1, _DecimalSum)  # type: ignore[arg-type]  # result is text or NULL
    connection.create_function("number", 1, _number, deterministic=True)
    connection.create_function("window_start", 3, _window_start, deterministic=True)


def window_end(start: int, size: str, zone: str) -> int:
    """Return the end of the window that starts at `start`, both in seconds since 1970."""
    if size in WINDOW_SECONDS:
        return start + WINDOW_SECONDS[size]
    first = datetime.fromtimestamp(start, ZoneInfo(zone))
    # 32 days after the first is always in the next month; a day ends on the next date, however long it is.
    later = first + timedelta(days=1 if size == "DAY" else 32)
    end = later if size == "DAY" else later.replace(day=1)
    return int(end.timestamp())


class _DecimalSum:
    """SUM over numbers and numeric strings without rounding; skips other values, as OpenMeter does."""

    def __init__(self) -> None:
        self._whole = 0
        self._rest = Decimal(0)
        self._counted = False

    def step(self, value: int | float | str | None) -> None:
        if type(value) is int:
            self._whole += value
            self._counted = True
        elif (number := parse_number(value)) is not None:
            self._rest = _EXACT.add(self._rest, number)
            self._counted = True

    def finalize(self) -> str | None:
        return str(_EXACT.add(self._rest, self._whole)) if self._counted else None


def _number(value: float | str | None) -> float | None:
    number = parse_number(value)
    return None if number is None else float(number)


def _window_start(seconds: int, size: str, zone: str) -> int:
    step = 60 if size == "MINUTE" else _QUARTER
    return _start_of_window(seconds // step * step, size, zone)


@lru_cache(maxsize=100_000)
def _start_of_window(seconds: int, size: str, zone: str) -> int:
    local = datetime.fromtimestamp(seconds, ZoneInfo(zone))
    if size in WINDOW_SECONDS:
        offset = int((local.utcoffset() or timedelta(0)).total_seconds())
        return (seconds + offset) // WINDOW_SECONDS[size] * WINDOW_SECONDS[size] - offset
    midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    return int((midnight if size == "DAY" else midnight.replace(day=1)).timestamp())
