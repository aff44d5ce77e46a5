"""Meter queries by hour and subject: selects the meter of an event type and reads its values.

Rows have windows of an hour, UTC; a window without events has no row. v1 returns numbers, v3 numbers as
text. In v1's specification `to` is inclusive, so rows outside the span are dropped here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from urllib.parse import quote

from syncd.audit.compare import Line, Yardstick, hour_of
from syncd.core.errors import MalformedError
from syncd.http.client import ApiClient, expect_list, expect_object
from syncd.metering.meters import Dialect, Meter, MeterApi
from syncd.metering.usage import EVENTS_METER, REQUESTS_METER, TOKENS_METER
from syncd.runs.unbilled import rfc3339

_API = "metering API"
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
    try:
        return hour_of(_moment(meter.events_from), up=True)
    except ValueError:
        raise MalformedError(
            f"{_API}: meter {meter.key} has an invalid start time {meter.events_from!r}"
        ) from None


class HourlyMeters:
    """Hourly values of the meters of a metering API, in either dialect; the meters are listed once."""

    def __init__(self, client: ApiClient, dialect: Dialect) -> None:
        """List the meters. Raises ApiError."""
        self._client = client
        self._is_v3 = dialect == "openmeter-v3"
        self._meters = MeterApi(client, dialect).meters()

    def yardstick(self, event_type: str) -> Yardstick | None:
        """Return the meter to compare a type of event with, None if no meter has it."""
        return yardstick(event_type, self._meters)

    def values(self, used: Yardstick, since: datetime, until: datetime) -> dict[Line, int]:
        """Return the values of a meter by hour and subject; for one that sums, 1 for any value but 0."""
        found: dict[Line, float] = {}
        for row in self._rows(self._meters[used.meter], since, until):
            hour, subject, value = self._row(row)
            if since <= hour < until:
                line = Line(hour, used.type, subject)
                found[line] = found.get(line, 0) + value
        if not used.exact:
            return {line: 1 for line, value in found.items() if value}
        if odd := next((line for line, value in found.items() if not value.is_integer()), None):
            raise MalformedError(
                f"{_API}: meter {used.meter} returned a fractional count for {odd.subject!r}"
            )
        return {line: int(value) for line, value in found.items()}

    def _rows(self, meter: Meter, since: datetime, until: datetime) -> list[object]:
        period = {"from": rfc3339(since), "to": rfc3339(until)}
        if self._is_v3:
            path = f"/openmeter/meters/{quote(meter.id or meter.key, safe='')}/query"
            body = {**period, "granularity": "PT1H", "group_by_dimensions": ["subject"]}
            # This POST only reads, so it is retried like a GET.
            answer = self._client.request("POST", path, body=body)
        else:
            path = f"/api/v1/meters/{quote(meter.key, safe='')}/query"
            answer = self._client.get(path, {**period, "windowSize": "HOUR", "groupBy": ["subject"]})
        return expect_list(expect_object(answer, _API, path).get("data"), _API, f"data of {path}")

    def _row(self, row: object) -> tuple[datetime, str, float]:
        fields = expect_object(row, _API, "a row of usage")
        dimensions = fields.get("dimensions") if self._is_v3 else fields
        subject = dimensions.get("subject") if isinstance(dimensions, dict) else None
        start, value = fields.get("from" if self._is_v3 else "windowStart"), fields.get("value")
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            with suppress(ValueError):
                return hour_of(_moment(str(start))), str(subject or ""), float(value)
        raise MalformedError(f"{_API}: a row of hourly usage has no hour or no number")


def _moment(text: str) -> datetime:
    """Return an RFC 3339 time; raises ValueError."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
