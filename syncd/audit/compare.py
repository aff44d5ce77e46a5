"""Comparison of delivered events with the meters, by hour of event time, type and subject. Pure.

Of the events of an hour that a gateway has finished, the metering API accepted `delivered` and refused
`dead_lettered`, and `gone` were damaged or removed on the gateway's disk. The meters count `counted`.
Always::

    counted = delivered + dead_lettered + gone - missing - refused - lost + surplus

A refused event may still be counted (one that grew too old may have arrived), so events counted beyond
`delivered` are assumed to be refused ones first, then those that are gone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

HOUR = timedelta(hours=1)


class Line(NamedTuple):
    """The unit of comparison: the events of one hour (its start, UTC), type and subject."""

    hour: datetime
    type: str
    subject: str


class Sent(NamedTuple):
    """Events of a line that a gateway has finished."""

    delivered: int = 0
    dead_lettered: int = 0
    gone: int = 0

    def plus(self, other: Sent) -> Sent:
        """Return the sum."""
        return Sent(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(frozen=True, slots=True)
class GatewayBooks:
    """Events that one gateway sent here. `open_hours`: hours that cannot be compared -> why."""

    gateway: str
    lines: Mapping[Line, Sent]
    open_hours: Mapping[datetime, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The meter that a type of event is compared with.

    `exact`: it counts events. Otherwise it sums, and a sum other than 0 only shows that there are events.
    It has no events before `since` (a whole hour).
    """

    type: str
    meter: str
    exact: bool = True
    since: datetime | None = None

    def covers(self, line: Line) -> bool:
        """Return whether the meter has the events of a line."""
        return self.since is None or line.hour >= self.since


@dataclass(frozen=True, slots=True)
class Difference:
    """A line on which both sides differ, and the events of each gateway that has any."""

    line: Line
    delivered: int
    dead_lettered: int
    gone: int
    counted: int
    missing: int
    refused: int
    lost: int
    surplus: int
    gateways: tuple[tuple[str, Sent], ...]

    @property
    def is_unlisted(self) -> bool:
        """Return whether no listed gateway has any events of this line."""
        return not self.gateways


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the lines of one type that were compared."""

    delivered: int = 0
    dead_lettered: int = 0
    gone: int = 0
    counted: int = 0
    missing: int = 0
    refused: int = 0
    lost: int = 0
    surplus: int = 0

    def plus(self, other: Totals) -> Totals:
        """Return the sum."""
        return Totals(*(getattr(self, name) + getattr(other, name) for name in _TOTALS))


_TOTALS = tuple(entry.name for entry in fields(Totals))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of comparing the hours from `since` up to, not including, `until`."""

    since: datetime
    until: datetime
    differences: tuple[Difference, ...] = ()
    totals: Mapping[str, Totals] = field(default_factory=dict)
    """By type of event."""
    left_out: Mapping[datetime, tuple[str, ...]] = field(default_factory=dict)
    """Hours that were not compared -> why."""
    not_compared: Mapping[str, int] = field(default_factory=dict)
    """Events without a yardstick, by type."""

    @property
    def hours(self) -> int:
        """Return the number of hours."""
        return (self.until - self.since) // HOUR

    @property
    def hours_compared(self) -> int:
        """Return the number of hours that were compared."""
        return self.hours - len(self.left_out)

    @property
    def missing(self) -> int:
        """Return how many delivered events are not counted."""
        return sum(difference.missing for difference in self.differences)


def joined(comparisons: Iterable[Comparison]) -> Comparison:
    """Return comparisons of adjoining spans, in order, as one."""
    found = list(comparisons)
    not_compared: Counter[str] = Counter()
    totals: dict[str, Totals] = {}
    for one in found:
        not_compared.update(one.not_compared)
        for kind, numbers in one.totals.items():
            totals[kind] = totals.get(kind, Totals()).plus(numbers)
    return Comparison(
        found[0].since,
        found[-1].until,
        tuple(difference for one in found for difference in one.differences),
        totals,
        {hour: why for one in found for hour, why in one.left_out.items()},
        dict(not_compared),
    )


