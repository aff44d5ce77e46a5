"""The JSON codec of all clients, and checks of the shape of decoded answers."""

from __future__ import annotations

import json
from typing import cast

import orjson

from syncd.core.errors import MalformedError


def encode_json(value: object) -> bytes:
    """Encode with orjson, and with the slower json module what orjson refuses."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a number beyond 64 bits, or half a surrogate pair, that another client wrote
        return json.dumps(value).encode()


def decode_json(content: bytes) -> object:
    """Decode with orjson, and with the slower json module what orjson refuses.

    Raises ValueError or RecursionError.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        # A name with half a surrogate pair must fail that one consumer, not the whole page.
        return json.loads(content)


def expect_object(value: object, api: str, what: str) -> dict[str, object]:
    """Return `value` if it is a JSON object; raises MalformedError."""
    if not isinstance(value, dict):
        raise MalformedError(f"{api}: {what} is not a JSON object")
    return value


def expect_list(value: object, api: str, what: str) -> list[object]:
    """Return `value` if it is a JSON array; raises MalformedError."""
    if not isinstance(value, list):
        raise MalformedError(f"{api}: {what} is not a JSON array")
    return value


def expect_objects(values: object, api: str, what: str, entry: str) -> list[dict[str, object]]:
    """Return `values` if it is a JSON array of objects; raises MalformedError, which calls one `entry`."""
    for value in (listed := expect_list(values, api, what)):
        if not isinstance(value, dict):
            raise MalformedError(f"{api}: {entry} is not a JSON object")
    return cast("list[dict[str, object]]", listed)
