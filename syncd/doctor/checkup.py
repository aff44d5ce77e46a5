"""The checkup of ``syncd doctor``: reads all systems and runs all checks. Only the probe writes anything.

The probe sends one event twice and counts how often it is stored. The second copy goes out only after the
first has arrived and the sink has flushed. OpenMeter's sink drops doubles within one flush (openmeter/sink:
at most `minCommitCount` events or `maxCommitWait`, 2 s by default) whether its `dedupe` is configured or not,
so two copies at once are stored once by any server.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

from openmeter_plugin.units import plural
from syncd.audit.books import leads_to
from syncd.config.settings import Config
from syncd.config.sources import may_be_empty
from syncd.core.errors import ApiError, ConfigError, GatewayError, SourceError, SyncdError, UnauthorizedError
from syncd.core.model import Principal
from syncd.doctor.checks import (
    GATE,
    Finding,
    Level,
    check_clock,
    check_empty,
    check_gate,
    check_gateway,
    check_meters,
    check_proxy,
)
from syncd.doctor.plugins import check_agreement
from syncd.doctor.subjects import ARRIVALS, check_arrivals
from syncd.gateways.client import Gateway
from syncd.metering.base import MeteringApi, Write
from syncd.runs.clock import Now, server_time, utc_now
from syncd.runs.factory import gateways_of, metering_endpoint, rules_of, sources_of, target_of
from syncd.runs.history import History
from syncd.sources.kong_admin import KongAdmin
from syncd.sources.konnect import KonnectApplications, KonnectConsumers
from syncd.state.database import State


def examine(config: Config, *, probe: Probe | None = None, now: Now = utc_now) -> Iterator[Finding]:
    """Run all checks, and the probe if there is one; yield findings as they are found."""
    read: dict[str, Sequence[Principal]] = {}
    answered: dict[str, int] = {}
    yield from _sources(config, read, answered)
    with closing(target_of(config)) as api:
        yield from _metering(api, config)
        yield from check_agreement(config, read)
        yield from _arrivals(api, config, read, sum(answered.values()))
        yield from _gateways(config)
        yield _clock(config, now)
        yield _state(config)
        yield from _schedule(config, now)
        if probe:
            yield probe.check(api)


def _sources(
    config: Config, read: dict[str, Sequence[Principal]], answered: dict[str, int]
) -> Iterator[Finding]:
    """Read the sources; add what is found to `read` and `answered`, by name of the source.

    `read` gets the principals, `answered` how many requests that Kong has answered.
    """
    for source in sources_of(config):
        if isinstance(source, KongAdmin | KonnectConsumers | KonnectApplications):
            yield check_proxy(source.name, source.endpoint)
        try:
            read[source.name] = source.read()
            expected = source.name in may_be_empty(config.sources)
            yield check_empty(source.name, len(read[source.name]), may_be_empty=expected)
            if isinstance(source, KongAdmin):
                yield from _status_of_kong(source, answered)
        except SourceError as error:
            yield Finding("source", Level.PROBLEM, str(error))


def _status_of_kong(source: KongAdmin, answered: dict[str, int]) -> Iterator[Finding]:
    number = source.requests_answered()
    answered[source.name] = number or 0
    if number is None:
        text = (
            f"{source.name}: its token may not read Kong's /status. Consumers are read all the same, but"
            " syncd cannot notice a Kong without a database that changes its configuration meanwhile"
        )
        yield Finding("source", Level.WARNING, text)


def _metering(api: MeteringApi, config: Config) -> Iterator[Finding]:
    yield check_proxy("metering API", metering_endpoint(config))
    try:
        customers = len(api.observe().customers)
    except ApiError as error:
        yield Finding("metering", Level.PROBLEM, str(error))
        return
    yield Finding("metering", Level.OK, f"{config.metering.url}: {plural(customers, 'customer')} can be read")
    yield from check_writes(api, config)
    try:
        meters = api.meters()
    except ApiError as error:
        yield Finding("meter", Level.PROBLEM, str(error))
    else:
        yield from check_meters(meters)


def check_writes(api: MeteringApi, config: Config) -> Iterator[Finding]:
    """Check that the token may write what syncd writes, by requests that change nothing either way."""
    allowed: list[str] = []
    for write in _needed(config):
        found = _permission(api, write)
        if found is None:
            allowed.append(write)
        elif found.text:
            yield found
    if allowed:
        yield Finding("permissions", Level.OK, f"the token may {', '.join(allowed)}")


def _needed(config: Config) -> Iterator[Write]:
    yield "create customers"
    yield "change customers"
    if config.policy == "sync" and config.policy_options.delete_after is not None:
        yield "delete customers"
    yield "write subjects"


def _permission(api: MeteringApi, write: Write) -> Finding | None:
    """Return a problem, None if the permission is granted; without text if it is not needed here."""
    try:
        trial = api.try_write(write)
    except UnauthorizedError as error:
        return Finding("permissions", Level.PROBLEM, f"the token may not {write}: {error}")
    except ApiError as error:
        text = f"cannot check whether the token may {write}: {error}"
        return Finding("permissions", Level.WARNING, text)
    if trial.outcome == "allowed":
        return None
    if trial.outcome == "accepted":
        text = f"the server accepted a customer without a name ({trial.said}). Check metering.url"
        return Finding("permissions", Level.PROBLEM, text)
    if write == "write subjects":  # not every server has subject entities
        return Finding("permissions", Level.OK, "")
    text = f"the server has no path to {write}. Check metering.dialect ({trial.said})"
    return Finding("permissions", Level.PROBLEM, text)


def _arrivals(
    api: MeteringApi, config: Config, read: Mapping[str, Sequence[Principal]], answered: int
) -> Iterator[Finding]:
    try:
        rules = rules_of(config)
    except ConfigError:
        return  # reported where plugins and consumers are compared
    try:
        events = api.latest_events()
    except ApiError as error:
        text = f"the latest events cannot be read, so their subjects are not compared: {error}"
        yield Finding(ARRIVALS, Level.WARNING, text)
        return
    principals = [principal for found in read.values() for principal in found]
    yield from check_arrivals(events, principals, rules, answered)


def _gateways(config: Config) -> Iterator[Finding]:
    for gateway in gateways_of(config):
        yield check_proxy(f"gateway {gateway.name}", gateway.endpoint)
        with closing(gateway):
            try:
                readiness, spool = gateway.readiness(), gateway.spool()
            except GatewayError as error:
                yield Finding("gateway", Level.PROBLEM, str(error))
                continue
            gate = list(_gate(gateway))
        hosts = gateway.config.metering_hosts
        leads_here = any(leads_to(part.endpoint, config.metering.url, hosts) for part in spool.destinations)
        problems = () if readiness.ready else readiness.problems or ("no reason given",)
        yield from check_gateway(gateway.name, problems, leads_here, spool)
        yield from gate


def _gate(gateway: Gateway) -> Iterator[Finding]:
    try:
        gate = gateway.gate()
    except GatewayError as error:
        yield Finding(GATE, Level.PROBLEM, str(error))
    else:
        if gate is not None:
            yield from check_gate(gateway.name, gate)


def _clock(config: Config, now: Now) -> Finding:
    try:
        before = now()
        server = server_time(metering_endpoint(config))
        middle = before + (now() - before) / 2
    except ApiError as error:
        return Finding("clock", Level.WARNING, f"the metering API's clock cannot be read: {error}")
    return check_clock(server, middle)


def _state(config: Config) -> Finding:
    try:
        with State(config.daemon.state) as state:
            last = next(iter(History(state).runs(1)), None)
    except SyncdError as error:
        return Finding("state", Level.PROBLEM, str(error))
    when = (
        f"the last run was requested at {last['requested_at'][:19].replace('T', ' ')} UTC"
        if last
        else "no run yet"
    )
    return Finding("state", Level.OK, f"{config.daemon.state} can be used; {when}")


def _schedule(config: Config, now: Now) -> Iterator[Finding]:
    if times := config.schedule.upcoming(now()):
        shown = ", ".join(f"{time:%a %d %b %Y %H:%M}" for time in times)
        yield Finding("schedule", Level.OK, f"the next runs of schedule.cron (UTC): {shown}")


PROBE_TYPE = "kong-openmeter.doctor"
"""The type of the events that the probe sends; no standard meter counts it."""
FLUSH_SECONDS = 6.0
_ARRIVAL_SECONDS = 60.0
_LOOK_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Probe:
    """`flush` is how long, in seconds, the sink may collect events before it stores them."""

    flush: float = FLUSH_SECONDS

    def check(self, api: MeteringApi) -> Finding:
        """Send the event, wait until it is stored, send it again after a flush, and count."""
        try:
            return self._finding(api)
        except ApiError as error:
            return Finding("deduplication", Level.PROBLEM, f"the probe failed: {error}")

    def _finding(self, api: MeteringApi) -> Finding:
        event = _probe_event()
        identity = str(event["id"])
        began = time.monotonic()
        api.send_event(event)
        if not _becomes(lambda: api.count_events(identity) > 0, _ARRIVAL_SECONDS):
            text = (
                f"the probe {identity} has not arrived after {_ARRIVAL_SECONDS:.0f} s. Check the sink worker"
            )
            return Finding("deduplication", Level.WARNING, text)
        arrival = time.monotonic() - began
        time.sleep(self.flush)
        api.send_event(event)
        # The second copy may take as long as the first, and a flush more.
        if _becomes(lambda: api.count_events(identity) > 1, arrival + self.flush):
            text = (
                "an event that was sent twice is stored twice, so every retry of a delivery is billed again."
                " Configure the sink's `dedupe` (not the ingest side's, which loses retried events)"
            )
            return Finding("deduplication", Level.PROBLEM, text)
        return Finding("deduplication", Level.OK, "an event that was sent twice is stored once")


def _probe_event() -> dict[str, object]:
    return {
        "specversion": "1.0",
        "id": f"doctor-{uuid.uuid4().hex}",
        "source": "syncd",
        "type": PROBE_TYPE,
        "subject": "syncd-doctor",
        "time": datetime.now(UTC).isoformat(),
    }


def _becomes(holds: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition becomes true in time; it is looked at once more at the end."""
    deadline = time.monotonic() + seconds
    while not holds():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(_LOOK_SECONDS, left))
    return True
