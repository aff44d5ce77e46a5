"""Audit run: reads and compares a span part by part, and repeats parts whose missing events may be late.

Each part reads the gateways' ledgers, then the meters, then the ledgers again (`syncd.audit.books`). A
metering API answers 2xx when an event is queued, not when it is counted, so events delivered moments ago
may not be in the meters yet. Parts with missing events are therefore read again for a while.

`to_json` returns an audit as a document, for programs and reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from syncd.audit.books import OtherDestination, gateway_books, leads_to, merged, other_destinations
from syncd.audit.compare import (
    HOUR,
    Comparison,
    Difference,
    GatewayBooks,
    Line,
    Totals,
    Yardstick,
    compare,
    hour_of,
    joined,
)
from syncd.audit.redelivery import Redelivery
from syncd.core.errors import MalformedError, MeterMissingError
from syncd.gateways.client import Gateway
from syncd.gateways.models import Ledger, Spool
from syncd.metering.answers import API, moment
from syncd.metering.base import Meter, MeteringApi
from syncd.metering.usage import EVENTS_METER, REQUESTS_METER, TOKENS_METER, rfc3339

_STANDARD = (REQUESTS_METER, TOKENS_METER, EVENTS_METER)


def yardstick(event_type: str, meters: Mapping[str, Meter]) -> Yardstick | None:
    """Return the meter to compare a type of event with: one that counts, else one that sums, else None.

    Of several, the standard meter wins, then the first by key.
    """
    fitting = [meter for meter in meters.values() if meter.event_type == event_type]
    for aggregation in ("count", "sum"):
        found = [meter for meter in fitting if meter.aggregation == aggregation]
        if found:
            meter = min(found, key=lambda one: (one.key not in _STANDARD, one.key))
            return Yardstick(event_type, meter.key, exact=aggregation == "count", since=_since(meter))
    return None


def _since(meter: Meter) -> datetime | None:
    if meter.events_from is None:
        return None
    return hour_of(moment(meter.events_from, f"meter {meter.key}"), up=True)


class HourlyMeters:
    """Hourly values of the meters of a metering API; the meters are listed once."""

    def __init__(self, api: MeteringApi) -> None:
        """List the meters. Raises ApiError."""
        self._api = api
        self._meters = api.meters()

    def yardstick(self, event_type: str) -> Yardstick | None:
        """Return the meter to compare a type of event with, None if no meter has it."""
        return yardstick(event_type, self._meters)

    def values(self, used: Yardstick, since: datetime, until: datetime) -> dict[Line, int]:
        """Return the values of a meter by hour and subject; for one that sums, 1 for any value but 0."""
        found: dict[Line, float] = {}
        meter = self._meters[used.meter]
        for start, subject, value in self._api.hourly_usage(meter, rfc3339(since), rfc3339(until)):
            hour = hour_of(start)
            if since <= hour < until:
                line = Line(hour, used.type, subject)
                found[line] = found.get(line, 0) + value
        if not used.exact:
            return {line: 1 for line, value in found.items() if value}
        if odd := next((line for line, value in found.items() if not value.is_integer()), None):
            raise MalformedError(f"{API}: meter {used.meter} returned a fractional count for {odd.subject!r}")
        return {line: int(value) for line, value in found.items()}


REQUESTS = "kong.api_request"
TOKENS = "kong.llm_request"
_MAX_CONCURRENCY = 8
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Reading:
    """A span as read; `yardsticks` are those of the event types that occur.

    `lines` is the largest number of ledger lines of one gateway.
    """

    comparison: Comparison
    other_destinations: tuple[OtherDestination, ...]
    yardsticks: tuple[Yardstick, ...]
    lines: int
    lost: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By gateway and cause, the requests that it lost before they became events."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads gateways and meters; `metering_url` decides which destinations of a gateway are compared."""

    gateways: Sequence[Gateway]
    meters: HourlyMeters
    metering_url: str

    def read(self, since: datetime, until: datetime) -> Reading:
        """Read and compare a span of whole hours.

        Raises GatewayError or ApiError if either side cannot be read completely, MeterMissingError if no
        meter counts requests.
        """
        before = self._each(lambda gateway: gateway.ledger(since, until))
        types = {REQUESTS, TOKENS} | {line.type for ledger in before for line in ledger.lines}
        yardsticks = {kind: found for kind in sorted(types) if (found := self.meters.yardstick(kind))}
        if REQUESTS not in yardsticks or not yardsticks[REQUESTS].exact:
            raise MeterMissingError(
                f"no meter of the metering API counts {REQUESTS} events; `syncd meters apply` creates one"
            )
        values: dict[Line, int] = {}
        for used in yardsticks.values():
            values |= self.meters.values(used, since, until)
        spools = self._each(Gateway.spool)
        after = self._each(lambda gateway: gateway.ledger(since, until))
        return self._compared(since, until, before, spools, after, values, yardsticks)

    def _compared(
        self,
        since: datetime,
        until: datetime,
        before: Sequence[Ledger],
        spools: Sequence[Spool],
        after: Sequence[Ledger],
        values: dict[Line, int],
        yardsticks: dict[str, Yardstick],
    ) -> Reading:
        books: list[GatewayBooks] = []
        others: list[OtherDestination] = []
        for gateway, first, spool, last in zip(self.gateways, before, spools, after, strict=True):
            included = frozenset(
                part.id
                for part in spool.destinations
                if leads_to(part.endpoint, self.metering_url, gateway.config.metering_hosts)
            )
            books.append(gateway_books(gateway.name, first, spool, last, included))
            others += other_destinations(gateway.name, spool, last, included)
        comparison = compare(since, until, books, values, yardsticks)
        occurring = {line.type for one in books for line in one.lines} | {line.type for line in values}
        used = tuple(found for kind, found in yardsticks.items() if kind in occurring or kind == REQUESTS)
        lost = {
            gateway.name: {cause: count for cause, count in spool.total.books.lost.items() if count}
            for gateway, spool in zip(self.gateways, spools, strict=True)
        }
        return Reading(comparison, tuple(others), used, max(len(ledger.lines) for ledger in after), lost)

    def _each(self, ask: Callable[[Gateway], _T]) -> list[_T]:
        """Query all gateways concurrently; raises the first error."""
        with ThreadPoolExecutor(max_workers=max(1, min(_MAX_CONCURRENCY, len(self.gateways)))) as pool:
            return list(pool.map(ask, self.gateways))


