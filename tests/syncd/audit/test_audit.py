"""`syncd audit` end to end, with real plugin servers and a real metering API; each test has its own hours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.kong_segments import Worker
from tests.harness.process import eventually
from tests.syncd.audits import (
    HOUR,
    TOKEN,
    Audited,
    audited,
    found,
    hours_ago,
    metering,
    site,
    span,
    subject_of,
)
from tests.syncd.processes import Result
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow

_hours = count(3, 2)
_ALICE, _BOB = subject_of("alice"), subject_of("bob")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    with audited(tmp_path_factory.mktemp("audit"), "east", "west") as running:
        yield running


@pytest.fixture
def hour(world: Audited) -> Iterator[datetime]:
    """An hour that no other test uses; the hour before it is unused too."""
    yield hours_ago(next(_hours))
    world.metering.clear_faults()


@pytest.mark.parametrize("dialect", ["openmeter-v1", "openmeter-v3"])
def test_lost_events_are_found_and_redelivered_and_the_next_audit_is_equal(
    world: Audited, hour: datetime, dialect: str
) -> None:
    world = replace(world, dialect=dialect)
    east, west = world.sites
    east.serve("alice", hour, 6)
    west.serve("alice", hour, 4)
    west.serve("bob", hour, 5)
    status, document, _ = world.audit(hour)
    assert (status, document["equal"], document["differences"]) == (0, True, [])
    assert [(one["delivered"], one["counted"]) for one in document["types"]] == [(15, 15)]

    world.metering.lose("alice", hour, 3)
    world.metering.lose("bob", hour, 5)
    status, document, _ = world.audit(hour)
    assert (status, found(document)) == (2, [(hour, _ALICE, 3, 0, 0), (hour, _BOB, 5, 0, 0)])

    arguments = ("audit", *span(hour), "--settle", "0", "--redeliver", "--wait")
    again = world.project().run(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{_ALICE}  10 delivered  7 counted  3 missing  east, west" in again.stdout
    assert f"{_BOB}  5 delivered  0 counted  5 missing  west" in again.stdout
    assert "Redelivered: 15 events in 3 spans." in again.stdout
    assert "1 of 1 hour compared: 8 missing." in again.stdout
    assert again.stdout.endswith("1 of 1 hour compared: equal.\n")

    assert world.audit(hour)[0] == 0


def test_a_redelivery_that_the_deduplication_drops_is_said_to_be_without_effect(
    world: Audited, hour: datetime
) -> None:
    """OpenMeter's sink drops an id that its Redis remembers, even if ClickHouse has lost the event."""
    east, west = world.sites
    east.serve("alice", hour, 6)
    west.serve("bob", hour, 5)
    world.metering.lose("alice", hour, 4)
    with world.metering.remembering_ids():
        status, document, _ = world.audit(hour, arguments=("--redeliver", "--wait"))
        assert (status, found(document)) == (2, [(hour, _ALICE, 4, 0, 0)])
        assert document["redelivered_without_effect"] == 4
        arguments = ("audit", *span(hour), "--settle", "0", "--redeliver", "--wait")
        shown = world.project().call(*arguments).stdout
    assert "Without effect: 4 redelivered events are still not counted." in shown
    assert "the deduplication of the metering API remembers their ids" in shown
    assert "Do not redeliver once it has forgotten them" in shown
    assert "the ids of the lost events, and no others" in shown
    assert "asks the gateways to redeliver" not in shown
    # Once the ids of the lost events have been deleted, and no others, the same command brings them back.
    status, document, _ = world.audit(hour, arguments=("--redeliver", "--wait"))
    assert (status, document["redelivered_without_effect"]) == (0, 0)
    assert world.audit(hour)[1]["redelivered_without_effect"] is None


def test_hours_that_the_deduplication_has_forgotten_are_not_redelivered_without_force(
    world: Audited, hour: datetime
) -> None:
    """The events that are still counted would be counted twice."""
    east, _ = world.sites
    recent = hours_ago(1)
    east.serve("alice", hour, 4)
    east.serve("bob", recent, 2)
    world.metering.lose("alice", hour, 1)
    world.metering.lose("bob", recent, 1)
    project = world.project(dedupe_expiration="3h")

    def redeliver(*arguments: str) -> tuple[Result, dict[str, Any]]:
        options = ("--settle", "0", "--redeliver", "--wait", "--output", "json", *arguments)
        ended = project.call("audit", *span(hour, recent), *options)
        return ended, json.loads(ended.stdout)

    ended, document = redeliver()
    assert ended.returncode == 1
    assert "1 missing event from before" in ended.stderr
    assert "(metering.dedupe_expiration)" in ended.stderr
    assert [(one["subject"], one["state"]) for one in document["redeliveries"]] == [(_BOB, "done")]
    assert (hour, _ALICE, 1, 0, 0) in found(document)
    assert _BOB not in [subject for _, subject, *_ in found(document)]
    _, document = redeliver("--force")
    assert _ALICE not in [subject for _, subject, *_ in found(document)]


