"""The plugin under stock kong-pdk, as a real process in both of its modes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.kong_msgpack import MsgPackKong
from tests.harness.process import eventually, takes_connections
from tests.harness.recordings import URI_CAPTURES, Recorded, application_request, llm_request, serialized

pytestmark = pytest.mark.slow

PLUGINS = Path(__file__).parents[3] / "plugin"


@pytest.fixture(params=[["-g"], []], ids=["gevent", "threads"])
def kong(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MsgPackKong]:
    with pluginserver(tmp_path, *request.param, spool=tmp_path / "spool") as connection:
        yield connection


@contextmanager
def pluginserver(tmp_path: Path, *mode: str, spool: Path) -> Iterator[MsgPackKong]:
    command = [str(Path(sys.executable).with_name("kong-python-pluginserver")), *mode]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "-d", str(PLUGINS), "-p", str(tmp_path), "--socket-name", "s"],
            stdout=log,
            stderr=log,
            env=os.environ | {"OPENMETER_PLUGIN_SPOOL": str(spool)},
        )
    try:
        # Stock kong-pdk has its socket in place before it listens.
        eventually(lambda: takes_connections(tmp_path / "s"), what="listening")
        connection = MsgPackKong(tmp_path / "s")
        yield connection
        connection.close()
    finally:
        process.kill()
        process.wait()


def test_no_file_of_the_spool_is_readable_by_others_whatever_the_umask(tmp_path: Path, sandbox: str) -> None:
    # Kong starts its plugin servers with none.
    before = os.umask(0)
    try:
        with pluginserver(tmp_path, "-g", spool=tmp_path / "not" / "there" / "spool") as kong:
            kong.log(kong.start(config(sandbox) | {"api_token": "t"}), serialized("authenticated"))
            arrived(sandbox, 1)
    finally:
        os.umask(before)
    found = [tmp_path / "not", *(tmp_path / "not").rglob("*")]
    assert {"queues", "books.db", "destination.json"} <= {path.name for path in found}
    assert [str(path) for path in found if path.stat().st_mode & 0o077] == []


def config(sandbox: str) -> dict[str, Any]:
    return {
        "ingest_endpoint": f"{sandbox}/api/v1/events",
        "queue": {"max_coalescing_delay": 0.05},
        "__plugin_id": "p",
    }


def arrived(sandbox: str, count: int) -> list[dict[str, Any]]:
    def events() -> list[dict[str, Any]]:
        return [item["event"] for item in httpx.get(f"{sandbox}/api/v1/events").json()]

    return eventually(lambda: found if len(found := events()) >= count else [], what=f"{count} events")


def test_requests_become_the_same_events_as_with_our_own_server(kong: MsgPackKong, sandbox: str) -> None:
    instance = kong.start(config(sandbox))
    for request in (
        serialized("authenticated"),
        application_request(),
        llm_request(),
        serialized("401-no-key"),
    ):
        kong.log(instance, request)
    events = arrived(sandbox, 5)
    by_id = {event["id"]: event for event in events}
    llm = llm_request().parsed["request"]["id"]
    assert by_id[f"{llm}:proxy:output"]["data"]["tokens"] == 30
    application = by_id[application_request().parsed["request"]["id"]]
    assert application["subject"] == "app:b15e2460-ba40-431d-9df0-4957fcffacda"
    assert len(events) == 5


def test_path_captures_are_queried_if_they_are_configured(kong: MsgPackKong, sandbox: str) -> None:
    capture = {"source": "path_capture", "look_up_value_in": "city", "event_property_name": "city"}
    instance = kong.start(config(sandbox) | {"attributes": [capture]})
    asked = kong.log(instance, replace(serialized("authenticated"), captures=URI_CAPTURES))
    assert asked == ["kong.log.serialize", "kong.request.get_uri_captures"]
    (event,) = arrived(sandbox, 1)
    assert event["data"]["city"] == "paris"


def test_a_record_that_cannot_be_read_does_not_hang_the_server(kong: MsgPackKong, sandbox: str) -> None:
    instance = kong.start(config(sandbox))
    kong.log(instance, Recorded("bad", b"{"))
    kong.log(instance, Recorded("bad", b"[]"))
    kong.log(instance, serialized("authenticated"))
    assert len(arrived(sandbox, 1)) == 1


def test_an_invalid_configuration_does_not_hang_the_server(
    kong: MsgPackKong, sandbox: str, tmp_path: Path
) -> None:
    broken = kong.start({"ingest_endpoint": "nonsense"})
    kong.log(broken, serialized("authenticated"))
    kong.log(kong.start(config(sandbox)), serialized("authenticated"))
    assert len(arrived(sandbox, 1)) == 1
    assert list((tmp_path / "spool").glob("queues/quarantine/*.seg"))


def test_delivery_goes_on_when_the_connection_that_started_it_is_gone(
    kong: MsgPackKong, sandbox: str, tmp_path: Path
) -> None:
    instance = kong.start(config(sandbox))
    kong.log(instance, serialized("authenticated"))
    arrived(sandbox, 1)
    kong.close()
    again = MsgPackKong(tmp_path / "s")
    again.log(instance, serialized("post-body"))
    assert len(arrived(sandbox, 2)) == 2
    again.close()
