"""Meters: which events they count, and whether an event can be counted."""

import re
import sqlite3
from typing import Any, Literal, Self

import orjson
from pydantic import Field, field_validator, model_validator

from syncd.sandbox.bodies import Body, Metadata
from syncd.sandbox.problems import conflict, invalid, not_found
from syncd.sandbox.values import json_path_names, look_up, now_rfc3339, parse_number, parse_time, ulid


class MeterBody(Body):
    """The body of POST /api/v1/meters, without the aggregation LATEST, which the sandbox does not support."""

    slug: str = Field(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*$", max_length=64)
    aggregation: Literal["SUM", "COUNT", "UNIQUE_COUNT", "AVG", "MIN", "MAX"]
    event_type: str = Field(min_length=1)
    name: str | None = Field(default=None, min_length=1, max_length=256)
    description: str | None = Field(default=None, max_length=1024)
    metadata: Metadata | None = None
    event_from: str | None = None
    value_property: str | None = None
    group_by: dict[str, str] | None = None

    nullable = frozenset({"metadata"})

    @model_validator(mode="after")
    def _agree(self) -> Self:
        # Rules and wording: openmeter/meter/meter.go.
        if self.aggregation == "COUNT" and self.value_property is not None:
            raise invalid(
                "invalid meter aggregation: meter value property is not allowed when the aggregation is count"
            )
        if self.aggregation != "COUNT" and not self.value_property:
            raise invalid(
                "invalid meter aggregation: "
                "meter value property is required when the aggregation is not count"
            )
        if self.value_property is not None:
            _check_path(self.value_property)
        if self.event_from is not None:
            parse_time(self.event_from)
        return self

    @field_validator("group_by")
    @classmethod
    def _check_group_by(cls, group_by: dict[str, str] | None) -> dict[str, str] | None:
        for key, path in (group_by or {}).items():
            if not re.fullmatch(r"[a-zA-Z_][0-9a-zA-Z_]*", key):
                raise ValueError(f"meter group by key {key} is invalid")
            _check_path(path)
        return group_by


def _check_path(path: str) -> None:
    try:
        json_path_names(path)
    except ValueError as error:
        raise invalid(f"invalid JSONPath: {error}") from None


def _fields(*names: str) -> dict[str, str]:
    return {name: f"$.{name}" for name in names}


STANDARD_METERS = (
    {
        "slug": "kong_api_requests",
        "name": "API requests",
        "description": "Requests through Kong",
        "aggregation": "COUNT",
        "eventType": "kong.api_request",
        "groupBy": _fields(
            "request_method",
            "route_name",
            "service_name",
            "status",
            "response_source",
            "consumer_id",
            "application_id",
        ),
    },
    {
        "slug": "kong_llm_tokens",
        "name": "LLM tokens",
        "description": "Tokens through Kong's AI plugins",
        "aggregation": "SUM",
        "eventType": "kong.llm_request",
        "valueProperty": "$.tokens",
        "groupBy": _fields(
            *("type", "modality", "model", "provider"),
            *("route_name", "service_name", "consumer_id", "application_id"),
        ),
    },
    {
        "slug": "kong_llm_events",
        "name": "LLM usage events",
        "description": "Events that report tokens, counted for syncd audit",
        "aggregation": "COUNT",
        "eventType": "kong.llm_request",
        "groupBy": _fields(
            *("type", "modality", "model", "provider"),
            *("route_name", "service_name", "consumer_id", "application_id"),
        ),
    },
)
"""The meters of a new database, for the two event types of Kong's own metering plugin."""


def create_standard_meters(connection: sqlite3.Connection) -> None:
    """Create the standard meters in a database without meters."""
    for meter in STANDARD_METERS:
        create(connection, MeterBody.model_validate(meter))


def create(connection: sqlite3.Connection, body: MeterBody) -> dict[str, Any]:
    """Create a meter and return it in the shape of Meter. Raises the 409 if the slug is in use."""
    document = {"name": body.slug} | body.document()
    now = now_rfc3339()
    try:
        connection.execute(
            "INSERT INTO meters VALUES (?, ?, ?, ?, ?)",
            (ulid(), body.slug, orjson.dumps(document).decode(), now, now),
        )
    except sqlite3.IntegrityError:
        raise conflict("meter with the same slug already exists") from None
    return get(connection, body.slug)


def list_meters(connection: sqlite3.Connection) -> list[dict[str, Any]]:
    """List all meters, by slug."""
    return [_meter(row) for row in connection.execute("SELECT * FROM meters ORDER BY slug")]


def get(connection: sqlite3.Connection, id_or_slug: str) -> dict[str, Any]:
    """Return a meter. Raises the 404."""
    row = connection.execute("SELECT * FROM meters WHERE ? IN (id, slug)", (id_or_slug,)).fetchone()
    if row is None:
        raise not_found(f"meter not found: {id_or_slug}")
    return _meter(row)


def delete(connection: sqlite3.Connection, id_or_slug: str) -> None:
    """Delete a meter but not its events. Raises the 404, and the 409 if a feature counts by it."""
    meter = get(connection, id_or_slug)
    find = "SELECT key FROM features WHERE json_extract(document, '$.meterSlug') = ?"
    if connection.execute(find, (meter["slug"],)).fetchone() is not None:
        raise conflict("meter has active features and cannot be deleted")
    connection.execute("DELETE FROM meters WHERE id = ?", (meter["id"],))


def why_not_metered(meter: dict[str, Any], data: object) -> str | None:
    """Return OpenMeter's reason why an event of the meter's type is not counted, None if it is.

    Source: openmeter/meter/parse.go.
    """
    if meter["aggregation"] == "COUNT":
        return None
    if data is None:
        return "invalid event: null and missing value property"
    try:
        value = look_up(data, meter["valueProperty"])
    except KeyError:
        return f'invalid event: missing value property: "{meter["valueProperty"]}"'
    if value is None:
        return "invalid event: value cannot be null"
    if meter["aggregation"] == "UNIQUE_COUNT" or parse_number(value) is not None:
        return None
    if isinstance(value, str):
        return f"invalid event: value cannot be parsed as float64: {value}"
    return f"invalid event: unsupported value property type: {type(value).__name__}"


def _meter(row: sqlite3.Row) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(row["document"])
    # OpenMeter always shows these two, and null where they are empty.
    return {
        "id": row["id"],
        "annotations": None,
        "metadata": None,
        **document,
        "createdAt": row["created_at"],
        "updatedAt": row["updated_at"],
    }
