"""Meter queries by hour and subject: selects the meter of an event type and reads its values.

A server may include the hour after the end, so rows outside the span are dropped here.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from syncd.audit.compare import Line, Yardstick, hour_of
from syncd.core.errors import MalformedError
from syncd.metering.answers import API, moment
from syncd.metering.base import Meter, MeteringApi
from syncd.metering.usage import EVENTS_METER, REQUESTS_METER, TOKENS_METER
from syncd.runs.unbilled import rfc3339

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
