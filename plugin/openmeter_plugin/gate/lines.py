"""The line format of the feed, the reports and the state file; nginx's sandbox has no JSON.

A field is percent-encoded only where it contains `%`, a tab or an end of line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from openmeter_plugin.gate.accounts import Accounts, Decision, Key

VERSION: Final = 1
MAX_LINES: Final = 2_000
"""Of an answer: 20,000 lines in one message stall a worker of nginx for 34 ms."""

_PIECE: Final = 500
"""Lines of the state file that are made at once: 2 ms."""

_SPECIAL: Final = re.compile(r"[%\t\n\r]")
_ENCODED: Final = re.compile(r"%([0-9A-Fa-f]{2})")


def encode(field: str) -> str:
    """Return a field without tabs and ends of lines."""
    return _SPECIAL.sub(lambda found: f"%{ord(found[0]):02X}", field) if _SPECIAL.search(field) else field


def decode(field: str) -> str:
    """Return a field as it was before `encode`."""
    return _ENCODED.sub(lambda found: chr(int(found[1], 16)), field) if "%" in field else field


def line(*fields: str) -> str:
    """Return a line of fields."""
    return "\t".join(encode(field) for field in fields)


def number(value: float | None) -> str:
    """Return a number as Lua's tonumber reads it, `-` for None: no exponent, no rounding of what is whole."""
    if value is None:
        return "-"
    return str(int(value)) if value == int(value) else f"{value:.9f}".rstrip("0")


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of the state or its changes, up to a number."""

    number: int
    full: bool
    more: bool
    lines: list[str]
    began: int = 0
    """Of a full state with more slices: the newest number when it began."""


def feed(
    accounts: Accounts, since: int | None, kong: str, *, born: bool, now: float, began: int = 0
) -> Slice:
    """Return what changed after a number; with None, or where changes are missing, the first slice of all.

    `born` says that this process has known Kong's dict from its beginning. `began` is that of the slice
    before: what was forgotten before a full state began is not missing in it, however old its names are.
    """
    changes = accounts.changes
    full = since is None or since > changes.number or changes.forgotten_up_to > max(since, began)
    if full:
        began = changes.number
    found = changes.since(0 if full or since is None else since, MAX_LINES + 1)
    taken = found[:MAX_LINES]
    reached = taken[-1][0] if len(taken) < len(found) else changes.number
    lines = [text for _, what in taken for text in _lines_of(accounts, what, kong, born=born, now=now)]
    more = len(taken) < len(found)
    return Slice(reached, full, more, lines, began if more else 0)


def whole(accounts: Accounts, now: float) -> Iterator[list[str]]:
    """Yield the lines of the whole state, for the file that Kong reads when its dict is new.

    The state may change meanwhile: a line is that of the moment when it is asked for.
    """
    found = accounts.changes.since(0)
    for start in range(0, len(found), _PIECE):
        part = found[start : start + _PIECE]
        yield [text for _, what in part for text in _lines_of(accounts, what, "", born=False, now=now)]


def _lines_of(accounts: Accounts, what: str | Key, kong: str, *, born: bool, now: float) -> Iterator[str]:
    if not isinstance(what, Key):
        account = accounts.subjects.get(what)
        yield line("X", what) if account is None else line("K", what, account)
        return
    decision = accounts.decide(what, now)
    if decision is None:
        yield line("Y", what.account)
        return
    if kong:
        accounts.sent(what, decision, now)
    yield decision_line(what, decision, accounts.base(what, kong, now, born=born))


def decision_line(key: Key, decision: Decision, base: float | None) -> str:
    """Return the line of a decision."""
    reset = number(int(decision.reset))
    if decision.reason is not None:
        return line("D", *key, decision.reason, reset)
    return line("A", *key, number(decision.left), number(base), reset, number(decision.quota))


def end(count: int) -> str:
    """Return the last line of a body, which says how many there are between it and the head."""
    return line("end", str(count))


def text(lines: list[str]) -> str:
    """Return lines as text."""
    return "".join(f"{each}\n" for each in lines)


class ReportError(ValueError):
    """A report cannot be read."""


def parse(text: str, kind: str) -> list[list[str]]:
    """Return the lines of a body of a kind as fields; raises ReportError if it is not complete."""
    lines = text.split("\n")
    head = lines[0].split("\t")
    if head[:2] != [kind, str(VERSION)]:
        raise ReportError(f"the first line must be {kind!r}, a tab and {VERSION}")
    found = [[decode(field) for field in each.split("\t")] for each in lines[1:] if each]
    if not found or found[-1] != ["end", str(len(found) - 1)]:
        raise ReportError("the last line must be 'end', a tab and the number of lines before it")
    return found[:-1]
