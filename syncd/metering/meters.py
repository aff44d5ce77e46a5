"""The standard meters: the basis of prices, of `syncd usage` and of `syncd audit`.

Missing meters are created; existing ones are never changed. Changing a meter would change what was billed
by it, so one that differs is only reported. Additional dimensions are fine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from syncd.core.errors import RefusedError
from syncd.metering.base import Meter, MeteringApi
from syncd.metering.usage import EVENTS_METER, REQUESTS_METER, TOKENS_METER


def _dimensions(*names: str) -> dict[str, str]:
    return {name: f"$.{name}" for name in names}


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


def apply_meters(api: MeteringApi, wanted: Sequence[Meter] = STANDARD_METERS) -> tuple[MeterResult, ...]:
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


def _create(api: MeteringApi, meter: Meter) -> MeterResult:
    try:
        api.create_meter(meter)
    except RefusedError as error:
        # The answer to a first attempt was lost, or another client was faster.
        found = api.meters().get(meter.key) if error.status == 409 else None
        if found is None:
            raise
        differences = tuple(meter.differences(found))
        return MeterResult(meter.key, "differs" if differences else "created", differences)
    return MeterResult(meter.key, "created")
