"""Settings of the usage that the daemon keeps for the dashboard."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from syncd.config.types import Duration, Key, Section

_SHORTEST = timedelta(minutes=1)
_LONGEST_KEPT = timedelta(days=800)
_MAX_DIMENSIONS = 6
"""Each further one multiplies the rows that are kept."""


def _not_too_often(value: timedelta) -> timedelta:
    if value < _SHORTEST:
        raise ValueError("must be at least 1m: each refresh asks the metering API for every meter")
    return value


def _days(value: timedelta) -> timedelta:
    if not timedelta(days=2) <= value <= _LONGEST_KEPT:
        raise ValueError(f"must be from 2d to {_LONGEST_KEPT.days}d")
    return value


def _dimensions(value: object) -> object:
    if not isinstance(value, dict):
        return value
    for meter, names in value.items():
        if names is None:
            continue
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{meter} must have a list of dimensions, such as [model, type]; [] is none")
        if len(set(names)) > _MAX_DIMENSIONS:
            raise ValueError(f"{meter} has more than {_MAX_DIMENSIONS} dimensions")
    return {meter: tuple(names or ()) for meter, names in value.items()}


Dimensions = Annotated[dict[Key, tuple[str, ...]], BeforeValidator(_dimensions)]


class UsageConfig(Section):
    """The usage that the daemon keeps, so that pages never wait for the metering API."""

    interval: Annotated[Duration, AfterValidator(_not_too_often)] = timedelta(minutes=30)
    """Time between two refreshes. One takes a request for the meters, one for each meter, and one for each
    day of a meter that has changed since: three requests for two meters, and five as a rule."""
    keep: Annotated[Duration, AfterValidator(_days)] = timedelta(days=400)
    """How far back usage is fetched and kept."""
    meters: Dimensions = Field(
        default={"kong_api_requests": ("route_name",), "kong_llm_tokens": ("model", "type")}
    )
    """The meters, which count or sum, each with the dimensions by which its usage is shown. Meters and
    dimensions of `prices` need not be repeated here. `{}` without prices keeps nothing."""