def compare(
    since: datetime,
    until: datetime,
    books: Sequence[GatewayBooks],
    values: Mapping[Line, int],
    yardsticks: Mapping[str, Yardstick],
) -> Comparison:
    """Compare the hours of a span; `values` are the values of each type's meter, by line."""
    left_out = _left_out(books, since, until)
    sent: dict[Line, Sent] = {}
    senders: defaultdict[Line, list[tuple[str, Sent]]] = defaultdict(list)
    for one in books:
        for line, number in one.lines.items():
            sent[line] = sent.get(line, Sent()).plus(number)
            if any(number):
                senders[line].append((one.gateway, number))
    differences: list[Difference] = []
    not_compared: Counter[str] = Counter()
    totals: dict[str, Totals] = {}
    for line in sorted(sent.keys() | values.keys()):
        if line.hour in left_out or not since <= line.hour < until:
            continue
        yardstick = yardsticks.get(line.type)
        if yardstick is None or not yardstick.covers(line):
            not_compared[line.type] += sum(sent.get(line, Sent()))
            continue
        found = _difference(line, sent, values, yardstick, tuple(senders.get(line, ())))
        numbers = Totals(*(getattr(found, name) for name in _TOTALS))
        totals[line.type] = totals.get(line.type, Totals()).plus(numbers)
        if found.missing or found.refused or found.lost or found.surplus:
            differences.append(found)
    return Comparison(
        since,
        until,
        tuple(differences),
        totals,
        left_out,
        {kind: number for kind, number in not_compared.items() if number},
    )


def _difference(
    line: Line,
    sent: Mapping[Line, Sent],
    values: Mapping[Line, int],
    yardstick: Yardstick,
    gateways: tuple[tuple[str, Sent], ...],
) -> Difference:
    delivered, dead_lettered, gone = sent.get(line, Sent())
    counted = values.get(line, 0)
    if not yardstick.exact:
        # Any usage counts as all delivered events, or as one event if none was delivered.
        counted = (delivered or 1) if counted > 0 else 0
    return Difference(
        line,
        delivered,
        dead_lettered,
        gone,
        counted,
        missing=max(0, delivered - counted),
        refused=min(dead_lettered, max(0, delivered + dead_lettered - counted)),
        lost=min(gone, max(0, delivered + dead_lettered + gone - counted)),
        surplus=max(0, counted - delivered - dead_lettered - gone),
        gateways=gateways,
    )


def _left_out(
    books: Sequence[GatewayBooks], since: datetime, until: datetime
) -> dict[datetime, tuple[str, ...]]:
    reasons: defaultdict[datetime, list[str]] = defaultdict(list)
    for one in books:
        for hour, why in one.open_hours.items():
            if since <= hour < until:
                reasons[hour].append(why)
    return {hour: tuple(reasons[hour]) for hour in sorted(reasons)}


def spans(hours: Iterable[datetime]) -> list[tuple[datetime, datetime]]:
    """Return hours as spans with adjoining hours merged; the end of a span is not included."""
    found: list[tuple[datetime, datetime]] = []
    for hour in sorted(set(hours)):
        if found and found[-1][1] == hour:
            found[-1] = (found[-1][0], hour + HOUR)
        else:
            found.append((hour, hour + HOUR))
    return found


def whole_hours(
    since: datetime | None, until: datetime | None, now: datetime, default: timedelta
) -> tuple[datetime, datetime]:
    """Return the span widened to whole hours, without the current hour, which is not over.

    Without `until` it ends at the current hour; without `since` it is `default` long. It is empty or
    negative if no hour is left.
    """
    end = hour_of(now)
    if until is not None:
        end = min(end, hour_of(until, up=True))
    return (end - default if since is None else hour_of(since)), end


def hour_of(moment: datetime, *, up: bool = False) -> datetime:
    """Return the start of the hour of a moment; with `up`, round up."""
    begin = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    return begin + HOUR if up and begin != moment else begin
