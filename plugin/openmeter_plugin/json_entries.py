"""Taking the body of a post apart into its entries while it arrives.

A body of thousands of logs must neither hold up the event loop nor fail for one bad log in it, so it is
never parsed as a whole. Kong joins the logs with a bare comma: an entry that begins at its true start and
parses up to the next `},{"` is that entry, since no beginning of a JSON object is itself one. Where that
does not parse (the same bytes at the end of a text, bytes that are no UTF-8, white space between entries)
its end is found by counting brackets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import Any, Final

import orjson

from openmeter_plugin.serialized_log import parse_log

_BOUNDARY: Final = b'},{"'
_WHITE_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_TAIL: Final = re.compile(rb"[ \t\r\n]*+(\])[ \t\r\n]*+\Z")
_BETWEEN: Final = re.compile(rb'[][{}",]')
_NESTED: Final = re.compile(rb'[][{}"]')
_STRING: Final = re.compile(rb'(?:[^"\\]{1,4096}+|\\.){0,16}+("?)', re.DOTALL)
_TOKENS_AT_ONCE: Final = 1000
_MOST_GUESSES: Final = 8  # boundaries tried before brackets are counted: parsing is that much faster
_LONGEST_TAIL: Final = 64  # bytes behind the last entry, in the one place where they are looked at twice


class NotJsonError(ValueError):
    """The body is neither a JSON array nor a JSON object; the message says how."""


class _Expect(Enum):
    BODY = "a body"
    FIRST = "the first entry or the end of the array"
    ENTRY = "an entry"
    OBJECT = "the object that is the whole body"
    END = "the end of the body"


Entry = tuple[Any, bytes]
"""An entry's value, None where it is no JSON, and its bytes."""


class EntrySplitter:
    """Yields the entries of a JSON array, or the one object that a body is, as they become complete.

    Between them it yields None where a long search may be interrupted. Raises NotJsonError.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._expect = _Expect.BODY
        self._at = 0  # where what is expected begins
        self._searched = 0  # no boundary before this
        self._guesses = 0
        self._scan: _Scan | None = None

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
            self._scan.at -= taken

    def _take(self, *, final: bool) -> Iterator[Entry | None]:
        while self._next_begins():
            if self._expect is _Expect.END:
                raise NotJsonError("something follows the end of the JSON")
            entry = self._probable_entry(final=final) if self._scan is None else None
            if entry is None:
                if self._scan is None:
                    return
                end = self._scan.go_on(self._buffer)
                if end == _PAUSE:
                    yield None
                    continue
                if end == _MORE:
                    return
                entry = self._scanned_entry(end)
            yield entry

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
                self._expect, self._scan = _Expect.OBJECT, _Scan(self._at, alone=True)
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

    def _probable_entry(self, *, final: bool) -> Entry | None:
        """Return the entry up to the first boundary where it parses.

        None with a scan begun: it is for that to find the end; without: more of the body is needed.
        """
        buffer, at = self._buffer, self._at
        while self._guesses < _MOST_GUESSES:
            end = delimiter = buffer.find(_BOUNDARY, max(at, self._searched)) + 1
            if not end:
                self._searched = max(at, len(buffer) - len(_BOUNDARY) + 1)
                if not final:
                    return None
                self._guesses = _MOST_GUESSES
                tail = _TAIL.search(buffer, max(at, len(buffer) - _LONGEST_TAIL))
                if tail is None:
                    break
                end, delimiter = tail.start(), tail.start(1)
            self._guesses += 1
            self._searched = end
            raw = bytes(memoryview(buffer)[at:end])
            try:
                value = orjson.loads(raw)
            except orjson.JSONDecodeError as error:
                if error.pos == len(raw):  # cut short: these bytes stand within the entry, too
                    continue
                break
            self._pass(delimiter)
            return value, raw
        self._scan = _Scan(at, alone=False)
        return None

    def _scanned_entry(self, end: int) -> Entry:
        raw = bytes(memoryview(self._buffer)[self._at : end]).rstrip(b" \t\r\n")
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


_MORE: Final = -1
_PAUSE: Final = -2


class _Scan:
    """Looks for the end of one entry by its brackets, in any number of steps."""

    __slots__ = ("_alone", "_depth", "_in_string", "at")

    def __init__(self, at: int, *, alone: bool) -> None:
        self.at = at
        self._alone = alone
        self._depth = 0
        self._in_string = False

    def go_on(self, buffer: bytearray) -> int:
        """Return where the entry ends, _MORE where that needs more of the body, _PAUSE after many steps."""
        for _ in range(_TOKENS_AT_ONCE):
            if self._in_string:
                text = _STRING.match(buffer, self.at)
                if text is None or text.end() == self.at:
                    return _MORE
                self.at = text.end()
                self._in_string = not text[1]
                continue
            token = (_NESTED if self._depth else _BETWEEN).search(buffer, self.at)
            if token is None:
                self.at = len(buffer)
                return _MORE
            self.at = token.end()
            if self._ends_with(token[0]):
                return token.end() if self._alone else token.start()
        return _PAUSE

    def _ends_with(self, token: bytes) -> bool:
        if token == b'"':
            self._in_string = True
        elif token in (b"{", b"["):
            self._depth += 1
        elif self._depth:
            self._depth -= 1
            return self._alone and not self._depth
        else:
            return token in (b",", b"]")
        return False
