"""Health of other systems: probes of sources and the metering API, and the state of the gateways.

A probe checks with one small request whether a system can be read; it returns a short summary and raises
SyncdError if it cannot. Runs read everything; a page view must stay cheap. Of a gateway, backlog and books
are read, and rated as ok, warning or problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import quote

from openmeter_plugin.units import plural
from syncd.config.sections import GatewayConfig
from syncd.config.settings import Config
from syncd.core.errors import RefusedError, SourceError
from syncd.dashboard.text import ago, duration, size
from syncd.dashboard.views import Level
from syncd.gateways.client import Gateway
from syncd.gateways.models import Gate, Readiness, Spool
from syncd.http.client import ApiClient, Params
from syncd.http.endpoint import Endpoint
from syncd.http.json import expect_list, expect_object
from syncd.http.retry import Pace, Retry
from syncd.runs.factory import metering_endpoint, quick_target_of, sources_of
from syncd.sources.base import Source
from syncd.sources.files import ApplicationsFile, DeclarativeFile, Static
from syncd.sources.kong_admin import KongAdmin
from syncd.sources.konnect import KonnectApplications, KonnectConsumers

TIMEOUT: Final = 5.0
"""Maximum seconds for a request of the dashboard, even if the configuration allows more for runs."""

_NOT_FOUND: Final = 404


@dataclass(frozen=True, slots=True)
class Probe:
    """One system and the check for it. `address` holds no secrets."""

    name: str
    address: str
    check: Callable[[], str]


def source_probes(config: Config) -> list[Probe]:
    """Return a probe for each source, in the order of the configuration."""
    return [_source_probe(source) for source in sources_of(config)]


def metering_probe(config: Config) -> Probe:
    """Return the probe of the metering API, which reads its first customer."""

    def check() -> str:
        with closing(quick_target_of(config, TIMEOUT, pace=Pace())) as api:
            total = api.count_customers()
        return f"{plural(total, 'customer')}" if total is not None else "customers can be read"

    return Probe(config.metering.dialect, metering_endpoint(config).url, check)


def _source_probe(source: Source) -> Probe:
    match source:
        case KongAdmin(endpoint=endpoint):
            return Probe(source.name, endpoint.url, lambda: _kong(source))
        case KonnectConsumers(endpoint=endpoint, control_plane_id=identity):
            prefix = f"/v2/control-planes/{quote(identity, safe='')}/core-entities"
            return Probe(source.name, endpoint.url, lambda: _consumers(source.name, endpoint, prefix))
        case KonnectApplications(endpoint=endpoint, portal_id=identity):
            return _applications(source.name, endpoint, identity)
        case DeclarativeFile(path=path) | ApplicationsFile(path=path):
            return Probe(source.name, str(path), lambda: _file(source.name, path))
        case Static(subjects=subjects):
            return Probe(source.name, "the configuration", lambda: plural(len(subjects), "subject"))
        case _:
            return Probe(source.name, "", lambda: "not checked here; runs read it")


def _kong(source: KongAdmin) -> str:
    try:
        return _consumers(source.name, source.endpoint, source.prefix)
    except RefusedError as error:
        if error.status == _NOT_FOUND and source.workspace:
            raise source.missing_workspace() from None
        raise


def _consumers(name: str, endpoint: Endpoint, prefix: str) -> str:
    page = _get(endpoint, f"{prefix}/consumers", {"size": 1}, name)
    # Lua does not distinguish an empty list from an empty object.
    entries = [] if page.get("data") == {} else page.get("data")
    found = expect_list(entries, name, "data of /consumers")
    return "consumers can be read" if found else "answers, but has no consumers"


def _applications(name: str, endpoint: Endpoint, portal: str) -> Probe:
    path = f"/v3/portals/{quote(portal, safe='')}/applications"

    def check() -> str:
        total = _total(_get(endpoint, path, {"page[size]": 1, "page[number]": 1}, name))
        return plural(total, "application") if total is not None else "applications can be read"

    return Probe(name, endpoint.url, check)


def _file(name: str, path: Path) -> str:
    try:
        with path.open("rb"):
            found = path.stat()
    except OSError as error:
        raise SourceError(name, f"cannot read {path}: {error.strerror}") from None
    changed = datetime.fromtimestamp(found.st_mtime, UTC)
    return f"{size(found.st_size)}, changed {ago(changed, datetime.now(UTC))}"


def _get(endpoint: Endpoint, path: str, params: Params, name: str) -> Mapping[str, object]:
    """Read once, with a short time-out."""
    endpoint = replace(endpoint, timeout=min(endpoint.timeout, TIMEOUT))
    with ApiClient(endpoint, Retry(attempts=1)) as client:
        return expect_object(client.get(path, params), name, path)


def _total(document: Mapping[str, object]) -> int | None:
    """Return the total count of a list of Konnect."""
    meta = document.get("meta")
    page = meta.get("page") if isinstance(meta, dict) else None
    value = page.get("total") if isinstance(page, dict) else None
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


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
