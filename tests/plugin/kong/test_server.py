"""`openmeter-plugin serve` as a real process, driven over its socket as Kong drives it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from openmeter_plugin.kong import codec
from openmeter_plugin.metering.quarantine import replay_record
from openmeter_plugin.metering.rules import Rules
from openmeter_plugin.spool.destination import QUARANTINE
from openmeter_plugin.spool.segment import QUARANTINED
from syncd.sandbox.testing import running_sandbox
from tests.harness.kong import KongWorker, PluginInstance, drive
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.harness.recordings import (
    SECRETS,
    URI_CAPTURES,
    Recorded,
    all_serialized,
    application_request,
    llm_request,
    protobuf_requests,
    serialized,
)
from tests.plugin.spools import payloads

pytestmark = pytest.mark.slow

TOKEN = "token-of-this-test"
ALICE = "consumer:b32379d9-3d28-5683-a79c-72139be6e34f"


@pytest.fixture
def sandbox() -> Iterator[str]:
    with running_sandbox(token=TOKEN) as url:
        yield url


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PluginServer]:
    with plugin_server(tmp_path) as running:
        yield running


def configuration(sandbox: str, **changes: object) -> PluginInstance:
    config: dict[str, object] = {
        "ingest_endpoint": f"{sandbox}/api/v1/events",
        "api_token": TOKEN,
        "queue": {"max_coalescing_delay": 0.05},
        "__plugin_id": "5f0bb2f8-94ff-4ad2-8f83-9e9a1b5a3f01",
        "__seq__": 8,
    }
    return PluginInstance(config | changes)


def hand_over(server: PluginServer, plugin: PluginInstance, *requests: Recorded) -> KongWorker:
    """Have Kong hand the requests over, one after the other, and return its worker for the tally."""

    async def run() -> KongWorker:
        worker = KongWorker(server.socket)
        await drive(worker, [(plugin, request, request.name) for request in requests], concurrency=1)
        await worker.close()
        return worker

    return asyncio.run(run())


def stats(sandbox: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(
        f"{sandbox}/sandbox/v1/stats", headers={"authorization": f"Bearer {TOKEN}"}
    ).json()
    return answer


def arrived(sandbox: str, count: int) -> list[dict[str, Any]]:
    """Return the events in the metering API once there are `count`."""
    eventually(lambda: stats(sandbox)["events_stored"] >= count, what=f"the arrival of {count} events")
    answer = httpx.get(
        f"{sandbox}/api/v1/events", params={"limit": 100}, headers={"authorization": f"Bearer {TOKEN}"}
    )
    return [item["event"] for item in answer.json()]


def skipped(server: PluginServer) -> dict[str, int]:
    """Return the counts of skipped requests by reason, from delivery's books."""
    from tests.harness.books import read_counts

    counts: dict[str, int] = {}
    for queue in read_counts(server.spool).values():
        for (name, reason), value in queue.items():
            if name == "skipped":
                counts[reason] = counts.get(reason, 0) + value
    return counts


def spool_bytes(server: PluginServer) -> bytes:
    """Return everything in the spool except the token files, which have to hold the token."""
    return b"".join(
        path.read_bytes() for path in server.spool.rglob("*") if path.is_file() and "tokens" not in path.parts
    )


def test_every_recorded_request_becomes_its_events_or_is_counted_by_reason(
    server: PluginServer, sandbox: str
) -> None:
    recordings = all_serialized()
    worker = hand_over(server, configuration(sandbox), *recordings)
    assert len(worker.tally.acknowledged) == len(recordings)
    metered = [r for r in recordings if "consumer" in r.parsed and r.name != "anonymous-consumer"]
    events = arrived(sandbox, len(metered))
    assert {e["id"] for e in events} == {r.parsed["request"]["id"] for r in metered}
    assert {e["subject"] for e in events} == {ALICE}
    others = len(recordings) - len(metered) - 1
    eventually(lambda: skipped(server) == {"no_consumer": others, "anonymous_consumer": 1}, what="the books")


