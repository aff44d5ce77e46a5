"""The standard meters: the basis of prices, of `syncd usage` and of `syncd audit`.

Missing meters are created; existing ones are never changed. Changing a meter would change what was billed
by it, so one that differs is only reported. Additional dimensions are fine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from syncd.core.errors import RefusedError
from syncd.http.client import ApiClient, expect_list, expect_object
from syncd.http.pagination import Page, read_all
from syncd.metering.usage import EVENTS_METER, REQUESTS_METER, TOKENS_METER

_API = "metering API"
Dialect = Literal["openmeter-v1", "openmeter-v3"]


def _dimensions(*names: str) -> dict[str, str]:
    return {name: f"$.{name}" for name in names}


@dataclass(frozen=True, slots=True)
class Meter:
    """Definition of a meter, with the field names of the v3 API."""

    key: str
    name: str
    description: str
    aggregation: str
    event_type: str
    value_property: str | None = None
    dimensions: Mapping[str, str] = field(default_factory=dict)
    id: str | None = field(default=None, compare=False)
    """Assigned by the server; None for a meter that is not created yet."""
    events_from: str | None = field(default=None, compare=False)
    """RFC 3339; older events are not counted. None counts all."""

    def differences(self, observed: Meter) -> list[str]:
        """Describe how the observed meter differs from this one."""
        found = [
            f"{what} is {actual!r}, not {expected!r}"
            for what, actual, expected in (
                ("aggregation", observed.aggregation, self.aggregation),
                ("event type", observed.event_type, self.event_type),
                ("value property", observed.value_property, self.value_property),
            )
            if actual != expected
        ]
        for name, path in self.dimensions.items():
            if name not in observed.dimensions:
                found.append(f"dimension {name} is missing")
            elif observed.dimensions[name] != path:
                found.append(f"dimension {name} is {observed.dimensions[name]!r}, not {path!r}")
        return found


_COMMON = ("route_name", "service_name", "consumer_id", "application_id")
STANDARD_METERS = (
    Meter(
        REQUESTS_METER,
        "API requests",
        "Requests through Kong",
        "count",
        "kong.api_request",
        dimensions=_dimensions("request_method", "status", "response_source", *_COMMON),
    ),
    Meter(
        TOKENS_METER,
        "LLM tokens",
        "Tokens through Kong's AI plugins",
        "sum",
        "kong.llm_request",
        "$.tokens",
        _dimensions("type", "model", "provider", *_COMMON),
    ),
    Meter(
        EVENTS_METER,
        "LLM usage events",
        "Events that report tokens, counted for syncd audit",
        "count",
        "kong.llm_request",
        dimensions=_dimensions("type", "model", "provider", *_COMMON),
    ),
)


@dataclass(frozen=True, slots=True)
class MeterResult:
    """How `apply_meters` ended for one meter."""

    key: str
    status: Literal["created", "present", "differs"]
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the result as in ``syncd meters apply --json``."""
        return {"key": self.key, "status": self.status, "differences": list(self.differences)}


class MeterApi:
    """The meters of a metering API of either dialect."""

    def __init__(self, client: ApiClient, dialect: Dialect) -> None:
        self._client = client
        self._is_v3 = dialect == "openmeter-v3"

    def meters(self) -> dict[str, Meter]:
        """Return all meters by key."""
        if self._is_v3:
            listed = read_all(self._page, f"the meters of the {_API}", created="created_at")
        else:
            entries = expect_list(self._client.get("/api/v1/meters"), _API, "/api/v1/meters")
            listed = [expect_object(entry, _API, "a meter") for entry in entries]
        found = [self._meter(document) for document in listed]
        return {meter.key: meter for meter in found}

    def create(self, meter: Meter) -> None:
        """Create a meter; raises RefusedError with status 409 if its key is in use."""
        if self._is_v3:
            body: dict[str, object] = {
                "key": meter.key,
                "aggregation": meter.aggregation,
                "event_type": meter.event_type,
                "value_property": meter.value_property,
                "dimensions": dict(meter.dimensions),
            }
        else:
            body = {
                "slug": meter.key,
                "aggregation": meter.aggregation.upper(),
                "eventType": meter.event_type,
                "valueProperty": meter.value_property,
                "groupBy": dict(meter.dimensions),
            }
        body |= {"name": meter.name, "description": meter.description}
        body = {name: value for name, value in body.items() if value is not None}
        self._client.request("POST", "/openmeter/meters" if self._is_v3 else "/api/v1/meters", body=body)

    def _page(self, number: int, size: int) -> Page:
        path = "/openmeter/meters"
        page = expect_object(self._client.get(path, {"page[size]": size, "page[number]": number}), _API, path)
        entries = expect_list(page.get("data"), _API, f"data of {path}")
        meta = expect_object(expect_object(page.get("meta"), _API, "meta").get("page"), _API, "meta.page")
        total = meta.get("total")
        return Page(
            [expect_object(entry, _API, "a meter") for entry in entries],
            int(total) if isinstance(total, int | float) else None,
        )

    def _meter(self, document: Mapping[str, object]) -> Meter:
        names = ("key", "event_type", "value_property", "events_from", "dimensions")
        if not self._is_v3:
            names = ("slug", "eventType", "valueProperty", "eventFrom", "groupBy")
        key, event_type, value_property, events_from = (document.get(name) for name in names[:4])
        dimensions = document.get(names[4])
        if not isinstance(dimensions, dict):
            dimensions = {}
        return Meter(
            key=str(key),
            name=str(document.get("name") or key),
            description=str(document.get("description") or ""),
            aggregation=str(document.get("aggregation")).lower(),
            event_type=str(event_type),
            value_property=value_property if isinstance(value_property, str) else None,
            dimensions={str(name): str(path) for name, path in dimensions.items()},
            id=str(document["id"]) if document.get("id") else None,
            events_from=events_from if isinstance(events_from, str) else None,
        )


def apply_meters(api: MeterApi, wanted: Sequence[Meter] = STANDARD_METERS) -> tuple[MeterResult, ...]:
    """Create missing meters; report those that differ."""
    observed = api.meters()
    results: list[MeterResult] = []
    for meter in wanted:
        found = observed.get(meter.key)
        if found is None:
            results.append(_create(api, meter))
        else:
            differences = tuple(meter.differences(found))
            results.append(MeterResult(meter.key, "differs" if differences else "present", differences))
    return tuple(results)


def _create(api: MeterApi, meter: Meter) -> MeterResult:
    try:
        api.create(meter)
    except RefusedError as error:
        # The answer to a first attempt was lost, or another client was faster.
        found = api.meters().get(meter.key) if error.status == 409 else None
        if found is None:
            raise
        differences = tuple(meter.differences(found))
        return MeterResult(meter.key, "differs" if differences else "created", differences)
    return MeterResult(meter.key, "created")
