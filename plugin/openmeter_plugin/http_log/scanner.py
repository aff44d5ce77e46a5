"""Scanner that finds the end of a JSON value in steps, and shortens large values before they are parsed.

Parsing blocks everything else in the process, for 20 to 40 ms per megabyte if the values are many and small.
So a value larger than `Limits.parsed` is scanned for brackets instead, in any number of short steps, and
parsed in a shortened form: long texts are cut, but keep enough that the event stays the same, and only if
that does not suffice, large arrays and objects become null.
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
"""Short texts, everything that is neither text nor bracket, and small containers that contain no others."""
_TEXT_PREFIX: Final = re.compile(
    rb"(?>\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\."
    rb"|[\xc2-\xf4][\x80-\xbf]{1,3}+|[^\"\\]){%d}+" % (2 * MAX_TEXT),
    re.DOTALL,
)
"""A text's first characters: enough that an event cuts or refuses them exactly as it would the whole text."""

_MAX_STEP_BYTES: Final = 32 * 1024
_MAX_STEP_TOKENS: Final = 200
_MAX_DEPTH: Final = 32  # deeper containers are removed only together with the one that contains them


class Stop(Enum):
    """The reason why a scan stopped without a result."""

    MORE = "more of the body is needed"
    PAUSE = "other tasks get their turn"


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum bytes of a value that is parsed at once, and of texts and containers kept in larger ones."""

    parsed: int = 128 * 1024
    text: int = 4 * 1024
    container: int = 64 * 1024


class _Span(NamedTuple):
    """Bytes to remove, and their replacement."""

    start: int
    end: int
    replacement: bytes


class Scan:
    """Finds the end of the value that begins at `begin` in the buffer, in any number of steps."""

    __slots__ = (
        "_alone",
        "_at",
        "_containers",
        "_depth",
        "_limits",
        "_open",
        "_removed",
        "_run_bytes",
        "_text_at",
        "_texts",
        "_texts_removed",
        "begin",
    )

    def __init__(self, begin: int, limits: Limits, *, alone: bool) -> None:
        self.begin = begin
        self._alone = alone  # the value ends with its own bracket, not before a comma or bracket
        self._limits = limits
        self._run_bytes = min(_MAX_STEP_BYTES, limits.container)  # a run is never shortened
        self._at = 0  # this and all other positions are relative to `begin`
        self._depth = 0
        self._text_at: int | None = None  # the begin of the text that the scan is in
        self._texts: list[_Span] = []  # removable parts of texts
        self._containers: list[_Span] = []  # removable containers
        self._open: list[tuple[int, int]] = []  # for each open container: its begin, bytes removed before it
        self._texts_removed = self._removed = 0

    def step(self, buffer: bytearray) -> int | Stop:
        """Scan on; return the value's size when its end is found. Each call takes a bounded time."""
        stop_at = self._at + _MAX_STEP_BYTES
        for _ in range(_MAX_STEP_TOKENS):
            if self._at >= stop_at:
                break
            if self._text_at is not None:
                if not self._scan_text(buffer):
                    return Stop.MORE
            elif (size := self._scan_token(buffer)) is not None:
                return size
        return Stop.PAUSE

    def _scan_text(self, buffer: bytearray) -> bool:
        """Scan on in a text; return whether the buffer had more of it."""
        begin, start = self.begin, self.begin + self._at
        match = _TEXT.match(buffer, start, start + _MAX_STEP_BYTES)
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
        prefix = _TEXT_PREFIX.match(buffer, self.begin + start, self.begin + end)
        if prefix is not None:
            span = _Span(prefix.end() - self.begin, end, b"")
            self._texts.append(span)
            self._texts_removed += end - span.start
            self._removed += end - span.start

    def _scan_token(self, buffer: bytearray) -> int | Stop | None:
        """Scan past the next bracket, quotation mark or comma; return the size if that ends the value."""
        start = self.begin + self._at
        limit = start + _MAX_STEP_BYTES
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
            if self._depth <= _MAX_DEPTH:
                self._open.append((self._at - 1, self._removed))
        elif self._depth:
            if self._depth <= _MAX_DEPTH:
                self._end_container(*self._open.pop())
            self._depth -= 1
            return self._alone and not self._depth
        else:
            return token in (b",", b"]")
        return False

    def _end_container(self, start: int, removed_before: int) -> None:
        size = self._at - start
        if self._depth == 1 or size - (self._removed - removed_before) <= self._limits.container:
            return
        span = _Span(start, self._at, b"null")
        self._containers.append(span)
        self._removed = removed_before + size - len(span.replacement)

    def value(self, buffer: bytearray, size: int) -> bytes | None:
        """Return the bytes to parse for the value, or None if too much of it would have to be removed."""
        if size <= self._limits.parsed:
            spans: list[_Span] = []
        elif size - self._texts_removed <= self._limits.parsed:
            spans = self._texts
        elif size - self._removed <= self._limits.parsed:
            spans = sorted(self._texts + self._containers)
        else:
            return None
        return self._remove(buffer, spans, size)

    def _remove(self, buffer: bytearray, spans: list[_Span], size: int) -> bytes:
        pieces: list[bytes] = []
        at = 0
        for span in (*spans, _Span(size, size, b"")):
            if span.start >= at:  # otherwise it is inside a removed container
                pieces += (
                    bytes(memoryview(buffer)[self.begin + at : self.begin + span.start]),
                    span.replacement,
                )
                at = span.end
        return b"".join(pieces)
