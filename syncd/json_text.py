"""JSON: quick where it is ordinary, and right where it is not, as in a name with half a surrogate pair."""

from __future__ import annotations

import json

import orjson


def encoded(value: object) -> bytes:
    """Return the JSON of a value."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a number beyond 64 bits, or half a surrogate pair, that somebody else wrote
        return json.dumps(value).encode()


def parsed(content: bytes) -> object:
    """Return the value of some JSON; raises ValueError or RecursionError."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        # A name with half a surrogate pair is one consumer's problem, not that of the whole page.
        return json.loads(content)
