"""Entries of a post's body, each as the bytes of its log.

Kong encodes each log with lua-cjson and joins them with commas, so nearly every body is JSON. It is split
without creating a value: 14 MB take 50 to 110 ms, whatever they contain (orjson: up to 600 ms), and each log
is decoded later into the few members that an event needs. A body with an entry that is not JSON is split by
its brackets instead, so that one bad log does not fail its batch. lua-cjson never writes such an entry: it
escapes control characters, refuses NaN and more than 1000 levels, and copies bytes that are not UTF-8, which
are no hindrance here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import msgspec

MAX_FAST_COMMAS: Final = 2_000_000
"""Of a body that is split at once. 16 MiB of ordinary logs have a third of them. Each entry costs 50 bytes of
memory, and a body could hold millions of empty ones."""

_WHITE_SPACE: Final = b" \t\r\n"
_TOKEN: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)
_split: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode


class NotJsonError(ValueError):
    """The body is neither a JSON array nor a JSON object; the message says why."""


def entries(body: bytes | bytearray) -> Iterator[bytes]:
    """Yield the elements of the array, or the object that is the whole body; raises NotJsonError."""
    begin = body[:1] if body[:1] not in _WHITE_SPACE else body.lstrip(_WHITE_SPACE)[:1]
    if not begin:
        raise NotJsonError("the body is empty")
    if begin == b"{":
        yield from _alone(body)
    elif begin != b"[":
        raise NotJsonError("the body is neither a JSON array nor a JSON object")
    elif body.count(b",") > MAX_FAST_COMMAS:
        yield from _by_brackets(body)
    else:
        try:
            found = _split(body)
        except (msgspec.DecodeError, RecursionError):
            yield from _by_brackets(body)
        else:
            yield from map(bytes, found)


def _alone(body: bytes | bytearray) -> Iterator[bytes]:
    """Yield the object, which may contain errors but must be whole."""
    found = list(_by_brackets(b"[" + body + b"]"))
    if len(found) != 1:
        raise NotJsonError("something follows the end of the JSON")
    yield from found


def _by_brackets(body: bytes | bytearray) -> Iterator[bytes]:
    """Yield what is between the commas of the outermost array, JSON or not."""
    start = body.index(b"[") + 1
    depth, count = 0, 0
    for token in _TOKEN.finditer(body, start):
        kind = body[token.start()]
        if kind == _QUOTE or (kind == _COMMA and depth):
            continue
        if kind in _OPENING:
            depth += 1
        elif depth:
            depth -= 1
        else:
            entry = bytes(body[start : token.start()]).strip(_WHITE_SPACE)
            start = token.end()
            if entry or count or kind == _COMMA:  # otherwise the array is empty
                yield entry
            count += 1
            if kind != _COMMA:
                if body[start:].strip(_WHITE_SPACE):
                    raise NotJsonError("something follows the end of the JSON")
                return
    raise NotJsonError("the body ends within the JSON")


_QUOTE: Final = ord('"')
_COMMA: Final = ord(",")
_OPENING: Final = b"[{"