def test_events_that_a_gateway_lost_on_its_disk_are_a_difference(tmp_path: Path) -> None:
    hour = hours_ago(2)
    with metering(tmp_path) as api:
        with site(tmp_path, "east", api.url) as east:
            east.serve("alice", hour, 2)
            api.fault(path="/api/v1/events", status=503)
            east.serve("alice", hour, 3, settled=False)
        (segment,) = (tmp_path / "east").glob("**/*.seg")
        whole = segment.read_bytes()
        segment.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        api.clear_faults()
        with site(tmp_path, "east", api.url) as east:
            with east.client() as gateway:
                lost = eventually(lambda: sum(gateway.spool().total.books.lost_events.values()), what="loss")
                eventually(lambda: gateway.spool().total.backlog == 0, what="delivery")
            audit = Audited(tmp_path, api, [east])
            status, document, _ = audit.audit(hour)
            shown = audit.project().call("audit", *span(hour), "--settle", "0").stdout
    assert status == 2
    assert [(one["subject"], one["lost"], one["missing"]) for one in document["differences"]] == [
        (_ALICE, lost, 0)
    ]
    assert f"{lost} lost on the gateway" in shown
    assert "Usage is lost" in shown


def test_a_dry_run_shows_redeliveries_without_requesting_them(world: Audited, hour: datetime) -> None:
    east, _ = world.sites
    east.serve("alice", hour, 3)
    world.metering.lose("alice", hour, 2)
    status, document, _ = world.audit(hour, arguments=("--redeliver", "--dry-run"))
    assert status == 2
    (planned,) = document["redeliveries"]
    assert (planned["gateway"], planned["subject"]) == ("east", _ALICE)
    assert (planned["state"], planned["missing"], planned["id"]) == ("planned", 2, None)
    status, document, _ = world.audit(hour)
    assert (status, found(document)) == (2, [(hour, _ALICE, 2, 0, 0)])


def test_without_wait_the_next_audit_shows_the_result_of_a_redelivery(world: Audited, hour: datetime) -> None:
    east, _ = world.sites
    east.serve("alice", hour, 3)
    world.metering.lose("alice", hour, 2)
    status, document, _ = world.audit(hour, arguments=("--redeliver",))
    assert status == 2
    (asked,) = document["redeliveries"]
    assert asked["id"] is not None
    result = world.project().call("audit", *span(hour), "--settle", "20")
    assert result.returncode == 0, result.stdout + result.stderr


def test_events_counted_twice_are_a_difference_and_stop_redeliveries(world: Audited, hour: datetime) -> None:
    east, _ = world.sites
    east.serve("alice", hour, 4)
    east.serve("bob", hour, 2)
    world.metering.count_twice("alice", hour, 3)
    world.metering.lose("bob", hour, 1)
    status, document, errors = world.audit(hour, arguments=("--redeliver", "--wait"))
    assert (status, found(document)) == (1, [(hour, _ALICE, 0, 0, 3), (hour, _BOB, 1, 0, 0)])
    assert "nothing was redelivered" in errors
    assert "syncd doctor --probe" in errors
    assert {one["state"] for one in document["redeliveries"]} == {"planned"}
    status, document, _ = world.audit(hour, arguments=("--redeliver", "--wait", "--force"))
    assert (status, found(document)) == (2, [(hour, _ALICE, 0, 0, 3)])


def test_events_of_no_listed_gateway_are_reported_as_never_sent(world: Audited, hour: datetime) -> None:
    east, west = world.sites
    east.serve("alice", hour, 2)
    west.serve("bob", hour, 3)
    project = replace(world, gateways=[east.settings]).project()
    result = project.call("audit", *span(hour))
    assert result.returncode == 2
    assert f"{_BOB}  0 delivered  3 counted  3 never sent\n" in result.stdout
    assert "by a gateway that is not listed" in result.stdout


def test_refused_events_are_reported_as_such_and_not_redelivered(world: Audited, hour: datetime) -> None:
    east, _ = world.sites
    east.serve("alice", hour, 2)
    refused = "refused-by-the-server"
    world.metering.fault(event_id=refused, status=400)
    east.serve("alice", hour, 1, request_id=refused)
    status, document, _ = world.audit(hour, arguments=("--redeliver", "--wait"))
    assert (status, found(document)) == (2, [(hour, _ALICE, 0, 1, 0)])
    assert document["redeliveries"] == []
    (difference,) = document["differences"]
    assert difference["gateways"] == [{"name": "east", "delivered": 2, "dead_lettered": 1, "lost": 0}]
    result = world.project().call("audit", *span(hour))
    assert "openmeter-plugin spool dead-letters" in result.stdout


