"""Meter queries, in SQL: openmeter/streaming/clickhouse/meter_query.go on SQLite."""

import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import orjson

from syncd.sandbox.problems import GroupByError, invalid, not_found
from syncd.sandbox.store.aggregates import window_end
from syncd.sandbox.values import epoch_seconds, json_path_names, parse_time, rfc3339

# ClickHouse's JSON_VALUE: the text of any scalar, and "" if there is none.
_TEXT = """
CASE json_type(data, {path}) WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' WHEN 'null' THEN 'null'
WHEN 'object' THEN '' WHEN 'array' THEN '' ELSE coalesce(CAST(json_extract(data, {path}) AS TEXT), '') END
"""
_NUMERIC = (
    "CASE WHEN json_type(data, {path}) IN ('integer', 'real', 'text') THEN json_extract(data, {path}) END"
)
_AGGREGATIONS = {
    "COUNT": "count(*)",
    "SUM": f"decimal_sum({_NUMERIC})",
    "AVG": f"avg(number({_NUMERIC}))",
    "MIN": f"min(number({_NUMERIC}))",
    "MAX": f"max(number({_NUMERIC}))",
    "UNIQUE_COUNT": f"count(DISTINCT nullif({_TEXT}, 'null'))",
}
# The requested customers, by the current attribution. A subject that is the key of one of them and a subject
# of another belongs to the key's owner: min() makes SQLite take the other columns from its row.
_OF_CUSTOMERS = """
JOIN (
    SELECT subject, customer_id, min(role) FROM attribution
    WHERE customer_id IN (SELECT value FROM json_each(:customers)) GROUP BY subject
) USING (subject)
"""

_CONDITIONS = ("type = :type", "stored_at <= :now", "time >= :time_from", "time < :time_to")
_WITH_SUBJECTS = ("subject IN (SELECT value FROM json_each(:subjects))",)
_BEGINNING, _END = -(2**62), 2**62


@dataclass(frozen=True, slots=True)
class Query:
    """A query to a meter. Times are seconds since 1970, `time_from` inclusive and `time_to` exclusive."""

    time_from: int | None = None
    time_to: int | None = None
    window_size: str | None = None
    time_zone: str = "UTC"
    subjects: Sequence[str] = ()
    customer_ids: Sequence[str] = ()
    group_by: Sequence[str] = ()
    group_filters: Mapping[str, str] = field(default_factory=dict)


def query(connection: sqlite3.Connection, meter: dict[str, Any], wanted: Query) -> list[dict[str, Any]]:
    """Aggregate the meter's events into rows in the shape of MeterQueryRow.

    Raises the 400s for names that the meter does not group by, for an empty period, and for grouping by
    customer_id without a customer filter; the 404 for an unknown customer.
    """
    groups = _groups(wanted)
    _validate(connection, meter, wanted, groups)
    rows = connection.execute(_sql(meter, wanted, groups), _parameters(meter, wanted))
    return [_row(row, wanted, groups) for row in rows if row["value"] is not None]


def _groups(wanted: Query) -> list[str]:
    # Filtering by subjects or customers also groups by them: openmeter/meter/httphandler/mapping.go.
    implied = ["subject"] * bool(wanted.subjects) + ["customer_id"] * bool(wanted.customer_ids)
    return sorted({*wanted.group_by, *implied})


def _validate(
    connection: sqlite3.Connection, meter: dict[str, Any], wanted: Query, groups: Iterable[str]
) -> None:
    known = meter.get("groupBy", {}).keys()
    for name in groups:
        if name not in known | {"subject", "customer_id"}:
            raise GroupByError(name)
    for name in wanted.group_filters:
        if name not in known:
            raise invalid(f"invalid group by filter: {name}")
    for customer_id in wanted.customer_ids:
        find = "SELECT 1 FROM customers WHERE id = ? AND deleted_at IS NULL"
        if connection.execute(find, (customer_id,)).fetchone() is None:
            raise not_found(f"customer with id {customer_id} not found")
    if wanted.time_from is not None and wanted.time_to is not None:
        if wanted.time_from == wanted.time_to:
            raise invalid("from and to cannot be equal")
        if wanted.time_from > wanted.time_to:
            raise invalid("from must be before to")
    if "customer_id" in groups and not wanted.customer_ids:
        raise invalid("customer filter is required with customer_id group by")


