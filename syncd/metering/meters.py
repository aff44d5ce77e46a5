"""The standard meters, the basis of prices, of `syncd usage` and of `syncd audit`, and those of AI traffic.

Missing meters are created; existing ones are never changed. Changing a meter would change what was billed
by it, so one that differs is only reported. Additional dimensions are fine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from syncd.core.errors import ConfigError, RefusedError
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
        _dimensions("type", "modality", "model", "provider", *_COMMON),
    ),
    Meter(
        EVENTS_METER,
        "LLM usage events",
        "Events that report tokens, counted for syncd audit",
        "count",
        "kong.llm_request",
        dimensions=_dimensions("type", "modality", "model", "provider", *_COMMON),
    ),
)

_CALL = ("model", "provider", "operation", "request_mode", "cache_status", *_COMMON)
_RPC = ("method", "error", *_COMMON)
AI_METERS = (
    Meter(
        "kong_llm_calls",
        "LLM calls",
        "Calls to models, with meter_ai_calls",
        "count",
        "kong.llm_call",
        dimensions=_dimensions(*_CALL),
    ),
    Meter(
        "kong_llm_cost",
        "LLM cost",
        "Cost of calls to models, from the prices in Kong's model.options",
        "sum",
        "kong.llm_call",
        "$.cost",
        _dimensions(*_CALL),
    ),
    Meter(
        "kong_llm_cache_hits",
        "LLM cache hit events",
        "Events of calls that Kong's semantic cache answered: each has one of type input",
        "count",
        "kong.llm_cache_hit",
        dimensions=_dimensions("type", "modality", "model", "provider", *_COMMON),
    ),
    Meter(
        "kong_mcp_requests",
        "MCP requests",
        "Requests of agents to MCP servers",
        "count",
        "kong.mcp_request",
        dimensions=_dimensions("tool", *_RPC),
    ),
    Meter(
        "kong_a2a_requests",
        "A2A requests",
        "Requests of agents to agents",
        "count",
        "kong.a2a_request",
        dimensions=_dimensions("task_state", *_RPC),
    ),
)
"""Meters of what the plugin can send about AI traffic beside tokens; see docs/ai-usage.md."""

_UNIT = re.compile(r"[a-z0-9]+(?:_[a-z0-9]+)*")


def unit_meter(name: str) -> Meter:
    """Return the meter that sums a unit of the plugin's setting `units`; raises ConfigError."""
    if not _UNIT.fullmatch(name):
        raise ConfigError(
            f"--unit {name}: OpenMeter's meter keys are lower-case letters, digits and single _ between them;"
            " create a meter for another name by hand"
        )
    return Meter(
        f"kong_unit_{name}",
        f"Units: {name}",
        "The plugin's unit of that name, summed over calls to models",
        "sum",
        "kong.llm_call",
        f"$.{name}",
        _dimensions(*_CALL),
    )


@dataclass(frozen=True, slots=True)
class MeterResult:
    """What `plan_meters` found, or how `apply_meters` ended, for one meter."""

    key: str
    status: Literal["missing", "created", "present", "differs"]
    differences: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the result as in ``syncd meters apply --output json``."""
        return {"key": self.key, "status": self.status, "differences": list(self.differences)}


def plan_meters(api: MeteringApi, wanted: Sequence[Meter] = STANDARD_METERS) -> tuple[MeterResult, ...]:
    """Compare the wanted meters with those of the server."""
    observed = api.meters()
    results: list[MeterResult] = []
    for meter in wanted:
        if (found := observed.get(meter.key)) is None:
            results.append(MeterResult(meter.key, "missing"))
        else:
            differences = tuple(meter.differences(found))
            results.append(MeterResult(meter.key, "differs" if differences else "present", differences))
    return tuple(results)


def apply_meters(api: MeteringApi, wanted: Sequence[Meter] = STANDARD_METERS) -> tuple[MeterResult, ...]:
    """Create missing meters; report those that differ."""
    planned = zip(wanted, plan_meters(api, wanted), strict=True)
    return tuple(_create(api, meter) if one.status == "missing" else one for meter, one in planned)


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
