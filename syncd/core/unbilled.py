"""Unbilled usage: which subjects no customer pays for, since when, and whether a plan resolves it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Literal, Protocol

WINDOW = timedelta(days=31)
"""How far back usage is read: metering APIs answer for about a month, and most invoices cover one."""

Fate = Literal["planned", "blocked", "settled", "unknown"]


@dataclass(frozen=True, slots=True)
class UnbilledSubject:
    """A subject with usage but no customer.

    `fate`: this plan attributes it, something blocks that, a decision of a person does (`Change.settled`), or
    no source knows it.
    """

    key: str
    events: int | float
    tokens: int | float
    fate: Fate

    def to_json(self) -> dict[str, object]:
        """Return it as a part of a plan."""
        return {"key": self.key, "events": self.events, "tokens": self.tokens, "fate": self.fate}


@dataclass(frozen=True, slots=True)
class IgnoredSubject:
    """A subject with usage but no customer that the configuration ignores, and why."""

    key: str
    events: int | float
    tokens: int | float
    reason: str

    def to_json(self) -> dict[str, object]:
        """Return it as a part of a plan."""
        return {"key": self.key, "events": self.events, "tokens": self.tokens, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class UnbilledUsage:
    """All unbilled subjects; `looked_from` is the start of the window, `since` the first day with usage."""

    subjects: tuple[UnbilledSubject, ...]
    looked_from: str
    since: str | None = None
    ignored: tuple[IgnoredSubject, ...] = ()
    """Those that people have decided not to bill; no other figure counts them."""

    def events(self, fate: Fate | None = None) -> int | float:
        """Return the events of all subjects, or of those of one fate."""
        return sum(subject.events for subject in self.subjects if fate in (None, subject.fate))

    def count(self, fate: Fate | None = None) -> int:
        """Return the number of subjects."""
        return sum(1 for subject in self.subjects if fate in (None, subject.fate))

    @property
    def ignored_events(self) -> int | float:
        """Return the events of the ignored subjects."""
        return sum(subject.events for subject in self.ignored)

    def without(self, attributed: Collection[str]) -> UnbilledUsage:
        """Return it without the subjects that have got a customer since."""
        return replace(self, subjects=tuple(s for s in self.subjects if s.key not in attributed))

    def to_json(self) -> dict[str, object]:
        """Return it as in a plan and in GET /v1/status."""
        return {
            "subjects": len(self.subjects),
            "events": self.events(),
            "blocked_subjects": self.count("blocked"),
            "blocked_events": self.events("blocked"),
            "settled_subjects": self.count("settled"),
            "settled_events": self.events("settled"),
            "unknown_subjects": self.count("unknown"),
            "unknown_events": self.events("unknown"),
            "ignored_subjects": len(self.ignored),
            "ignored_events": self.ignored_events,
            "since": self.since,
            "looked_from": self.looked_from,
            "details": [subject.to_json() for subject in self.subjects],
            "ignored": [subject.to_json() for subject in self.ignored],
        }


def unbilled_usage(
    requests: Mapping[str, float],
    tokens: Mapping[str, float],
    attributed: frozenset[str],
    planned: Iterable[str],
    blocked: Iterable[str],
    settled: Iterable[str] = (),
) -> tuple[UnbilledSubject, ...]:
    """Return the subjects with usage that no customer pays for, the largest first.

    `settled` are those of the blocked ones that are blocked by decision.
    """
    planned_keys, blocked_keys, settled_keys = frozenset(planned), frozenset(blocked), frozenset(settled)

    def fate(key: str) -> Fate:
        if key in blocked_keys:
            return "settled" if key in settled_keys else "blocked"
        return "planned" if key in planned_keys else "unknown"

    found = [
        UnbilledSubject(key, _whole(requests.get(key, 0)), _whole(tokens.get(key, 0)), fate(key))
        for key in requests.keys() | tokens.keys()
        if key not in attributed
    ]
    return tuple(sorted(found, key=lambda subject: (-subject.events, -subject.tokens, subject.key)))


def first_day(start: datetime, days: int, used_until: Callable[[datetime], bool]) -> datetime:
    """Return the start of the first day with usage, with log2(days) queries.

    `used_until(end)` returns whether there was any usage between `start` and `end`.
    """
    low, high = 0, days - 1
    while low < high:
        middle = (low + high) // 2
        if used_until(start + timedelta(days=middle + 1)):
            high = middle
        else:
            low = middle + 1
    return start + timedelta(days=low)


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


class Ignoring(Protocol):
    """A decision to leave a subject unbilled, wherever it was made."""

    @property
    def subject(self) -> str:
        """The subject."""

    @property
    def until(self) -> date | None:
        """Its last day, in UTC; None has no end."""

    @property
    def words(self) -> str:
        """The decision in words."""


def ignored_on(day: date, *several: Iterable[Ignoring]) -> dict[str, str]:
    """Return the subjects that are ignored on a day, with the decision in words; of two, the first counts."""
    found: dict[str, str] = {}
    for entries in several:
        for entry in entries:
            if entry.until is None or day <= entry.until:
                found.setdefault(entry.subject, entry.words)
    return found
