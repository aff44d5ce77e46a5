"""Taking the body of a post apart into its entries while it arrives.

A body of thousands of logs must neither hold up the event loop nor fail for one bad log in it, so it is
never parsed as a whole. Kong joins the logs with a bare comma: an entry that begins at its true start and
parses up to the next `},{"` is that entry, since no beginning of a JSON object is itself one. Where that
does not parse (the same bytes at the end of a text, bytes that are no UTF-8, white space between entries),
and where an entry is too large to be parsed in one go, `json_scan` finds its end.
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
_MAX_GUESSES: Final = 8  # boundaries tried before brackets are counted: parsing is that much faster
_MAX_TAIL: Final = 64  # bytes behind the last entry, in the one place where they are looked at twice
_LIMITS: Final = Limits()


class NotJsonError(ValueError):
    """The body is neither a JSON array nor a JSON object; the message says how."""


class _Expect(Enum):
    BODY = "a body"
    FIRST = "the first entry or the end of the array"
    ENTRY = "an entry"
    OBJECT = "the object that is the whole body"
    END = "the end of the body"


@dataclass(frozen=True, slots=True)
class Ready:
    """In the place of an entry's value: the record that the short way has made of it."""

    record: bytes


Entry = tuple[Any, bytes]
"""An entry's value, None where it is no JSON or too large, and the bytes that were parsed."""

ShortWay = Callable[[bytes], bytes | None]
"""Makes a record of an entry's bytes, or None; never one of bytes that are no JSON object."""


class EntrySplitter:
    """Yields the entries of a JSON array, or the one object that a body is, as they become complete.

    Between them it yields None where a long search may be interrupted. Raises NotJsonError. An entry for
    which there is a `short_way` is not parsed.
    """

    def __init__(self, limits: Limits = _LIMITS, short_way: ShortWay | None = None) -> None:
        self._limits = limits
        self._short_way = short_way
        self._buffer = bytearray()
        self._expect = _Expect.BODY
        self._at = 0  # where what is expected begins
        self._searched = 0  # no boundary before this
        self._guesses = 0
        self._scan: Scan | None = None

    def feed(self, data: bytes) -> Iterator[Entry | None]:
        """Take more of the body and yield what that completes."""
        self._buffer += data
        yield from self._take(final=False)
        self._forget_taken()

    def finish(self) -> Iterator[Entry | None]:
        """Yield the rest; to be called at the end of the body."""
        yield from self._take(final=True)
        if self._expect is _Expect.BODY:
            raise NotJsonError("the body is empty")
        if self._expect is not _Expect.END:
            raise NotJsonError("the body ends within the JSON")

    def _forget_taken(self) -> None:
        taken, self._at = self._at, 0
        del self._buffer[:taken]
        self._searched = max(0, self._searched - taken)
        if self._scan is not None:
            self._scan.begin = 0

    def _take(self, *, final: bool) -> Iterator[Entry | None]:
        while self._next_begins():
            if self._expect is _Expect.END:
                raise NotJsonError("something follows the end of the JSON")
            found = self._probable_entry(final=final) if self._scan is None else self._scanned(self._scan)
            if found is Stop.MORE:
                return
            yield None if isinstance(found, Stop) else found

    def _next_begins(self) -> bool:
        """Go to what is expected; tell whether it is there."""
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
            return self._next_begins()
        if self._expect is _Expect.FIRST:
            if first == ord("]"):
                self._expect = _Expect.END
                self._at += 1
                return self._next_begins()
            self._expect = _Expect.ENTRY
        return True

    def _skip_white_space(self) -> None:
        match = _WHITE_SPACE.match(self._buffer, self._at)
        if match:
            self._at = match.end()

    def _probable_entry(self, *, final: bool) -> Entry | Stop:
        """Return the entry up to the next boundary if it parses; else its end is to be guessed again.

        After some guesses, and where it gets too large, a scan is begun that finds the end.
        """
        at, end, delimiter = self._at, *self._guessed_end(final=final)
        if not end and not final and len(self._buffer) - at <= self._limits.parsed + len(_BOUNDARY):
            return Stop.MORE
        if not end or end - at > self._limits.parsed:
            return self._begin_scan()
        raw = bytes(memoryview(self._buffer)[at:end])
        record = self._short_way(raw) if self._short_way is not None else None
        if record is not None:
            self._pass(delimiter)
            return Ready(record), raw
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            self._searched = end
            self._guesses += 1
            # Cut short: these bytes stand within the entry, too.
            if error.pos < len(raw) or self._guesses >= _MAX_GUESSES:
                return self._begin_scan()
            return Stop.PAUSE
        self._pass(delimiter)
        return value, raw

    def _guessed_end(self, *, final: bool) -> tuple[int, int]:
        """Return where the entry may end, and the comma or bracket behind it; (0, 0) where unknown."""
        at, buffer = self._at, self._buffer
        end = buffer.find(_BOUNDARY, max(at, self._searched)) + 1
        if end:
            return end, end
        self._searched = max(at, len(buffer) - len(_BOUNDARY) + 1)
        tail = _TAIL.search(buffer, max(at, len(buffer) - _MAX_TAIL)) if final else None
        if tail is None:
            return 0, 0
        self._guesses = _MAX_GUESSES  # there is no other
        return tail.start(), tail.start(1)

    def _begin_scan(self) -> Stop:
        self._scan = Scan(self._at, self._limits, alone=False)
        return Stop.PAUSE

    def _scanned(self, scan: Scan) -> Entry | Stop:
        size = scan.go_on(self._buffer)
        if isinstance(size, Stop):
            return size
        raw = (scan.value(self._buffer, size) or b"").rstrip(b" \t\r\n")
        end = self._at + size
        self._scan = None
        if self._expect is _Expect.OBJECT:
            self._at, self._expect = end, _Expect.END
        else:
            self._pass(end)
        return parse_log(raw), raw

    def _pass(self, delimiter: int) -> None:
        """Go past an entry and the comma or bracket behind it."""
        self._expect = _Expect.END if self._buffer[delimiter] == ord("]") else _Expect.ENTRY
        self._at = delimiter + 1
        self._guesses = 0
