"""Models of GET /v1/gate: whom the gate of a gateway stops (docs/gate.md)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field, RootModel

from syncd.gateways.models import Count, Model


class GateKong(Model):
    """A Kong that asks for the gate's feed; `heard` is when it last did, in seconds before now."""

    id: str
    lua: str = ""
    """Version of its Lua half; empty if it did not say."""
    heard: float
    passed: Count = 0
    errors: Count = 0
    """Faults in its Lua half, each of which let a request pass."""
    no_memory: Count = 0


class GateFigures(Model):
    """Figures of the gate."""

    model_config = ConfigDict(strict=False)  # strict mode takes no list for a tuple within a tuple

    calls: tuple[tuple[str, str, Count], ...]
    """Calls to the metering API: their kind, the status of the answer, how many since the start."""
    state_age: float
    """Age of the oldest reading of an active subject, in seconds."""
    answer_age: float | None
    """When the metering API last answered, in seconds before now; None if it has not yet."""
    kongs: tuple[GateKong, ...]


class GateKey(Model):
    """A feature of a customer that is stopped (`reason`), or close to its end."""

    account: str
    subjects: tuple[str, ...] = Field(strict=False)
    feature: str
    reason: str | None
    left: float | None
    quota: float | None
    reset: float


class GateStopped(Model):
    """Requests of a subject that were stopped, or would have been (`mode` shadow)."""

    subject: str
    feature: str
    reason: str
    mode: str
    count: Count
    last_at: float


class GateOverride(Model):
    """A subject that is allowed everything until a time."""

    subject: str
    until: float
    why: str
    by: str

    @property
    def ends(self) -> datetime:
        """When it ends."""
        return datetime.fromtimestamp(self.until, UTC)


class Gate(Model):
    """GET /v1/gate; lists are cut after 200 entries, `denied_counts` are of all."""

    model_config = ConfigDict(strict=False)

    version: str
    mode: Literal["off", "shadow", "enforce"]
    features: tuple[str, ...]
    subjects: Count
    denied: tuple[GateKey, ...]
    denied_counts: tuple[tuple[str, str, Count], ...]
    """Feature, reason, and how many customers."""
    close: tuple[GateKey, ...]
    stopped: tuple[GateStopped, ...]
    overrides: tuple[GateOverride, ...]
    figures: GateFigures
    last_error: str


class NoGate(Model):
    """The answer of a plugin server without a gate."""

    detail: str


class MaybeGate(RootModel[Gate | NoGate]):
    """The gate, or the answer that there is none."""


class GateChanged(RootModel[Any]):
    """The answer to a change of an override, of which nothing is read."""
