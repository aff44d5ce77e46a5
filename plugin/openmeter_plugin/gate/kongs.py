"""The gate towards Kong: what each Kong is sent of the decisions, and what its workers report."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from openmeter_plugin.gate import lines
from openmeter_plugin.gate.accounts import Accounts, Key

_GONE: Final = 60.0
_MAX_STOPPED: Final = 10_000


@dataclass(slots=True)
class Kong:
    """A shared dict of a Kong that asks for the feed, and what its workers report."""

    born: bool
    """Whether this process has known the dict since its counters were 0."""
    lua: str = ""
    heard_at: float = 0.0
    figures: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Stopped:
    """Requests of a subject that were stopped, or would have been, since the start."""

    count: int = 0
    last_at: float = 0.0


class Place(NamedTuple):
    """Up to where a Kong has applied the feed."""

    epoch: str
    number: int
    began: int = 0
    """Within a full state: where that began (`lines.feed`)."""


class Kongs:
    """All Kongs that ask, what they are sent and what they reported."""

    def __init__(self, accounts: Accounts, settings: list[str], seen: Callable[[str, float], None]) -> None:
        self.accounts = accounts
        self.found: dict[str, Kong] = {}
        """By the id of the dict."""
        self.decisions: Counter[tuple[str, str, str]] = Counter()
        """Stopped requests by feature, reason and mode."""
        self.stopped: dict[tuple[str, str, str, str], Stopped] = {}
        """By subject, feature, reason and mode."""
        self.epoch = f"{int(time.time()):x}{secrets.token_hex(4)}"
        self._settings = [lines.line("C", "begin", f"{hash(tuple(settings)) & 0xFFFFFFFF:08x}"), *settings]
        self._seen = seen
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Have those that wait for news look for them."""
        self._news.set()

    def tidy(self, now: float) -> None:
        """Forget Kongs that no longer ask, and the oldest of many subjects that were stopped."""
        for kong in [each for each, found in self.found.items() if now - found.heard_at > _GONE]:
            del self.found[kong]
        self.accounts.has_one_kong = len(self.found) <= 1
        if len(self.stopped) > _MAX_STOPPED:
            newest = sorted(self.stopped.items(), key=lambda item: -item[1].last_at)[: _MAX_STOPPED // 2]
            self.stopped = dict(newest)

    def _heard(self, kong: str, *, new: bool) -> Kong:
        """Return what is known about a Kong's dict; `new` says that it asks for the first time at all."""
        side = self.found.get(kong)
        if side is None:
            side = self.found[kong] = Kong(born=new)
            self.accounts.has_one_kong = len(self.found) == 1
            if new:
                self.accounts.kongs.add(kong)
        side.heard_at = time.monotonic()
        return side

    async def feed(self, kong: str, since: Place, wait: float, lua: str) -> str:
        """Return the body of the next feed answer, as soon as there is news or the wait is over."""
        side = self._heard(kong, new=since == Place("0", 0))
        side.lua = lua
        deadline = time.monotonic() + wait
        number = since.number if since.epoch == self.epoch else None
        while True:
            now = time.monotonic()
            self._news.clear()
            part = lines.feed(self.accounts, number, kong, born=side.born, now=now, began=since.began)
            if part.full or part.lines or now >= deadline:
                return self._body(part, part.full)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), deadline - now)

    def _body(self, part: lines.Slice, with_settings: bool) -> str:
        found = [*self._settings, *part.lines] if with_settings else part.lines
        state, more = "full" if part.full else "changes", "more" if part.more else "done"
        epoch = f"{self.epoch}z{part.began}" if part.began else self.epoch
        head = self._head(epoch, part.number, state, more)
        return lines.text([head, *found, lines.end(len(found))])

    def _head(self, epoch: str, number: int, state: str, more: str) -> str:
        version = str(lines.VERSION)
        return lines.line("openmeter-gate", version, epoch, str(number), state, more, f"{time.time():.3f}")

    def report(self, kong: str, text: str) -> None:
        """Take the report of a worker; raises ReportError."""
        found = lines.parse(text, "openmeter-report")
        side = self._heard(kong, new=False)
        now = time.monotonic()
        for kind, *fields in found:
            try:
                self._take(kong, side, kind, fields, now)
            except (ValueError, IndexError):
                raise lines.ReportError(f"a line {kind} has wrong fields") from None
        self.wake()

    def _take(self, kong: str, side: Kong, kind: str, fields: list[str], now: float) -> None:
        if kind == "S":
            self._seen(fields[0], now)
        elif kind == "U":
            self.accounts.passed_uncounted(fields[0], fields[1], int(fields[2]), now)
        elif kind == "P":
            self.accounts.passed(kong, Key(fields[0], fields[1]), float(fields[2]), now)
        elif kind == "D":
            subject, feature, reason, mode, count = fields[:5]
            self.decisions[feature, reason, mode] += int(count)
            stopped = self.stopped.setdefault((subject, feature, reason, mode), Stopped())
            stopped.count += int(count)
            stopped.last_at = time.time()
            self._seen(subject, now)
        elif kind == "M":
            if fields[0] in ("passed", "errors"):
                side.figures[fields[0]] += int(float(fields[1]))
            else:
                side.figures[fields[0]] = int(float(fields[1]))

    def state_file(self) -> Iterator[bytes]:
        """Yield the pieces of the file that Kong reads after its own restart: a whole answer of the feed."""
        count, head = 0, self._head(self.epoch, self.accounts.changes.number, "full", "done")
        yield lines.text([head, *self._settings]).encode()
        for piece in lines.whole(self.accounts, time.monotonic()):
            count += len(piece)
            yield lines.text(piece).encode()
        yield lines.text([lines.end(count + len(self._settings))]).encode()