def test_the_requests_in_the_recorded_frames_become_their_events(server: PluginServer, sandbox: str) -> None:
    hand_over(server, configuration(sandbox), *protobuf_requests())
    events = arrived(sandbox, 7)
    llm = llm_request().parsed["request"]["id"]
    assert {e["id"] for e in events if e["type"] == "kong.llm_request"} == {
        f"{llm}:proxy:input",
        f"{llm}:proxy:output",
    }
    applications = [e["subject"] for e in events if not e["subject"].startswith("consumer:")]
    assert applications == ["app:b15e2460-ba40-431d-9df0-4957fcffacda"]


def test_the_application_is_queried_only_if_there_is_no_consumer(server: PluginServer, sandbox: str) -> None:
    async def queries(request: Recorded) -> list[bytes]:
        reader, writer = await asyncio.open_unix_connection(str(server.socket))
        plugin = configuration(sandbox)
        kong = KongWorker(server.socket)
        await kong.start(plugin)
        await kong.close()
        assert plugin.instance_id is not None
        event = codec.encode_bytes(2, b"log") + b"\x08" + codec.encode_varint(plugin.instance_id)
        writer.write(codec.frame(b"\x08\x01" + codec.encode_bytes(36, event)))
        asked = []
        while method := await _frame(reader):
            asked.append(method)
            await _frame(reader)
            answer = request.application if b"ctx" in method else codec.encode_bytes(1, request.log)
            writer.write(codec.frame(answer))
        writer.close()
        return asked

    assert asyncio.run(queries(serialized("authenticated"))) == [b"kong.log.serialize"]
    assert asyncio.run(queries(application_request())) == [b"kong.log.serialize", b"kong.ctx.shared.get"]


