"""The dialects of the metering API: the one table that names them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from syncd.config.settings import Dialect
from syncd.http.endpoint import Endpoint
from syncd.http.retry import Retry
from syncd.metering.base import MeteringApi
from syncd.metering.v1 import OpenMeterV1
from syncd.metering.v3 import OpenMeterV3


@dataclass(frozen=True, slots=True)
class Speaker:
    """How to open a client of one dialect. `labels_only`: its metadata keep the rules of labels."""

    open: Callable[[Endpoint, Retry], MeteringApi]
    labels_only: bool


DIALECTS: Mapping[Dialect, Speaker] = {
    "openmeter-v1": Speaker(OpenMeterV1, labels_only=False),
    "openmeter-v3": Speaker(OpenMeterV3, labels_only=True),
}
