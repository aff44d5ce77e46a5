"""Unbilled unbilled: usage that no customer is charged for, since when, and whether this plan ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

WINDOW = timedelta(days=31)
"""How far back usage is looked at: metering APIs answer for about a month, and most invoices cover one."""

Fate = Literal["planned", "blocked", "unknown"]


@dataclass(frozen=True, slots=True)
class UnbilledSubject:
    """A subject with usage but no customer.

    `fate`: this plan attributes it, something blocks that, or no source knows it.
    """

    key: str
    events: int | float
    tokens: int | float
    fate: Fate

    def to_json(self) -> dict[str, object]:
        """Return it as it stands in a plan."""
        return {"key": self.key, "events": self.events, "tokens": self.tokens, "fate": self.fate}


@dataclass(frozen=True, slots=True)
class UnbilledUsage:
    """All such subjects; `looked_from` is the start of what was looked at, `since` the first day found."""

    subjects: tuple[UnbilledSubject, ...]
    looked_from: str
    since: str | None = None

    def events(self, fate: Fate | None = None) -> int | float:
        """Return the events of all subjects, or of those of one fate."""
        return sum(subject.events for subject in self.subjects if fate in (None, subject.fate))

    def count(self, fate: Fate | None = None) -> int:
        """Return the number of subjects."""
        return sum(1 for subject in self.subjects if fate in (None, subject.fate))

    def to_json(self) -> dict[str, object]:
        """Return it as it stands in a plan and in GET /v1/status."""
        return {
            "subjects": len(self.subjects),
            "events": self.events(),
            "blocked_subjects": self.count("blocked"),
            "blocked_events": self.events("blocked"),
            "since": self.since,
            "looked_from": self.looked_from,
            "details": [subject.to_json() for subject in self.subjects],
        }


def unbilled_usage(
    requests: Mapping[str, float],
    tokens: Mapping[str, float],
    attributed: frozenset[str],
    planned: Iterable[str],
    blocked: Iterable[str],
) -> tuple[UnbilledSubject, ...]:
    """Return the subjects with usage that are not attributed, the largest first."""
    will, wont = frozenset(planned), frozenset(blocked)

    def fate(key: str) -> Fate:
        if key in wont:
            return "blocked"
        return "planned" if key in will else "unknown"

    found = [
        UnbilledSubject(key, _whole(requests.get(key, 0)), _whole(tokens.get(key, 0)), fate(key))
        for key in requests.keys() | tokens.keys()
        if key not in attributed
    ]
    return tuple(sorted(found, key=lambda subject: (-subject.events, -subject.tokens, subject.key)))


def first_day(start: datetime, days: int, used_until: Callable[[datetime], bool]) -> datetime:
    """Return the start of the first day on which something was used; asks log2(days) times.

    `used_until(end)` tells whether there was any between `start` and `end`.
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