MANY_LINES = 50_000
"""Ledger lines of one gateway in one part, above which parts get shorter: both sides are held in memory."""
_MAX_PART_HOURS = 24
_PAUSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Audit:
    """Result of an audit, for the exit status and the output."""

    comparison: Comparison
    other_destinations: tuple[OtherDestination, ...]
    yardsticks: tuple[Yardstick, ...]
    lost: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """By gateway and cause, the requests that are in no ledger, because it lost them."""

    @property
    def is_equal(self) -> bool:
        """Return whether everything that was compared is equal on both sides."""
        return not self.comparison.differences

    @property
    def incomparable_reason(self) -> str | None:
        """Return why nothing could be compared; None if something was."""
        comparison = self.comparison
        if comparison.hours_compared == 0:
            return (
                "no hour of the span could be compared: events are waiting, or arrived during the audit."
                " Try again"
            )
        sent = sum(
            totals.delivered + totals.dead_lettered + totals.gone for totals in comparison.totals.values()
        )
        if self.other_destinations and not sent:
            places = ", ".join(
                f"{one.endpoint or 'an unknown endpoint'} at {one.gateway}" for one in self.other_destinations
            )
            return (
                f"the gateways send no events to metering.url, only to {places}. If that is the same server"
                " under another name, add it to the gateway's metering_hosts"
            )
        return None