def test_hours_with_waiting_events_are_left_out_and_the_others_compared(
    world: Audited, hour: datetime
) -> None:
    east, west = world.sites
    east.serve("alice", hour - HOUR, 3)
    world.metering.fault(path="/api/v1/events", method="POST", status=503)
    west.serve("bob", hour, 2, settled=False)
    project = world.project()
    result = project.call("audit", *span(hour - HOUR, hour))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Left out: {hour:%Y-%m-%d %H:00}: events of west are waiting." in result.stdout
    assert "1 of 2 hours compared: equal." in result.stdout
    only = project.call("audit", *span(hour))
    assert only.returncode == 1
    assert "no hour of the span could be compared" in only.stderr
    world.metering.clear_faults()
    west.settle()
    assert world.audit(hour - HOUR, hour)[0] == 0


def test_without_a_meter_that_counts_them_only_hours_without_any_tokens_are_found(
    world: Audited, hour: datetime
) -> None:
    east, _ = world.sites
    tokens = "kong.llm_request"
    httpx.delete(f"{world.metering.url}/api/v1/meters/kong_llm_events").raise_for_status()
    east.serve("alice", hour, 2, llm=True)
    east.serve("bob", hour, 1, llm=True)
    world.metering.lose("alice", hour, 3, tokens)
    world.metering.lose("bob", hour, 2, tokens)
    status, document, _ = world.audit(hour)
    assert (status, found(document)) == (2, [(hour, _BOB, 2, 0, 0)])
    assert [(one["type"], one["exact"]) for one in document["types"]] == [
        ("kong.api_request", True),
        (tokens, False),
    ]
    said = world.project().call("audit", *span(hour), "--settle", "0").stdout
    assert "compared only roughly: meter kong_llm_tokens does not count events" in said
    assert "`syncd meters apply` creates the meter" in said
    assert world.project().call("meters", "apply").returncode == 0
    status, document, _ = world.audit(hour)
    assert (status, found(document)) == (2, [(hour, _ALICE, 3, 0, 0), (hour, _BOB, 2, 0, 0)])
    assert [(one["meter"], one["exact"]) for one in document["types"]][1] == ("kong_llm_events", True)
    assert world.audit(hour, arguments=("--redeliver", "--wait"))[0] == 0


def test_one_missing_event_of_a_model_call_is_found_however_few_its_tokens(
    world: Audited, hour: datetime
) -> None:
    east, _ = world.sites
    east.serve("alice", hour, 5, llm=True)
    world.metering.lose("alice", hour, 1, "kong.llm_request")
    status, document, _ = world.audit(hour)
    assert (status, found(document)) == (2, [(hour, _ALICE, 1, 0, 0)])


def test_without_the_requests_meter_there_is_no_audit(world: Audited, hour: datetime) -> None:
    def without_meters(_: object) -> Answer:
        return Answer([])

    with serving(without_meters) as empty:
        project = world.project(url=empty.url)
        result = project.call("audit", *span(hour))
    assert result.returncode == 1
    assert "`syncd meters apply`" in result.stderr


def test_events_for_another_metering_api_are_left_out_with_a_message(
    world: Audited, hour: datetime, tmp_path: Path
) -> None:
    with audited(tmp_path / "other") as other, site(tmp_path, "north", world.metering.url) as north:
        north.serve("alice", hour, 2)
        north.serve("alice", hour, 7, ingest_endpoint=f"{other.metering.url}/api/v1/events")
        audit = replace(world, gateways=[north.settings])
        status, document, _ = audit.audit(hour)
        assert (status, document["equal"]) == (0, True)
        (elsewhere,) = document["destinations_left_out"]
        assert (elsewhere["endpoint"], elsewhere["events"]) == (f"{other.metering.url}/api/v1/events", 7)
        _ends_with_an_error_where_nothing_leads_here(audit, other, hour)


def _ends_with_an_error_where_nothing_leads_here(audit: Audited, other: Audited, hour: datetime) -> None:
    renamed = audit.metering.url.replace("127.0.0.1", "localhost")
    only = replace(audit, metering=replace(audit.metering, url=renamed))
    status, document, errors = only.audit(hour)
    assert (status, document["equal"]) == (1, False)
    assert "metering_hosts" in errors
    assert other.metering.url in errors
    named = [
        {**gateway, "metering_hosts": ["127.0.0.1:1", audit.metering.url[7:]]} for gateway in only.gateways
    ]
    status, document, _ = replace(only, gateways=named).audit(hour)
    assert (status, document["equal"], len(document["destinations_left_out"])) == (0, True, 1)


