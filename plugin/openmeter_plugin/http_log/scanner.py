"""Finding the end of one JSON value in steps, and making it small enough to be parsed in one go.

Parsing holds up everything else in its process, for 20 to 40 ms a megabyte where values are many and small.
So what is larger than `Limits.parsed` is scanned by its brackets instead, in any number of short steps, and
parsed with what is not needed left out: of a long text only so much is kept that an event is the same with
it, and only where that does not suffice, large arrays and objects become null.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from openmeter_plugin.metering.lenient_json import MAX_TEXT

_BETWEEN: Final = re.compile(rb'[][{}",]')
_NESTED: Final = re.compile(rb'[][{}"]')
_TEXT: Final = re.compile(rb'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_RUN: Final = re.compile(
    rb'(?:[^][{}"]++|"[^"\\]{0,256}+"|[\[{](?:[^][{}"]++|"[^"\\]{0,256}+")*+[\]}])*+', re.DOTALL
)
"""Short texts, everything that is neither text nor bracket, and small values with no others in them."""
_KEPT: Final = re.compile(
    rb"(?>\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\."
    rb"|[\xc2-\xf4][\x80-\xbf]{1,3}+|[^\"\\]){%d}+" % (2 * MAX_TEXT),
    re.DOTALL,
)
"""So many characters of a text that an event cuts it to the same as the whole, or refuses it as too long."""

_BYTES_AT_ONCE: Final = 32 * 1024
_TOKENS_AT_ONCE: Final = 200
_DEEPEST: Final = 32  # what is nested deeper than this is left out with what it is in


class Stop(Enum):
    """Why a search ended without a result."""

    MORE = "more of the body is needed"
    PAUSE = "others may have their turn"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes: of what is parsed in one go, of a text and of a container that stay in what is larger."""

    parsed: int = 128 * 1024
    text: int = 4 * 1024
    container: int = 64 * 1024


class _Span(NamedTuple):
    """Bytes to leave out, and what stands in their place."""

    start: int
    end: int
    instead: bytes


class Scan:
    """Looks for the end of one value, which begins at `begin` in the buffer, in any number of steps."""

    __slots__ = (
        "_alone",
        "_at",
        "_containers",
        "_depth",
        "_left_out",
        "_limits",
        "_open",
        "_run_bytes",
        "_text_at",
        "_texts",
        "_texts_left_out",
        "begin",
    )

    def __init__(self, begin: int, limits: Limits, *, alone: bool) -> None:
        self.begin = begin
        self._alone = alone  # a value that ends with its bracket, not with a comma or bracket behind it
        self._limits = limits
        self._run_bytes = min(_BYTES_AT_ONCE, limits.container)  # what is passed over in a run is never cut
        self._at = 0  # this and all other places are counted from `begin`
        self._depth = 0
        self._text_at: int | None = None  # where the text begins that the scan is in
        self._texts: list[_Span] = []  # what can be left out of texts
        self._containers: list[_Span] = []  # containers that can be left out
        self._open: list[tuple[int, int]] = []  # begin of each container, left out before
        self._texts_left_out = self._left_out = 0

    def go_on(self, buffer: bytearray) -> int | Stop:
        """Return the size of the value once its end is found; each call takes a bounded time."""
        stop_at = self._at + _BYTES_AT_ONCE
        for _ in range(_TOKENS_AT_ONCE):
            if self._at >= stop_at:
                break
            if self._text_at is not None:
                if not self._pass_text(buffer):
                    return Stop.MORE
            elif (size := self._pass_token(buffer)) is not None:
                return size
        return Stop.PAUSE

    def _pass_text(self, buffer: bytearray) -> bool:
        """Go on in a text; tell whether there was more of it."""
        begin, start = self.begin, self.begin + self._at
        match = _TEXT.match(buffer, start, start + _BYTES_AT_ONCE)
        if match is None or match.end() == start:
            return False
        self._at = match.end() - begin
        if match[1]:
            self._end_text(buffer, self._at - 1)
        return True

    def _end_text(self, buffer: bytearray, end: int) -> None:
        start, self._text_at = self._text_at or 0, None
        if end - start <= self._limits.text:
            return
        kept = _KEPT.match(buffer, self.begin + start, self.begin + end)
        if kept is not None:
            span = _Span(kept.end() - self.begin, end, b"")
            self._texts.append(span)
            self._texts_left_out += end - span.start
            self._left_out += end - span.start

    def _pass_token(self, buffer: bytearray) -> int | Stop | None:
        """Go past the next bracket, quotation mark or comma; return the size where that is the end."""
        start = self.begin + self._at
        limit = start + _BYTES_AT_ONCE
        if self._depth:
            run = _RUN.match(buffer, start, start + self._run_bytes)
            start = run.end() if run else start
        token = (_NESTED if self._depth else _BETWEEN).search(buffer, start, limit)
        if token is None:
            self._at = min(limit, len(buffer)) - self.begin
            return Stop.MORE if self._at + self.begin == len(buffer) else None
        self._at = token.end() - self.begin
        if not self._ends_with(token[0]):
            return None
        return self._at if self._alone else self._at - 1

    def _ends_with(self, token: bytes) -> bool:
        if token == b'"':
            self._text_at = self._at
        elif token in (b"{", b"["):
            self._depth += 1
            if self._depth <= _DEEPEST:
                self._open.append((self._at - 1, self._left_out))
        elif self._depth:
            if self._depth <= _DEEPEST:
                self._end_container(*self._open.pop())
            self._depth -= 1
            return self._alone and not self._depth
        else:
            return token in (b",", b"]")
        return False

    def _end_container(self, start: int, left_out_before: int) -> None:
        size = self._at - start
        if self._depth == 1 or size - (self._left_out - left_out_before) <= self._limits.container:
            return
        span = _Span(start, self._at, b"null")
        self._containers.append(span)
        self._left_out = left_out_before + size - len(span.instead)

    def value(self, buffer: bytearray, size: int) -> bytes | None:
        """Return the bytes to parse for the value, or None where too much of it would have to be left out."""
        if size <= self._limits.parsed:
            spans: list[_Span] = []
        elif size - self._texts_left_out <= self._limits.parsed:
            spans = self._texts
        elif size - self._left_out <= self._limits.parsed:
            spans = sorted(self._texts + self._containers)
        else:
            return None
        return self._without(buffer, spans, size)

    def _without(self, buffer: bytearray, spans: list[_Span], size: int) -> bytes:
        pieces: list[bytes] = []
        at = 0
        for span in (*spans, _Span(size, size, b"")):
            if span.start >= at:  # else it is within a container that is left out
                pieces += bytes(memoryview(buffer)[self.begin + at : self.begin + span.start]), span.instead
                at = span.end
        return b"".join(pieces)
