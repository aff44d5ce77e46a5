"""Splitter that takes the body of a post apart into its entries while it arrives.

A body of thousands of logs must neither block the event loop nor fail because of one bad log, so it is never
parsed as a whole. Kong joins the logs with a bare comma: an entry that begins at its true start and parses up
to the next `},{"` is complete, since no proper prefix of a JSON object is itself one. If it does not parse
(the same bytes at the end of a text, invalid UTF-8, white space between entries), or if it is too large to be
parsed at once, `scanner` finds its end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import orjson

from openmeter_plugin.http_log.scanner import Limits, Scan, Stop
from openmeter_plugin.metering.lenient_json import parse_log

_BOUNDARY: Final = b'},{"'
_WHITE_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_TAIL: Final = re.compile(rb"[ \t\r\n]*+(\])[ \t\r\n]*+\Z")
_MAX_GUESSES: Final = 8  # boundaries tried before brackets are counted: parsing is so much faster
_MAX_TAIL: Final = 64  # bytes after the last entry; these may be searched twice
_LIMITS: Final = Limits()


class NotJsonError(ValueError):
    """The body is neither a JSON array nor a JSON object; the message says why."""


class _Expect(Enum):
    BODY = "a body"
    FIRST = "the first entry or the end of the array"
    ENTRY = "an entry"
    OBJECT = "the object that is the whole body"
    END = "the end of the body"


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """Takes the place of an entry's value if the fast path has encoded its record."""

    record: bytes


Entry = tuple[Any, bytes]
"""An entry's value, None if it is not JSON or too large, and the bytes that were parsed."""

Encode = Callable[[bytes], bytes | None]
"""Encodes the record of an entry's bytes, or returns None; always None if they are not a JSON object."""


class EntrySplitter:
    """Yields the entries of a JSON array, or the single object of a body, as they become complete.

    Also yields None where a long search can be interrupted. Raises NotJsonError. Entries that `encode`
    returns a record for are not parsed.
    """

    def __init__(self, limits: Limits = _LIMITS, encode: Encode | None = None) -> None:
        self._limits = limits
        self._encode = encode
        self._buffer = bytearray()
        self._expect = _Expect.BODY
        self._at = 0  # the position from which `_expect` applies
        self._searched = 0  # there is no boundary before this position
        self._guesses = 0
        self._scan: Scan | None = None

    def feed(self, data: bytes) -> Iterator[Entry | None]:
        """Add more of the body, and yield the entries that it completes."""
        self._buffer += data
        yield from self._entries(final=False)
        self._trim()

    def finish(self) -> Iterator[Entry | None]:
        """Yield the remaining entries; call this at the end of the body."""
        yield from self._entries(final=True)
        if self._expect is _Expect.BODY:
            raise NotJsonError("the body is empty")
        if self._expect is not _Expect.END:
            raise NotJsonError("the body ends within the JSON")

    def _trim(self) -> None:
        done, self._at = self._at, 0
        del self._buffer[:done]
        self._searched = max(0, self._searched - done)
        if self._scan is not None:
            self._scan.begin = 0

    def _entries(self, *, final: bool) -> Iterator[Entry | None]:
        while self._has_next():
            if self._expect is _Expect.END:
                raise NotJsonError("something follows the end of the JSON")
            found = self._probable_entry(final=final) if self._scan is None else self._scanned(self._scan)
            if found is Stop.MORE:
                return
            yield None if isinstance(found, Stop) else found

    def _has_next(self) -> bool:
        """Advance to the next expected element; return whether the buffer has it."""
        if self._scan is not None:
            return True
        self._skip_white_space()
        if self._at == len(self._buffer):
            return False
        first = self._buffer[self._at]
        if self._expect is _Expect.BODY:
            if first == ord("{"):
                self._expect, self._scan = _Expect.OBJECT, Scan(self._at, self._limits, alone=True)
                return True
            if first != ord("["):
                raise NotJsonError("the body is neither a JSON array nor a JSON object")
            self._expect = _Expect.FIRST
            self._at += 1
            return self._has_next()
        if self._expect is _Expect.FIRST:
            if first == ord("]"):
                self._expect = _Expect.END
                self._at += 1
                return self._has_next()
            self._expect = _Expect.ENTRY
        return True

    def _skip_white_space(self) -> None:
        match = _WHITE_SPACE.match(self._buffer, self._at)
        if match:
            self._at = match.end()

    def _probable_entry(self, *, final: bool) -> Entry | Stop:
        """Return the entry up to the next boundary if it parses; otherwise the next call tries a later one.

        After some attempts, or if the entry gets too large, start a scan for its end.
        """
        at, end, delimiter = self._at, *self._guessed_end(final=final)
        if not end and not final and len(self._buffer) - at <= self._limits.parsed + len(_BOUNDARY):
            return Stop.MORE
        if not end or end - at > self._limits.parsed:
            return self._start_scan()
        raw = bytes(memoryview(self._buffer)[at:end])
        record = self._encode(raw) if self._encode is not None else None
        if record is not None:
            self._advance(delimiter)
            return EncodedRecord(record), raw
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            self._searched = end
            self._guesses += 1
            # An error before the end means that the entry is not just cut off: its end must be scanned for.
            if error.pos < len(raw) or self._guesses >= _MAX_GUESSES:
                return self._start_scan()
            return Stop.PAUSE
        self._advance(delimiter)
        return value, raw

    def _guessed_end(self, *, final: bool) -> tuple[int, int]:
        """Return where the entry may end and where its delimiter is; (0, 0) if unknown."""
        at, buffer = self._at, self._buffer
        end = buffer.find(_BOUNDARY, max(at, self._searched)) + 1
        if end:
            return end, end
        self._searched = max(at, len(buffer) - len(_BOUNDARY) + 1)
        tail = _TAIL.search(buffer, max(at, len(buffer) - _MAX_TAIL)) if final else None
        if tail is None:
            return 0, 0
        self._guesses = _MAX_GUESSES  # there is no other candidate
        return tail.start(), tail.start(1)

    def _start_scan(self) -> Stop:
        self._scan = Scan(self._at, self._limits, alone=False)
        return Stop.PAUSE

    def _scanned(self, scan: Scan) -> Entry | Stop:
        size = scan.step(self._buffer)
        if isinstance(size, Stop):
            return size
        raw = (scan.value(self._buffer, size) or b"").rstrip(b" \t\r\n")
        end = self._at + size
        self._scan = None
        if self._expect is _Expect.OBJECT:
            self._at, self._expect = end, _Expect.END
        else:
            self._advance(end)
        return parse_log(raw), raw

    def _advance(self, delimiter: int) -> None:
        """Advance past an entry and its delimiter, a comma or bracket."""
        self._expect = _Expect.END if self._buffer[delimiter] == ord("]") else _Expect.ENTRY
        self._at = delimiter + 1
        self._guesses = 0
