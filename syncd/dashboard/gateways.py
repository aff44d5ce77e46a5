"""State of the gateways: their backlog and books, rated as ok, warning or problem."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from openmeter_plugin.units import plural
from syncd.config.sections import GatewayConfig
from syncd.config.settings import Config
from syncd.dashboard.probes import TIMEOUT
from syncd.dashboard.text import duration
from syncd.dashboard.views import Level
from syncd.gateways.client import Gateway
from syncd.gateways.models import Gate, Readiness, Spool

MAX_WAITING_SECONDS: Final = 900.0
"""Age from which a waiting event is a warning, as in docs/plugin-operations.md."""


@dataclass(frozen=True, slots=True)
class GatewayState:
    """A gateway's readiness and spool, read together."""

    readiness: Readiness
    spool: Spool

    @property
    def level(self) -> Level:
        """Return the overall level."""
        if not self.readiness.ready or not self.spool.delivery_running:
            return "problem"
        return "warning" if self.warnings else "ok"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what needs attention."""
        spool, books = self.spool, self.spool.total.books
        found = [self.lag] if self.lag else []
        if spool.dead_letters:
            found.append(plural(spool.dead_letters, "dead letter"))
        if spool.quarantined:
            found.append(f"{plural(spool.quarantined, 'request')} in quarantine")
        if lost := sum(books.lost.values()):
            causes = ", ".join(f"{cause} {count}" for cause, count in sorted(books.lost.items()) if count)
            found.append(f"{plural(lost, 'request')} lost ({causes})")
        if lost := sum(books.lost_events.values()):
            found.append(f"{plural(lost, 'event')} lost")
        if gaps := sum(books.ai_usage_gaps.values()):
            found.append(f"AI usage unknown for {plural(gaps, 'request')}")
        return tuple(found)

    @property
    def lag(self) -> str:
        """Return for how long events have been waiting, empty if that is not long."""
        oldest = self.spool.total.oldest_waiting
        if oldest is None or oldest.age_seconds <= MAX_WAITING_SECONDS:
            return ""
        return f"events have been waiting for {duration(oldest.age_seconds)}"

    @property
    def problems(self) -> tuple[str, ...]:
        """Return what keeps events from being delivered."""
        if self.readiness.ready and not self.spool.delivery_running:
            return ("no delivery process is running on its spool",)
        return self.readiness.problems

    @property
    def summary(self) -> str:
        """Return the state in one line."""
        waiting = plural(self.spool.total.backlog, "event") + " waiting"
        return "; ".join([*self.problems, *self.warnings]) or waiting


def read_state(config: GatewayConfig, index: int) -> GatewayState:
    """Read a gateway's state; raises GatewayError."""
    with closing(quick_client(config, index)) as gateway:
        return GatewayState(gateway.readiness(), gateway.spool())


@dataclass(frozen=True, slots=True)
class GateState:
    """The gate of a gateway, None if it has none."""

    gate: Gate | None


def read_gate(config: GatewayConfig, index: int) -> GateState:
    """Read whom a gateway's gate stops; raises GatewayError."""
    with closing(quick_client(config, index)) as gateway:
        return GateState(gateway.gate())


def gateway_named(config: Config, name: str) -> tuple[int, GatewayConfig] | None:
    """Return a configured gateway and its index in the configuration."""
    return next((found for found in enumerate(config.gateways) if found[1].name == name), None)


def quick_client(config: GatewayConfig, index: int) -> Gateway:
    """Return a client that asks once and waits no longer than a page may."""
    timeout = min(config.timeout, timedelta(seconds=TIMEOUT))
    return Gateway(config.model_copy(update={"timeout": timeout}), index, attempts=1)
