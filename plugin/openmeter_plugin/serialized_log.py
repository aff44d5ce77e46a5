"""Reading a serialized log's bytes: anything that Kong can send becomes a value, never an exception."""

from __future__ import annotations

import json
from typing import Any

import orjson


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