def _sql(meter: dict[str, Any], wanted: Query, groups: Iterable[str]) -> str:
    columns = [f"{_AGGREGATIONS[meter['aggregation']].format(path=':value_path')} AS value"]
    names = []
    if wanted.window_size:
        columns.append("window_start(time, :window_size, :time_zone) AS window_start")
        names.append("window_start")
    else:
        columns += ["min(time) AS first", "max(time) AS last"]
    for name in groups:
        columns.append(f"{_group(meter, name)} AS group_{name}")
        names.append(f"group_{name}")
    filters = [f"{_group(meter, name)} = :filter_{name}" for name in wanted.group_filters]
    conditions = " AND ".join([*_CONDITIONS, *(_WITH_SUBJECTS if wanted.subjects else ()), *filters])
    # Only the meter's own names (letters, digits, underscores) and validated paths are interpolated.
    source = f"events {_OF_CUSTOMERS if wanted.customer_ids else ''}"
    statement = f"SELECT {', '.join(columns)} FROM {source} WHERE {conditions}"  # noqa: S608
    return f"{statement} GROUP BY {', '.join(names)} ORDER BY {', '.join(names)}" if names else statement


def _group(meter: dict[str, Any], name: str) -> str:
    if name in ("subject", "customer_id"):
        return name
    path = ".".join(json_path_names(meter["groupBy"][name]))
    return _TEXT.format(path=f"'$.{path}'")


def _parameters(meter: dict[str, Any], wanted: Query) -> dict[str, Any]:
    event_from = epoch_seconds(parse_time(meter["eventFrom"])) if "eventFrom" in meter else _BEGINNING
    return {
        "type": meter["eventType"],
        "now": time.time(),
        "value_path": meter.get("valueProperty"),
        "time_from": max(event_from, _BEGINNING if wanted.time_from is None else wanted.time_from),
        "time_to": _END if wanted.time_to is None else wanted.time_to,
        "window_size": wanted.window_size,
        "time_zone": wanted.time_zone,
        "subjects": orjson.dumps(list(wanted.subjects)).decode(),
        "customers": orjson.dumps(list(wanted.customer_ids)).decode(),
        **{f"filter_{name}": value for name, value in wanted.group_filters.items()},
    }


def _row(row: sqlite3.Row, wanted: Query, groups: Iterable[str]) -> dict[str, Any]:
    start, end = _window(row, wanted)
    result: dict[str, Any] = {"value": _json_number(row["value"])}
    result |= {"windowStart": rfc3339(start), "windowEnd": rfc3339(end), "subject": None, "groupBy": {}}
    for name in groups:
        if name == "subject":
            result["subject"] = row["group_subject"]
        elif name == "customer_id":
            result["customerId"] = row["group_customer_id"]
        else:
            result["groupBy"][name] = row[f"group_{name}"]
    return result


def _window(row: sqlite3.Row, wanted: Query) -> tuple[int, int]:
    if wanted.window_size:
        start: int = row["window_start"]
        return start, window_end(start, wanted.window_size, wanted.time_zone)
    # Without windows OpenMeter shows the requested period; where that is open, the minutes of the events.
    first, last = row["first"] or 0, row["last"] or 0
    start = first // 60 * 60 if wanted.time_from is None else wanted.time_from
    return start, last // 60 * 60 + 60 if wanted.time_to is None else wanted.time_to


def _json_number(value: float | str) -> int | float:
    number = Decimal(value)
    # Whole numbers as integers, as far as a double, which OpenMeter answers with, is exact.
    return int(number) if number == number.to_integral_value() and abs(number) <= 2**53 else float(number)
