"""Events: delivered by the plugin, counted once, billed to whom the server bills, and audited."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from syncd.core.errors import RefusedError
from syncd.doctor.checks import Level
from syncd.doctor.checkup import Probe
from syncd.metering.meters import STANDARD_METERS
from syncd.metering.usage import REQUESTS_METER
from tests.conformity.stage import APPLIED, Stage, expect
from tests.harness.kong import KongWorker, PluginInstance
from tests.syncd.audits import HOUR, Site, recorded, site

_REQUESTS = 25
_HOUR = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - 2 * HOUR


def _event(stage: Stage, subject: str, **fields: object) -> dict[str, object]:
    return {
        "specversion": "1.0",
        "id": f"{stage.name}-{uuid.uuid4().hex}",
        "source": stage.name,
        "type": "kong.api_request",
        "subject": subject,
        "time": datetime.now(UTC).isoformat(),
        "data": {"request_method": "GET"},
        **fields,
    }


def _with_standard_meters(stage: Stage) -> None:
    """Have syncd create the standard meters that are missing; those are deleted at the end."""
    with stage.client() as api:
        before = api.meters()
        missing = [meter.key for meter in STANDARD_METERS if meter.key not in before]
        if missing:
            stage.syncd("meters", "apply", ends_with=(0, 3))
            stage.server.meters += [found.id or key for key, found in api.meters().items() if key in missing]


def usage_under_a_customers_id_belongs_to_whom_the_server_says(stage: Stage) -> None:
    _with_standard_meters(stage)
    [username] = stage.users("customer")
    stage.syncd("apply", "--yes", ends_with=APPLIED)
    identity = stage.customers()[username]["id"]
    since = datetime.now(UTC) - timedelta(minutes=5)
    with stage.client() as api:
        api.send_event(_event(stage, identity))
        api.send_event(_event(stage, username))

        def counted() -> bool:
            values = api.usage(REQUESTS_METER, since.replace(second=0, microsecond=0).isoformat(), None)
            return values.get(identity, 0) == values.get(username, 0) == 1

        stage.eventually(counted, "the events are not counted")
        begin = since.replace(second=0, microsecond=0).isoformat()
        servers = {each.subject for each in api.customer_usage(REQUESTS_METER, [identity], begin, None)}
    shown = json.loads(stage.syncd("usage", "--output=json", "--from", begin, ends_with=0).stdout)
    ours = {
        line["key"]
        for customer in shown["customers"]
        if customer["key"] == username
        for line in customer["subjects"]
        if line["requests"]
    }
    expect(ours == servers, f"syncd bills this customer for {ours}, the server for {servers}")


def doctor_tells_whether_doubles_are_stored(stage: Stage) -> None:
    stage.users("nobody")
    event = _event(stage, stage.named("double"), type=stage.name)
    twice: list[int] = []

    def by_hand() -> None:
        with stage.client() as api:
            api.send_event(event)
            stage.eventually(lambda: api.count_events(str(event["id"])), "the event did not arrive")
            time.sleep(stage.flush.total_seconds())
            api.send_event(event)
            time.sleep(2 * stage.flush.total_seconds())
            twice.append(api.count_events(str(event["id"])))

    thread = threading.Thread(target=by_hand)
    thread.start()
    with stage.client() as api:
        finding = Probe(stage.flush.total_seconds()).check(api)
    thread.join()
    expect(twice, "an event that was sent by hand did not arrive")
    wanted = Level.OK if twice == [1] else Level.PROBLEM
    expect(finding.level is wanted, f"stored {twice[0]} times by hand, but doctor says {finding.text}")


def a_source_that_is_no_uri_is_refused_at_the_start(stage: Stage) -> None:
    source = "10.0.0.1:8000"
    with stage.client() as api:
        try:
            api.send_event(_event(stage, stage.named("source"), type=stage.name, source=source))
        except RefusedError as error:
            expect(error.status == 400, f"the server refuses it with {error}")
        else:
            expect(False, f"the server takes the source {source}")
    with _gateway(stage) as gateway:
        plugin = PluginInstance(gateway.config | {"source": source})

        async def log() -> None:
            worker = KongWorker(gateway.server.socket)
            await worker.log(plugin, recorded(stage.named("source"), _HOUR))
            await worker.close()

        asyncio.run(log())
        unusable = [
            line for line in gateway.server.log_text().splitlines() if "configuration_unusable" in line
        ]
        expect(unusable and "source" in unusable[0], f"the plugin takes the source {source}")


@contextmanager
def _gateway(stage: Stage) -> Iterator[Site]:
    """Run a plugin server that delivers to the server under test."""
    with site(stage.folder, "gateway", stage.server.url) as running:
        running.config["ingest_endpoint"] = stage.server.events_url(stage.dialect)
        running.config["source"] = stage.name
        if stage.token:
            running.config["api_token"] = stage.token
        yield running


def a_batch_of_the_plugin_is_counted_audited_and_redelivered(stage: Stage) -> None:
    _with_standard_meters(stage)
    stage.users("nobody")
    consumer = stage.named("consumer")
    subject = f"consumer:{consumer}"
    period = {"since": _HOUR.isoformat(), "until": (_HOUR + HOUR).isoformat()}
    with _gateway(stage) as gateway, stage.client() as api:
        stage.configure(gateways=[gateway.settings])
        gateway.serve(consumer, _HOUR, _REQUESTS)

        def counted() -> float:
            return api.usage(REQUESTS_METER, **period).get(subject, 0)

        stage.eventually(lambda: counted() == _REQUESTS, f"not {_REQUESTS} requests are counted")
        differs = _audited(stage, subject)
        expect(not differs, f"the audit finds {differs}")
        with gateway.client() as plugin:
            asked = plugin.redeliver(_HOUR, _HOUR + HOUR, subject)
            stage.eventually(
                lambda: plugin.redelivery(asked.id).state == "done", "the redelivery does not end"
            )
        time.sleep(2 * stage.flush.total_seconds())
        if counted() == _REQUESTS:
            return
        # A server without deduplication: the audit must notice, and must not redeliver once more.
        [found] = _audited(stage, subject) or [{}]
        expect(found.get("surplus"), f"{counted():.0f} counted, {_REQUESTS} sent, but the audit says {found}")


def _audited(stage: Stage, subject: str) -> list[dict[str, Any]]:
    """Return the audit's differences of a subject."""
    span = ("--from", _HOUR.isoformat(), "--to", (_HOUR + HOUR).isoformat())
    result = stage.syncd("audit", *span, "--output=json", "--settle", "10", ends_with=(0, 2))
    return [each for each in json.loads(result.stdout)["differences"] if each["subject"] == subject]


SCENARIOS = (
    usage_under_a_customers_id_belongs_to_whom_the_server_says,
    doctor_tells_whether_doubles_are_stored,
    a_source_that_is_no_uri_is_refused_at_the_start,
    a_batch_of_the_plugin_is_counted_audited_and_redelivered,
)
