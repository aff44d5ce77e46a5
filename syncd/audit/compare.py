"""What the gateways have delivered against what the meters count, by hour of event time, type and subject.

Pure: `syncd.audit.run` reads, `syncd.audit.run` repeats. Of the events that the gateways are done with in
an hour, `delivered` were taken by the metering API and `dead_lettered` were refused by it. Counted there are
`counted`, and always::

    counted = delivered + dead_lettered - missing - refused + surplus

A refused event may be counted nevertheless (one that grew too old had perhaps arrived), so what is counted
beyond `delivered` is taken for refused ones first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

HOUR = timedelta(hours=1)


class Line(NamedTuple):
    """What is compared: the events of one hour (its beginning, UTC), type and subject."""

    hour: datetime
    type: str
    subject: str


class Sent(NamedTuple):
    """Events of a line that a gateway is done with."""

    delivered: int = 0
    dead_lettered: int = 0

    def plus(self, other: Sent) -> Sent:
        """Return the sum."""
        return Sent(self.delivered + other.delivered, self.dead_lettered + other.dead_lettered)


@dataclass(frozen=True, slots=True)
class GatewayBooks:
    """What one gateway has sent to this metering API; `open_hours` cannot be compared, and why."""

    gateway: str
    lines: Mapping[Line, Sent]
    open_hours: Mapping[datetime, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The meter that a type of event is compared with.

    `exact`: it counts events. Else it only tells that there are any: a sum that is not 0. Events before
    `since` (a whole hour) are not in it.
    """

    type: str
    meter: str
    exact: bool = True
    since: datetime | None = None

    def covers(self, line: Line) -> bool:
        """Tell whether it counts the events of a line."""
        return self.since is None or line.hour >= self.since


@dataclass(frozen=True, slots=True)
class Difference:
    """A line on which both sides differ, and what each gateway has of it that has any."""

    line: Line
    delivered: int
    dead_lettered: int
    counted: int
    missing: int
    refused: int
    surplus: int
    gateways: tuple[tuple[str, Sent], ...]

    @property
    def is_unlisted(self) -> bool:
        """Tell whether no listed gateway has any events of this line."""
        return not self.gateways


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the lines of one type that were compared."""

    delivered: int = 0
    dead_lettered: int = 0
    counted: int = 0
    missing: int = 0
    refused: int = 0
    surplus: int = 0

    def plus(self, other: Totals) -> Totals:
        """Return the sum."""
        return Totals(*(getattr(self, name) + getattr(other, name) for name in _TOTALS))


_TOTALS = tuple(entry.name for entry in fields(Totals))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of comparing the hours from `since` up to, not including, `until`."""

    since: datetime
    until: datetime
    differences: tuple[Difference, ...] = ()
    totals: Mapping[str, Totals] = field(default_factory=dict)
    """By type of event."""
    left_out: Mapping[datetime, tuple[str, ...]] = field(default_factory=dict)
    """Hours that were not compared, and why."""
    not_compared: Mapping[str, int] = field(default_factory=dict)
    """Events by type for which there is no yardstick."""

    @property
    def hours(self) -> int:
        """Return how many hours there are."""
        return (self.until - self.since) // HOUR

    @property
    def hours_compared(self) -> int:
        """Return how many hours were compared."""
        return self.hours - len(self.left_out)

    @property
    def missing(self) -> int:
        """Return how many events were taken and are not counted."""
        return sum(difference.missing for difference in self.differences)


def joined(comparisons: Iterable[Comparison]) -> Comparison:
    """Return the comparisons of adjoining spans, in their order, as one."""
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
    """Compare the hours of a span; `values` is what the meter of each type says of a line."""
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
        if found.missing or found.refused or found.surplus:
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
    delivered, dead_lettered = sent.get(line, Sent())
    counted = values.get(line, 0)
    if not yardstick.exact:
        # Any usage at all: as many events as were delivered, or one that nobody has delivered.
        counted = (delivered or 1) if counted > 0 else 0
    return Difference(
        line,
        delivered,
        dead_lettered,
        counted,
        missing=max(0, delivered - counted),
        refused=min(dead_lettered, max(0, delivered + dead_lettered - counted)),
        surplus=max(0, counted - delivered - dead_lettered),
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
    """Return the spans that hours make up, adjoining ones merged; each from, up to and not including."""
    found: list[tuple[datetime, datetime]] = []
    for hour in sorted(set(hours)):
        if found and found[-1][1] == hour:
            found[-1] = (found[-1][0], hour + HOUR)
        else:
            found.append((hour, hour + HOUR))
    return found


def whole_hours(
    since: datetime | None, until: datetime | None, now: datetime, usual: timedelta
) -> tuple[datetime, datetime]:
    """Return the span widened to whole hours, without the current one, which is not over.

    Without `until` it ends there; without `since` it is `usual` long. It is empty or negative where
    nothing is left.
    """
    end = hour_of(now)
    if until is not None:
        end = min(end, hour_of(until, up=True))
    return (end - usual if since is None else hour_of(since)), end


def hour_of(moment: datetime, *, up: bool = False) -> datetime:
    """Return the hour that a moment lies in, with `up` the next unless it begins there."""
    begin = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    return begin + HOUR if up and begin != moment else begin
