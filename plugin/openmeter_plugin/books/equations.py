"""The equations of the books, checked in each transaction that changes them and by `spool verify`.

    requests = metered + skipped + quarantined + resent
    events   = delivered + dead_lettered + lost_events + waiting

Both sides come from different places: `events` from the summaries of the records, `waiting` from the ledger's
lines when they are added and from the number of events in a batch when it is settled.

A transaction that breaks an equation is committed nevertheless. Its events are delivered or kept whatever the
counts say, and a refused commit would stop delivery and send the same batch for ever. So the break is
counted (`violations`), logged as `books_violated`, and exposed as a metric with an alert; `spool verify`
shows where the difference is.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

Counts = Counter[tuple[str, str]]
"""By (name, reason): requests, metered, skipped, quarantined, resent; events, waiting, delivered,
dead_lettered, lost_events; lost, damaged_bytes, unreadable_segments, redelivered, violations, ai_usage_gaps.
The reason is empty for all but skipped, lost, lost_events and ai_usage_gaps."""

_REQUESTS = ("metered", "skipped", "quarantined", "resent")
_EVENTS = ("delivered", "dead_lettered", "lost_events", "waiting")


def total(counts: Counts, name: str) -> int:
    """Return the sum of the counts with this name, over all reasons."""
    return sum(value for (found, _), value in counts.items() if found == name)


class Violation(NamedTuple):
    """An equation that does not hold, the difference of its sides, and both in words."""

    equation: str
    difference: int
    text: str


def violations(counts: Counts) -> list[Violation]:
    """Return the equations that do not hold for a queue's counts."""
    found = []
    for whole, names in (("requests", _REQUESTS), ("events", _EVENTS)):
        parts = {name: total(counts, name) for name in names}
        value, sum_of_parts = total(counts, whole), sum(parts.values())
        if value != sum_of_parts:
            terms = " + ".join(f"{name} {part}" for name, part in parts.items())
            text = f"{whole} are {value}, but {terms} = {sum_of_parts}"
            found.append(Violation(whole, value - sum_of_parts, text))
        found += [Violation(name, part, f"{name} are {part}") for name, part in parts.items() if part < 0]
    return found
