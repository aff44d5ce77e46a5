"""``syncd doctor``: is everything reachable, allowed, and of one mind? Reads only, but for `--probe`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import quote

import httpx
import yaml

from syncd.config import Config
from syncd.doctor_checks import (
    Finding,
    Level,
    Plugin,
    check_clock,
    check_empty,
    check_meters,
    check_plugins,
)
from syncd.errors import ApiError, SourceError, SyncdError
from syncd.history import History
from syncd.http import ApiClient, expect_list, expect_object
from syncd.retry import Retry
from syncd.source_config import DeclarativeFileSource, KongAdminSource
from syncd.wiring import kong_endpoint, metering_endpoint, sources_of, target_of

PROBE_TYPE = "kong-openmeter.doctor"
"""The type of the events that `--probe` sends; no meter of ours counts it."""
PROBE_SECONDS = 60.0

_PAGE = 1000


def examine(
    config: Config, *, probe: bool = False, now: Callable[[], datetime] | None = None
) -> Iterator[Finding]:
    """Yield what is found, as it is found."""
    moment = now or (lambda: datetime.now(UTC))
    yield from _sources(config)
    yield from _metering(config)
    yield from _plugins(config)
    yield _clock(config, moment)
    yield _state(config)
    if probe:
        yield _probe(config)


def _sources(config: Config) -> Iterator[Finding]:
    for source in sources_of(config):
        try:
            yield check_empty(source.name, len(source.read()))
        except SourceError as error:
            yield Finding("source", Level.PROBLEM, str(error))


def _metering(config: Config) -> Iterator[Finding]:
    with closing(target_of(config)) as target:
        try:
            customers = len(target.observe().customers)
        except ApiError as error:
            yield Finding("metering", Level.PROBLEM, str(error))
            return
    text = f"{config.metering.url}: {customers} customers can be read; writing is not tried"
    yield Finding("metering", Level.OK, text)
    try:
        with ApiClient(metering_endpoint(config), Retry(attempts=config.metering.attempts)) as client:
            yield from check_meters(_meters(client, config.metering.dialect))
    except ApiError as error:
        yield Finding("meter", Level.PROBLEM, str(error))


def _meters(client: ApiClient, dialect: str) -> dict[str, tuple[str, str]]:
    """Return the meters: key -> event type and aggregation."""
    if dialect == "openmeter-v1":
        listed = expect_list(client.get("/api/v1/meters"), "metering API", "/api/v1/meters")
        names = ("slug", "eventType", "aggregation")
    else:
        answer = client.get("/openmeter/meters", {"page[size]": _PAGE})
        page = expect_object(answer, "metering API", "/openmeter/meters")
        listed = expect_list(page.get("data"), "metering API", "data of /openmeter/meters")
        names = ("key", "event_type", "aggregation")
    meters = [expect_object(item, "metering API", "a meter") for item in listed]
    return {str(m.get(names[0])): (str(m.get(names[1])), str(m.get(names[2]))) for m in meters}


def _plugins(config: Config) -> Iterator[Finding]:
    plugins: list[Plugin] = []
    readable = False
    for index, source in enumerate(config.sources):
        try:
            match source:
                case KongAdminSource():
                    readable = True
                    plugins += _of_admin(source, index, config.metering.attempts)
                case DeclarativeFileSource():
                    readable = True
                    plugins += _of_file(source)
        except (ApiError, OSError, yaml.YAMLError) as error:
            yield Finding("plugin", Level.PROBLEM, f"sources[{index}]: its plugins cannot be read: {error}")
    if readable:
        yield from check_plugins(plugins, config.mapping.subject_field, config.metering.url)
    else:
        text = "no source tells which plugins Kong has; compare subject.field and ingest_endpoint by hand"
        yield Finding("plugin", Level.WARNING, text)


def _of_admin(source: KongAdminSource, index: int, attempts: int) -> Iterator[Plugin]:
    prefix = f"/{quote(source.workspace, safe='')}" if source.workspace else ""
    where = f"Kong at {source.url}"
    with ApiClient(kong_endpoint(source, index), Retry(attempts=attempts)) as client:
        offset: str | None = None
        while True:
            query: dict[str, str | int | list[str]] = {"size": _PAGE}
            if offset:
                query["offset"] = offset
            page = expect_object(client.get(f"{prefix}/plugins", query), where, "/plugins")
            data = page.get("data")
            for item in expect_list([] if data == {} else data, where, "data of /plugins"):
                yield _plugin(expect_object(item, where, "a plugin"), where)
            following = page.get("offset")
            if not isinstance(following, str) or following == offset:
                return
            offset = following


def _of_file(source: DeclarativeFileSource) -> Iterator[Plugin]:
    def walk(node: object) -> Iterator[Plugin]:
        if isinstance(node, dict):
            listed = node.get("plugins")
            for item in listed if isinstance(listed, list) else ():
                if isinstance(item, dict):
                    yield _plugin(item, str(source.path.name))
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    yield from walk(yaml.safe_load(source.path.read_bytes()))


def _plugin(item: dict[str, object], where: str) -> Plugin:
    config = item.get("config")
    enabled = item.get("enabled") is not False
    return Plugin(str(item.get("name")), enabled, config if isinstance(config, dict) else {}, where)


def _clock(config: Config, now: Callable[[], datetime]) -> Finding:
    endpoint = metering_endpoint(config)
    try:
        before = now()
        answer = httpx.get(endpoint.url, headers=endpoint.headers(), timeout=endpoint.timeout)
        middle = before + (now() - before) / 2
    except httpx.HTTPError as error:
        return Finding(
            "clock", Level.WARNING, f"the metering API's clock cannot be read: {type(error).__name__}"
        )
    try:
        server = parsedate_to_datetime(answer.headers.get("date", ""))
    except ValueError:
        return check_clock(None, middle)
    # The header has whole seconds: on average it is half a second behind.
    return check_clock(server + timedelta(milliseconds=500), middle)


def _state(config: Config) -> Finding:
    try:
        with closing(History(config.daemon.state_dir)) as history:
            last = next(iter(history.runs(1)), None)
    except SyncdError as error:
        return Finding("state", Level.PROBLEM, str(error))
    when = f"the last run was asked for at {last['requested_at'][:19]}" if last else "no run yet"
    return Finding("state", Level.OK, f"{config.daemon.state_dir} can be written; {when}")


def _probe(config: Config) -> Finding:
    """Send one event twice and see how often it is there; deduplication is off on a server as it comes."""
    event_id = f"doctor-{uuid.uuid4().hex}"
    event = {"specversion": "1.0", "id": event_id, "source": "syncd", "type": PROBE_TYPE}
    event |= {"subject": "syncd-doctor", "time": datetime.now(UTC).isoformat()}
    endpoint = metering_endpoint(config)
    path = "/api/v1/events" if config.metering.dialect == "openmeter-v1" else "/openmeter/events"
    params = {"id" if config.metering.dialect == "openmeter-v1" else "filter[id][eq]": event_id}
    headers = {**endpoint.headers(), "Content-Type": "application/cloudevents+json"}
    try:
        with httpx.Client(base_url=endpoint.url, headers=headers, timeout=endpoint.timeout) as client:
            for _ in range(2):
                client.post(path, json=event, headers=headers).raise_for_status()
            times = _arrived(lambda: client.get(path, params=params).raise_for_status().json())
    except httpx.HTTPError as error:
        return Finding("deduplication", Level.PROBLEM, f"the probe failed: {error}")
    if times == 0:
        text = f"the probe {event_id} has not arrived after {PROBE_SECONDS:.0f} s; is the sink working?"
        return Finding("deduplication", Level.WARNING, text)
    if times > 1:
        text = (
            "an event that was sent twice is there twice: every retry of a delivery is billed again."
            " Configure the sink's `dedupe` (not the ingest side's, which loses retried events)"
        )
        return Finding("deduplication", Level.PROBLEM, text)
    return Finding("deduplication", Level.OK, "an event that was sent twice is there once")


def _arrived(read: Callable[[], object]) -> int:
    """Return how often the probe is there once it has come, and has had a moment to come again."""
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