@dataclass
class AuditRun:
    """Audits a span; can be repeated. `settle` is the time in seconds to wait for late events, each time."""

    reader: Reader
    since: datetime
    until: datetime
    settle: float = 30.0
    on_part: Callable[[int], object] = lambda _hours: None
    on_wait: Callable[[int], object] = lambda _missing: None
    sleep: Callable[[float], object] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._readings: dict[tuple[datetime, datetime], Reading] = {}

    def audit(self) -> Audit:
        """Read and compare the whole span, and parts with missing events again until `settle` is over."""
        start, hours = self.since, 1
        while start < self.until:
            end = min(start + hours * HOUR, self.until)
            reading = self._readings[start, end] = self.reader.read(start, end)
            self.on_part((end - start) // HOUR)
            if reading.lines > MANY_LINES:
                hours = max(1, hours // 2)
            elif reading.lines < MANY_LINES // 4:
                hours = min(_MAX_PART_HOURS, 2 * hours)
            start = end
        return self._settled()

    def again(self) -> Audit:
        """Read the parts with missing events again."""
        for span in self._with_missing():
            self._readings[span] = self.reader.read(*span)
        return self._settled()

    def _settled(self) -> Audit:
        """Read the parts with missing events until none is missing or `settle` is over."""
        deadline = self.clock() + self.settle
        while missing := self._with_missing():
            left = deadline - self.clock()
            if left <= 0:
                break
            self.on_wait(sum(reading.comparison.missing for reading in missing.values()))
            self.sleep(min(_PAUSE_SECONDS, left))
            for span in missing:
                self._readings[span] = self.reader.read(*span)
        return self._audit()

    def _with_missing(self) -> dict[tuple[datetime, datetime], Reading]:
        return {span: one for span, one in self._readings.items() if one.comparison.missing}

    def _audit(self) -> Audit:
        readings = list(self._readings.values())
        yardsticks = {used.type: used for one in readings for used in one.yardsticks}
        return Audit(
            joined(one.comparison for one in readings),
            merged(other for one in readings for other in one.other_destinations),
            tuple(yardsticks[kind] for kind in sorted(yardsticks)),
            {gateway: lost for one in readings for gateway, lost in one.lost.items() if lost},
        )


def to_json(
    audit: Audit, redeliveries: Sequence[Redelivery] = (), *, no_effect: int | None = None
) -> dict[str, object]:
    """Return an audit as ``syncd audit -o json`` prints it; `no_effect` is None without a redelivery."""
    comparison = audit.comparison
    return {
        "from": rfc3339(comparison.since),
        "to": rfc3339(comparison.until),
        "equal": audit.is_equal and audit.incomparable_reason is None,
        "hours": comparison.hours,
        "hours_compared": comparison.hours_compared,
        "hours_left_out": [
            {"hour": rfc3339(hour), "reasons": list(why)} for hour, why in comparison.left_out.items()
        ],
        "destinations_left_out": [one.to_json() for one in audit.other_destinations],
        "requests_lost": {gateway: dict(lost) for gateway, lost in audit.lost.items()},
        "types": [_type_json(used, comparison) for used in audit.yardsticks],
        "not_compared": dict(comparison.not_compared),
        "differences": [_difference_json(one) for one in comparison.differences],
        "redeliveries": [one.to_json() for one in redeliveries],
        "redelivered_without_effect": no_effect,
    }


def _type_json(used: Yardstick, comparison: Comparison) -> dict[str, object]:
    totals = comparison.totals.get(used.type, Totals())
    numbers = {
        "delivered": totals.delivered,
        "dead_lettered": totals.dead_lettered,
        "counted": totals.counted if used.exact else None,
        "missing": totals.missing,
        "refused": totals.refused,
        "lost": totals.lost,
        "surplus": totals.surplus,
    }
    return {"type": used.type, "meter": used.meter, "exact": used.exact, **numbers}


def _difference_json(one: Difference) -> dict[str, object]:
    return {
        "hour": rfc3339(one.line.hour),
        "type": one.line.type,
        "subject": one.line.subject,
        "delivered": one.delivered,
        "dead_lettered": one.dead_lettered,
        "counted": one.counted,
        "missing": one.missing,
        "refused": one.refused,
        "lost": one.lost,
        "surplus": one.surplus,
        "gateways": [
            {
                "name": name,
                "delivered": sent.delivered,
                "dead_lettered": sent.dead_lettered,
                "lost": sent.gone,
            }
            for name, sent in one.gateways
        ],
    }