def test_requests_that_a_gateway_has_lost_are_named_as_in_no_ledger(
    world: Audited, hour: datetime, tmp_path: Path
) -> None:
    folder = tmp_path / "segments"
    with site(tmp_path, "lossy", world.metering.url, "--segments", str(folder)) as lossy:
        lossy.serve("alice", hour, 2)
        eventually((folder / "instances").is_dir, what="the folder")
        Worker(folder).lose(disk_full=3, no_folder=1)
        audit = replace(world, gateways=[lossy.settings])
        expected = {"lossy": {"disk_full": 3, "no_folder": 1}}
        eventually(lambda: audit.audit(hour)[1].get("requests_lost") == expected, what="the losses")
        status, document, _ = audit.audit(hour)
        assert (status, document["equal"]) == (0, True)
        shown = audit.project().call("audit", *span(hour), "--settle", "0").stdout
    assert "In no ledger: 4 requests that lossy has lost since its spool was created" in shown
    assert "(disk_full 3, no_folder 1)" in " ".join(shown.split())


def test_events_removed_by_the_retention_cannot_be_redelivered_and_are_reported(
    world: Audited, hour: datetime, tmp_path: Path
) -> None:
    with site(tmp_path, "south", world.metering.url) as south:
        south.serve("alice", hour, 4)
        world.metering.lose("alice", hour, 3)
    with site(tmp_path, "south", world.metering.url, "--retention", "0s") as south, south.client() as client:
        eventually(lambda: client.spool().total.bytes == 0, what="the end of the retention")
        project = replace(world, gateways=[south.settings]).project()
        arguments = ("audit", *span(hour), "--settle", "0", "--redeliver", "--wait")
        result = project.call(*arguments)
        assert result.returncode == 2
        assert "0 sent, 4 no longer retained" in result.stdout
        assert "cannot be redelivered" in result.stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "http://127.0.0.1:9"}, "`serve --api`"),
        ({"token": "not-the-right-token"}, "gateways[1].token"),
        ({"token": None}, "no token is set in gateways[1].token"),
    ],
)
def test_a_gateway_that_cannot_be_read_is_an_error_and_never_a_clean_audit(
    world: Audited, hour: datetime, change: dict[str, object], says: str
) -> None:
    east, west = world.sites
    east.serve("alice", hour, 1)
    gateways = [east.settings, {k: v for k, v in (west.settings | change).items() if v is not None}]
    status, document, errors = replace(world, gateways=gateways).audit(hour)
    assert (status, [*document]) == (1, ["error"])
    assert "gateway west" in errors
    assert says in errors
    assert TOKEN not in errors
    assert "not-the-right-token" not in errors


def _passed_on(gateway: str, asked: Asked) -> Answer:
    """The gateway's answer to a GET."""
    headers = {"authorization": asked.headers["authorization"]}
    found = httpx.get(f"{gateway}{asked.path}", params=asked.query, headers=headers)
    return Answer(found.content, status=found.status_code)


def test_an_hour_with_events_that_arrive_during_the_audit_is_left_out(world: Audited, hour: datetime) -> None:
    east, _ = world.sites
    east.serve("alice", hour, 2)
    readings: list[Asked] = []

    def one_comes_after_the_first_reading(asked: Asked) -> Answer:
        answer = _passed_on(east.url, asked)
        if asked.path == "/v1/ledger" and not readings:
            readings.append(asked)
            east.serve("alice", hour, 1)
        return answer

    with serving(one_comes_after_the_first_reading) as proxy:
        audit = replace(world, gateways=[east.settings | {"url": proxy.url}])
        status, document, errors = audit.audit(hour)
        assert (status, document["differences"]) == (1, [])
        (left_out,) = document["hours_left_out"]
        assert left_out["reasons"] == ["the ledger of east changed while it was read"]
        assert "Try again" in errors
        assert audit.audit(hour)[0] == 0


def _refuses_to_redeliver(gateway: str, asked: Asked) -> Answer:
    return Answer({"detail": "no"}, status=503) if asked.method == "POST" else _passed_on(gateway, asked)


def test_a_gateway_that_goes_away_before_its_redelivery_does_not_stop_the_others(
    world: Audited, hour: datetime, tmp_path: Path
) -> None:
    east, _ = world.sites
    east.serve("alice", hour, 2)
    with (
        site(tmp_path, "north", world.metering.url) as north,
        serving(partial(_refuses_to_redeliver, north.url)) as proxy,
    ):
        north.serve("bob", hour, 2)
        world.metering.lose("alice", hour, 1)
        world.metering.lose("bob", hour, 1)
        gateways = [north.settings | {"url": proxy.url}, east.settings]
        status, document, errors = replace(world, gateways=gateways).audit(
            hour, arguments=("--redeliver", "--wait")
        )
    assert status == 1
    assert "gateway north" in errors
    assert [(one["gateway"], one["state"]) for one in document["redeliveries"]] == [
        ("east", "done"),
        ("north", "failed"),
    ]
    assert found(document) == [(hour, _BOB, 1, 0, 0)]
