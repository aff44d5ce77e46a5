"""Gateways as the pages show them: what their plugins' books say, and how good that is."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from syncd.config.gateways import GatewayConfig
from syncd.config.settings import Config
from syncd.dashboard.probes import TIMEOUT
from syncd.dashboard.text import duration, plural
from syncd.dashboard.views import Level
from syncd.gateways.client import Gateway
from syncd.gateways.models import DeadLetters, Readiness, Spool

PAGE_SIZE: Final = 50
OLD: Final = 900.0
"""Seconds after which an event that waits is a warning: as in docs/plugin-operations.md."""


@dataclass(frozen=True, slots=True)
class GatewayState:
    """What a gateway said of itself, all in one reading."""

    readiness: Readiness
    spool: Spool

    @property
    def level(self) -> Level:
        """Return how good it is."""
        if not self.readiness.ready or not self.spool.delivery_running:
            return "problem"
        return "warning" if self.warnings else "ok"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what somebody should look at."""
        spool, books = self.spool, self.spool.total.books
        oldest = spool.total.oldest_waiting
        found = []
        if oldest and oldest.age_seconds > OLD:
            found.append(f"events wait since {duration(oldest.age_seconds)}")
        if spool.dead_letters:
            found.append(plural(spool.dead_letters, "dead letter"))
        if spool.quarantined:
            found.append(f"{plural(spool.quarantined, 'request')} in quarantine")
        if lost := sum(books.lost.values()):
            found.append(f"{plural(lost, 'request')} lost")
        return tuple(found)

    @property
    def problems(self) -> tuple[str, ...]:
        """Return what keeps it from its work."""
        if self.readiness.ready and not self.spool.delivery_running:
            return ("no delivery runs on its spool",)
        return self.readiness.problems

    @property
    def summary(self) -> str:
        """Say how it is, in one line."""
        waiting = plural(self.spool.total.backlog, "event") + " waiting"
        return "; ".join([*self.problems, *self.warnings]) or waiting


def read_state(config: GatewayConfig, index: int) -> GatewayState:
    """Ask a gateway how it is; raises GatewayError."""
    with _asked_once(config, index) as gateway:
        return GatewayState(gateway.readiness(), gateway.spool())


def read_dead_letters(config: GatewayConfig, index: int, after: int) -> DeadLetters:
    """Return a page of a gateway's dead letters; raises GatewayError."""
    with _asked_once(config, index) as gateway:
        return gateway.dead_letters(after, PAGE_SIZE)


def gateway_named(config: Config, name: str) -> tuple[int, GatewayConfig] | None:
    """Return a gateway of the configuration and its place there."""
    return next((found for found in enumerate(config.gateways) if found[1].name == name), None)


def _asked_once(config: GatewayConfig, index: int) -> Gateway:
    timeout = min(config.timeout, timedelta(seconds=TIMEOUT))
    return Gateway(config.model_copy(update={"timeout": timeout}), index, attempts=1)
