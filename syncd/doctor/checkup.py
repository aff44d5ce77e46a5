"""The checkup of ``syncd doctor``: reads all systems and runs all checks. Only `--probe` writes anything."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime

from syncd.audit.books import leads_to
from syncd.config.settings import Config
from syncd.core.errors import ApiError, GatewayError, SourceError, SyncdError
from syncd.core.model import Principal
from syncd.doctor.checks import Finding, Level, check_clock, check_empty, check_gateway, check_meters
from syncd.doctor.plugins import check_agreement
from syncd.doctor.writes import check_writes
from syncd.http.client import ApiClient
from syncd.http.retry import Retry
from syncd.metering.meters import MeterApi
from syncd.runs.clock import Now, server_time, utc_now
from syncd.runs.factory import gateways_of, metering_endpoint, sources_of, target_of
from syncd.runs.history import History

PROBE_TYPE = "kong-openmeter.doctor"
"""The type of the events that `--probe` sends; no standard meter counts it."""
PROBE_SECONDS = 60.0


def examine(config: Config, *, probe: bool = False, now: Now = utc_now) -> Iterator[Finding]:
    """Run all checks; yield findings as they are found."""
    read: dict[str, Sequence[Principal]] = {}
    yield from _sources(config, read)
    yield from _metering(config)
    yield from check_agreement(config, read)
    yield from _gateways(config)
    yield _clock(config, now)
    yield _state(config)
    if probe:
        yield _probe(config)


def _sources(config: Config, read: dict[str, Sequence[Principal]]) -> Iterator[Finding]:
    """Read the sources; add the principals of readable ones to `read`, by name of the source."""
    for source in sources_of(config):
        try:
            read[source.name] = source.read()
        except SourceError as error:
            yield Finding("source", Level.PROBLEM, str(error))
        else:
            yield check_empty(source.name, len(read[source.name]))


def _metering(config: Config) -> Iterator[Finding]:
    with closing(target_of(config)) as target:
        try:
            customers = len(target.observe().customers)
        except ApiError as error:
            yield Finding("metering", Level.PROBLEM, str(error))
            return
    yield Finding("metering", Level.OK, f"{config.metering.url}: {customers} customers can be read")
    with ApiClient(metering_endpoint(config), Retry(attempts=config.metering.attempts)) as client:
        yield from check_writes(client, config)
        try:
            meters = MeterApi(client, config.metering.dialect).meters()
        except ApiError as error:
            yield Finding("meter", Level.PROBLEM, str(error))
            return
    yield from check_meters({key: (meter.event_type, meter.aggregation) for key, meter in meters.items()})


def _gateways(config: Config) -> Iterator[Finding]:
    for gateway in gateways_of(config):
        with gateway:
            try:
                readiness, spool = gateway.readiness(), gateway.spool()
            except GatewayError as error:
                yield Finding("gateway", Level.PROBLEM, str(error))
                continue
        hosts = gateway.config.metering_hosts
        leads_here = any(leads_to(part.endpoint, config.metering.url, hosts) for part in spool.destinations)
        problems = () if readiness.ready else readiness.problems or ("no reason given",)
        yield check_gateway(gateway.name, problems, leads_here, spool.dead_letters)


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
        with closing(History(config.daemon.state_dir)) as history:
            last = next(iter(history.runs(1)), None)
    except SyncdError as error:
        return Finding("state", Level.PROBLEM, str(error))
    when = f"the last run was requested at {last['requested_at'][:19]}" if last else "no run yet"
    return Finding("state", Level.OK, f"{config.daemon.state_dir} is writable; {when}")


def _probe(config: Config) -> Finding:
    """Send one event twice and check how often it arrives; by default, servers do not deduplicate."""
    event_id = f"doctor-{uuid.uuid4().hex}"
    event = {"specversion": "1.0", "id": event_id, "source": "syncd", "type": PROBE_TYPE}
    event |= {"subject": "syncd-doctor", "time": datetime.now(UTC).isoformat()}
    endpoint = metering_endpoint(config)
    path = "/api/v1/events" if config.metering.dialect == "openmeter-v1" else "/openmeter/events"
    params = {"id" if config.metering.dialect == "openmeter-v1" else "filter[id][eq]": event_id}
    kind = "application/cloudevents+json"
    try:
        with ApiClient(endpoint, Retry(attempts=1)) as client:
            for _ in range(2):
                client.request("POST", path, body=event, content_type=kind)
            times = _arrived(lambda: client.get(path, params))
    except ApiError as error:
        return Finding("deduplication", Level.PROBLEM, f"the probe failed: {error}")
    if times == 0:
        text = f"the probe {event_id} has not arrived after {PROBE_SECONDS:.0f} s. Check the sink worker"
        return Finding("deduplication", Level.WARNING, text)
    if times > 1:
        text = (
            "an event that was sent twice is stored twice, so every retry of a delivery is billed again."
            " Configure the sink's `dedupe` (not the ingest side's, which loses retried events)"
        )
        return Finding("deduplication", Level.PROBLEM, text)
    return Finding("deduplication", Level.OK, "an event that was sent twice is stored once")


def _arrived(read: Callable[[], object]) -> int:
    """Return how often the probe has arrived: once it is there, wait a moment for a second copy."""
    deadline = time.monotonic() + PROBE_SECONDS
    while time.monotonic() < deadline:
        answer = read()
        found = answer.get("data") if isinstance(answer, dict) else answer
        if isinstance(found, list) and found:
            time.sleep(1)
            again = read()
            found = again.get("data") if isinstance(again, dict) else again
            return len(found) if isinstance(found, list) else 0
        time.sleep(0.25)
    return 0
