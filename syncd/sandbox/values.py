"""Values used across the API: timestamps, ULIDs, numbers and JSON paths."""

import os
import re
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from math import isfinite

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", flags=re.ASCII | re.IGNORECASE
)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", flags=re.ASCII | re.IGNORECASE)
_NAME = r"[A-Za-z_][A-Za-z0-9_-]*"
_JSON_PATH = re.compile(rf"\$(\.{_NAME})+", flags=re.ASCII)


def ulid() -> str:
    """Return a new ULID: 26 characters of Crockford's base 32, sortable by the millisecond."""
    number = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    return "".join(_CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def parse_time(text: str) -> datetime:
    """Parse an RFC 3339 timestamp. Raises ValueError."""
    if not _RFC3339.fullmatch(text):
        raise ValueError(f'"{text}" is not an RFC 3339 timestamp')
    return datetime.fromisoformat(text.upper())


def epoch_seconds(moment: datetime) -> int:
    """Return seconds since 1970, rounded down: OpenMeter stores no finer times (ClickHouse's DateTime)."""
    return int(moment.timestamp() // 1)


def rfc3339(seconds: int) -> str:
    """Format whole seconds since 1970 as OpenMeter does: in UTC, ending in Z."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now_rfc3339(*, plus: float = 0) -> str:
    """Return the current time in UTC, or the one in so many seconds, to the millisecond."""
    return (
        (datetime.now(UTC) + timedelta(seconds=plus))
        .isoformat(timespec="milliseconds")
        .replace("+00:00", "Z")
    )


def parse_number(value: object) -> Decimal | None:
    """Parse what OpenMeter accepts as a metered value: a JSON number, or a string that is one.

    A float is read by its shortest decimal form, so 0.1 is exactly one tenth.
    """
    match value:
        case bool():
            return None
        case int():
            return Decimal(value)
        case float() if isfinite(value):
            return Decimal(repr(value))
        case str() if _NUMBER.fullmatch(value) and isfinite(float(value)):
            return Decimal(value)
    return None


def json_path_names(path: str) -> list[str]:
    """Split a path of the form `$.a.b` into its names. Raises ValueError for any other JSONPath.

    Such a path means the same to OpenMeter and to SQLite's json_extract.
    """
    if not _JSON_PATH.fullmatch(path):
        raise ValueError(f"the sandbox only supports JSON paths of the form $.a.b, not {path}")
    return path.split(".")[1:]


def look_up(data: object, path: str) -> object:
    """Return the value at `path` in decoded JSON. Raises KeyError if there is none."""
    for name in json_path_names(path):
        if not isinstance(data, dict):
            raise KeyError(name)
        data = data[name]
    return data