async def _frame(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("<I", await reader.readexactly(4))
    return await reader.readexactly(length)


CAPTURING = {
    "attributes": [
        {"source": "path_capture", "look_up_value_in": "city", "event_property_name": "city"},
        {"source": "constant", "value": "eu", "event_property_name": "region"},
    ]
}


def test_path_captures_are_queried_if_they_are_configured_and_are_in_the_event(
    server: PluginServer, sandbox: str
) -> None:
    request = replace(serialized("authenticated"), captures=URI_CAPTURES)
    worker = hand_over(server, configuration(sandbox, **CAPTURING), request)
    assert worker.tally.acknowledged == ["authenticated"]
    (event,) = arrived(sandbox, 1)
    assert (event["data"]["city"], event["data"]["region"]) == ("paris", "eu")


def test_the_application_and_the_captures_are_queried_one_after_the_other(
    server: PluginServer, sandbox: str
) -> None:
    request = replace(application_request(), captures=URI_CAPTURES)
    hand_over(server, configuration(sandbox, **CAPTURING), request)
    (event,) = arrived(sandbox, 1)
    assert event["subject"] == "app:b15e2460-ba40-431d-9df0-4957fcffacda"
    assert event["data"]["city"] == "paris"


@pytest.mark.parametrize("answer", [b"", b"\xff", b"\x12\x03\x0a\x04c", b"\x10\x01"])
def test_an_answer_without_captures_changes_nothing_else_in_the_event(
    server: PluginServer, sandbox: str, answer: bytes
) -> None:
    request = replace(serialized("authenticated"), captures=answer)
    assert hand_over(server, configuration(sandbox, **CAPTURING), request).tally.acknowledged
    (event,) = arrived(sandbox, 1)
    assert "city" not in event["data"]
    assert event["data"]["region"] == "eu"


def test_a_request_is_metered_even_if_kong_fails_over_a_query(server: PluginServer, sandbox: str) -> None:
    # Kong 3.9 with router_flavor = traditional, for a named capture that took no part in the match.
    request = replace(serialized("authenticated"), captures=None)
    plugin = configuration(sandbox, **CAPTURING)
    worker = hand_over(server, plugin, request, serialized("post-body"))
    assert worker.tally.lost == ["authenticated"]
    events = {event["id"]: event for event in arrived(sandbox, 2)}
    assert "city" not in events[request.parsed["request"]["id"]]["data"]
    assert len(events) == 2


def test_a_request_without_a_subject_is_quarantined_and_can_be_replayed(
    server: PluginServer, sandbox: str
) -> None:
    plugin = configuration(
        sandbox,
        subject={"look_up_value_in": "consumer", "field": "custom_id", "missing": "quarantine"},
        **CAPTURING,
    )
    request = replace(llm_request(), captures=URI_CAPTURES)  # of bob, who has no custom_id
    worker = hand_over(server, plugin, request, serialized("authenticated"))
    assert worker.tally.acknowledged == [request.name, "authenticated"]
    assert [event["subject"] for event in arrived(sandbox, 1)] == ["cust-alice-001"]
    (payload,) = payloads(server.spool, QUARANTINE)
    record = json.loads(payload.removeprefix(QUARANTINED))
    assert record["reason"] == "consumer_without_field"
    assert record["attributes"] == {"city": "paris", "region": "eu"}
    made = replay_record(record, Rules(source="kong"))
    assert isinstance(made, list)
    assert [event["data"].get("tokens") for event in made] == [None, 12, 30]
    assert {event["data"]["city"] for event in made} == {"paris"}


def test_no_secret_reaches_the_events_the_spool_or_the_log(server: PluginServer, sandbox: str) -> None:
    unusable = PluginInstance({"ingest_endpoint": "not a url", "api_token": TOKEN})
    requests = [*all_serialized(), *protobuf_requests()]
    hand_over(server, configuration(sandbox), *requests)
    hand_over(server, unusable, *requests)
    written = spool_bytes(server)
    events = json.dumps(arrived(sandbox, 10)).encode()
    server.stop()
    everything = written + events + spool_bytes(server) + server.log_text().encode()
    assert ALICE.encode() in everything
    for secret in (*SECRETS, TOKEN):
        assert secret.encode() not in everything, secret
        assert json.dumps(secret)[1:-1].encode() not in everything, secret


def test_an_event_for_an_unknown_instance_closes_its_connection_and_no_other(
    server: PluginServer, sandbox: str
) -> None:
    known = configuration(sandbox, source="another")
    with _connect(server) as other:
        other.sendall(_start(known))
        assert other.recv(4096)
        stale = configuration(sandbox, source="ours")
        stale.instance_id = 4711
        worker = hand_over(server, stale, serialized("authenticated"))
        assert worker.tally.resent == 1
        assert stale.instance_id != 4711
        other.sendall(_start(known))
        assert other.recv(4096)
    assert [event["source"] for event in arrived(sandbox, 1)] == ["ours"]


def test_instance_ids_are_not_reused_by_the_next_process(tmp_path: Path, sandbox: str) -> None:
    given: list[int] = []
    for _ in range(3):
        with plugin_server(tmp_path) as server:
            for _ in range(3):
                plugin = configuration(sandbox)
                hand_over(server, plugin, serialized("authenticated"))
                assert plugin.instance_id is not None
                given.append(plugin.instance_id)
            server.stop()
    assert len(set(given)) == len(given)


@pytest.mark.parametrize(
    "config",
    [
        b"not json",
        b"[]",
        b'{"ingest_endpoint": 5}',
        b'{"ingest_endpoint": "http://h/e", "subject": {"look_up_value_in": "header", "field": "Cookie"}}',
    ],
)
def test_requests_under_an_invalid_configuration_are_quarantined_with_the_reason(
    server: PluginServer, config: bytes
) -> None:
    class Raw(PluginInstance):
        def encoded(self) -> bytes:
            return config

    worker = hand_over(server, Raw({}), serialized("authenticated"), application_request())
    assert len(worker.tally.acknowledged) == 2
    assert "configuration_unusable" in server.log_text()
    quarantined = spool_bytes(server)
    assert b'"reason"' in quarantined
    assert b"b15e2460-ba40-431d-9df0-4957fcffacda" in quarantined
    assert serialized("authenticated").parsed["request"]["id"].encode() in quarantined


@pytest.mark.parametrize("log", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"request": ' * 2000])
def test_a_bad_record_is_answered_and_counted(server: PluginServer, sandbox: str, log: bytes) -> None:
    worker = hand_over(
        server,
        configuration(sandbox),
        Recorded("bad", log),
        serialized("authenticated"),
        Recorded("bad", log),
    )
    assert worker.tally.acknowledged == ["bad", "authenticated", "bad"]
    assert worker.tally.resent == 0
    assert len(arrived(sandbox, 1)) == 1
    eventually(lambda: skipped(server) == {"bad_record": 2}, what="the books")


@pytest.mark.parametrize(
    "stream",
    [
        codec.frame(b"\x08\x01\xaa\x02\x00"),  # RPC 37, which does not exist
        codec.frame(b"\x08\x01"),
        codec.frame(b"\xff" * 20),
        struct.pack("<I", 64 * 1024 * 1024 + 1) + b"x",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=["unknown RPC", "no RPC", "no message", "a frame over 64 MiB", "HTTP"],
)
def test_a_stream_that_is_not_the_protocol_ends_its_connection_only(
    server: PluginServer, sandbox: str, stream: bytes
) -> None:
    with _connect(server) as bad:
        bad.sendall(stream)
        assert bad.recv(1) == b""
    assert hand_over(server, configuration(sandbox), serialized("authenticated")).tally.acknowledged


def test_a_torn_frame_does_not_delay_others(server: PluginServer, sandbox: str) -> None:
    with _connect(server) as torn:
        torn.sendall(struct.pack("<I", 1000) + b"only a part")
        assert hand_over(server, configuration(sandbox), serialized("authenticated")).tally.acknowledged


def test_a_large_record_that_comes_in_pieces_is_metered(server: PluginServer, sandbox: str) -> None:
    log = serialized("authenticated").parsed
    log["request"]["headers"]["x-large"] = "x" * (20 * 1024 * 1024)
    large = Recorded("large", json.dumps(log).encode())
    assert hand_over(server, configuration(sandbox), large).tally.acknowledged == ["large"]
    assert len(arrived(sandbox, 1)) == 1


def test_stopping_answers_calls_under_way_and_removes_the_socket(server: PluginServer, sandbox: str) -> None:
    hand_over(server, configuration(sandbox), serialized("authenticated"))
    assert server.stop(signal.SIGTERM) == 0
    assert not server.socket.exists()


def test_a_second_generation_takes_the_socket_over_and_the_first_leaves_it_alone(
    tmp_path: Path, sandbox: str
) -> None:
    with plugin_server(tmp_path) as old:
        before = old.socket.stat().st_ino
        with plugin_server(tmp_path) as new:
            eventually(lambda: new.socket.stat().st_ino != before, what="the takeover")
            assert old.stop() == 0
            assert hand_over(new, configuration(sandbox), serialized("authenticated")).tally.acknowledged
            assert len(arrived(sandbox, 1)) == 1


def test_two_generations_on_one_spool_send_no_event_twice(tmp_path: Path, sandbox: str) -> None:
    names = [f"{n:032x}" for n in range(200)]
    with plugin_server(tmp_path) as old, plugin_server(tmp_path) as new:
        hand_over(new, configuration(sandbox), *(_with_id(name) for name in names[:100]))
        old.stop()
        hand_over(new, configuration(sandbox), *(_with_id(name) for name in names[100:]))
        eventually(lambda: stats(sandbox)["events_stored"] == 200, what="the arrival")
    assert stats(sandbox)["duplicates_received"] == 0


def test_a_backlog_drains_after_a_restart_without_a_request(tmp_path: Path) -> None:
    with running_sandbox(token=TOKEN) as first:
        port = int(first.rpartition(":")[2])
    with plugin_server(tmp_path) as server:
        hand_over(server, configuration(first), serialized("authenticated"))
        server.stop()
    with running_sandbox(port=port, token=TOKEN) as second, plugin_server(tmp_path):
        assert len(arrived(second, 1)) == 1


def _with_id(request_id: str) -> Recorded:
    log = serialized("authenticated").parsed
    log["request"]["id"] = request_id
    return Recorded(request_id, json.dumps(log).encode())


def _connect(server: PluginServer) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(10)
    connection.connect(str(server.socket))
    return connection


def _start(plugin: PluginInstance) -> bytes:
    body = codec.encode_bytes(1, b"openmeter") + codec.encode_bytes(2, plugin.encoded())
    return codec.frame(b"\x08\x01" + codec.encode_bytes(33, body))
