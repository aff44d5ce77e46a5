"""Recorded requests of a real Kong: the exact events or skip reason of each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from openmeter_plugin.kong import codec
from openmeter_plugin.metering.kong_log import NOT_QUERIED
from openmeter_plugin.metering.rules import Lookup, SkipReason
from tests.harness.recordings import (
    SECRETS,
    WIRE,
    all_serialized,
    application_request,
    llm_request,
    protobuf_requests,
    serialized,
)
from tests.plugin.outcomes import (
    ALICE,
    APPLICATION,
    BOB,
    CONTEXT,
    ECHO_ROUTE,
    Log,
    events,
    looking,
    only,
    result,
)


def test_an_authenticated_request_becomes_exactly_this_event() -> None:
    assert result(serialized("authenticated").parsed, NOT_QUERIED) == [
        {
            "specversion": "1.0",
            "id": "9ec5b3159fe16f1be3fabe698d170a33",
            "source": "kong-test",
            "type": "kong.api_request",
            "subject": "consumer:b32379d9-3d28-5683-a79c-72139be6e34f",
            "time": "2026-11-22T05:49:03.779Z",
            "data": {
                "request_method": "GET",
                "status": 200,
                "response_source": "upstream",
                "request_bytes": 122,
                "response_bytes": 364,
                "latency_ms": 1,
                "upstream_latency_ms": 0,
                "route_name": "echo",
                "route_id": "bf3c18fd-347d-5497-8230-0441f2ad7a65",
                "service_name": "echo",
                "service_id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
                "consumer_id": "b32379d9-3d28-5683-a79c-72139be6e34f",
                "consumer_username": "alice",
                "workspace": "default",
            },
        }
    ]


def test_a_dev_portal_applications_request_becomes_exactly_this_event() -> None:
    assert result(application_request().parsed, CONTEXT) == [
        {
            "specversion": "1.0",
            "id": "d3cc434b207b105c3d59a32b2a26fa25",
            "source": "kong-test",
            "type": "kong.api_request",
            "subject": "app:b15e2460-ba40-431d-9df0-4957fcffacda",
            "time": "2026-11-22T06:08:42.820Z",
            "data": {
                "request_method": "GET",
                "status": 200,
                "response_source": "upstream",
                "request_bytes": 82,
                "response_bytes": 364,
                "latency_ms": 1,
                "upstream_latency_ms": 0,
                "route_name": "app",
                "route_id": "cdb182a0-642c-5cdd-bb23-f6f02010ac40",
                "service_name": "echo",
                "service_id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
                "application_id": "b15e2460-ba40-431d-9df0-4957fcffacda",
                "workspace": "default",
            },
        }
    ]


def test_an_llm_request_becomes_exactly_these_three_events() -> None:
    common = {
        "route_name": "llm",
        "route_id": "54d1da7e-393a-5e4d-ac79-8c5813b28376",
        "service_name": "echo",
        "service_id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
        "consumer_id": "def4f7d3-9863-5ad2-8fa9-c949bf26f55e",
        "consumer_username": "bob",
        "workspace": "default",
    }
    head = {
        "specversion": "1.0",
        "source": "kong-test",
        "subject": "consumer:def4f7d3-9863-5ad2-8fa9-c949bf26f55e",
        "time": "2026-11-22T06:08:42.837Z",
    }
    assert result(llm_request().parsed) == [
        head
        | {
            "id": "e6eeb3450e36313e6682b20afcf79933",
            "type": "kong.api_request",
            "data": {
                "request_method": "POST",
                "status": 200,
                "response_source": "upstream",
                "request_bytes": 158,
                "response_bytes": 364,
                "latency_ms": 2,
                "upstream_latency_ms": 0,
            }
            | common,
        },
        head
        | {
            "id": "e6eeb3450e36313e6682b20afcf79933:proxy:input",
            "type": "kong.llm_request",
            "data": {"tokens": 12, "type": "input", "model": "gpt-4o", "provider": "openai"} | common,
        },
        head
        | {
            "id": "e6eeb3450e36313e6682b20afcf79933:proxy:output",
            "type": "kong.llm_request",
            "data": {"tokens": 30, "type": "output", "model": "gpt-4o", "provider": "openai"} | common,
        },
    ]


def test_a_request_whose_upstream_is_down_becomes_exactly_this_event() -> None:
    assert result(serialized("502-upstream-down").parsed) == [
        {
            "specversion": "1.0",
            "id": "f745ba3bc020866a88b724448b9bb766",
            "source": "kong-test",
            "type": "kong.api_request",
            "subject": "consumer:b32379d9-3d28-5683-a79c-72139be6e34f",
            "time": "2026-11-22T05:49:10.017Z",
            "data": {
                "request_method": "GET",
                "status": 502,
                "response_source": "kong",
                "request_bytes": 103,
                "response_bytes": 430,
                "latency_ms": 4,
                "upstream_latency_ms": 3,
                "route_name": "broken",
                "route_id": "329a3d76-454b-52d4-83e3-bf6c67347d20",
                "service_name": "broken",
                "service_id": "c3988193-acc9-5694-8c24-6e6c9cd2b8e7",
                "consumer_id": "b32379d9-3d28-5683-a79c-72139be6e34f",
                "consumer_username": "alice",
                "workspace": "default",
            },
        }
    ]


def test_a_stream_of_server_sent_events_becomes_exactly_this_event() -> None:
    assert result(serialized("stream-sse").parsed) == [
        {
            "specversion": "1.0",
            "id": "7cd4f559d1f159214086556bb016120d",
            "source": "kong-test",
            "type": "kong.api_request",
            "subject": "consumer:b32379d9-3d28-5683-a79c-72139be6e34f",
            "time": "2026-11-22T05:49:18.384Z",
            "data": {
                "request_method": "GET",
                "status": 200,
                "response_source": "upstream",
                "request_bytes": 108,
                "response_bytes": 335,
                "latency_ms": 1002,
                "upstream_latency_ms": 1,
                "route_name": "echo",
                "route_id": "bf3c18fd-347d-5497-8230-0441f2ad7a65",
                "service_name": "echo",
                "service_id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
                "consumer_id": "b32379d9-3d28-5683-a79c-72139be6e34f",
                "consumer_username": "alice",
                "workspace": "default",
            },
        }
    ]


def alices(request_id: str, time: str, **data: object) -> dict[str, Any]:
    """Return an event of alice on the route echo, with these particulars."""
    return {
        "specversion": "1.0",
        "id": request_id,
        "source": "kong-test",
        "type": "kong.api_request",
        "subject": f"consumer:{ALICE}",
        "time": time,
        "data": {
            "request_method": "GET",
            "status": 200,
            "response_source": "upstream",
            "route_name": "echo",
            "route_id": ECHO_ROUTE,
            "service_name": "echo",
            "service_id": "adbd70b3-4224-5183-a52a-179d7b34ab5b",
            "consumer_id": ALICE,
            "consumer_username": "alice",
            "workspace": "default",
        }
        | data,
    }


def measured(request: int, response: int, latency: int, upstream: int) -> dict[str, int]:
    return {
        "request_bytes": request,
        "response_bytes": response,
        "latency_ms": latency,
        "upstream_latency_ms": upstream,
    }


GRPC = {
    "request_method": "POST",
    "route_name": "g",
    "route_id": "42fcc287-3b0a-5aff-a457-384af985ca78",
    "service_name": "g",
    "service_id": "0bab3f37-a009-5848-9167-5b2fc497727a",
}

OTHERS_OF_ALICE = {
    "gzip": alices(
        "e19ae2588f65364f22eb984d5d6fd832", "2026-11-22T05:49:53.132Z", **measured(143, 366, 1, 1)
    ),
    "head": alices(
        "bda4e348bcb36f6f493a355db4ea9d04",
        "2026-11-22T05:49:17.348Z",
        **measured(102, 279, 1, 0),
        request_method="HEAD",
    ),
    "post-body": alices(
        "b8f4f42c47a5fa1113bf9c3c895d8049",
        "2026-11-22T05:49:13.148Z",
        **measured(5155, 5300, 1, 1),
        request_method="POST",
    ),
    "post-body-3MB": alices(
        "a6382f651da7776a7809503db1d2cd5b",
        "2026-11-22T05:49:14.203Z",
        **measured(3000180, 3003531, 23, 10),
        request_method="POST",
    ),
    "upstream-404": alices(
        "5db0591611537d45601fda7b03d1c900",
        "2026-11-22T05:49:12.107Z",
        **measured(105, 305, 1, 0),
        status=404,
    ),
    "499-client-gone-before-answer": alices(
        "8ecb363f01074f32debfa21cbf5fef36",
        "2026-11-28T18:51:22.103Z",
        **measured(78, 0, 101, 101),
        status=499,
    ),
    "400-client-gone-in-body": alices(
        "7be273721e8bbb2d3453784077be8c67",
        "2026-11-28T18:51:22.204Z",
        **measured(1095, 0, 101, 100),
        request_method="POST",
        status=400,
    ),
    "grpc-status-8": alices(
        "9979e61617ad991dc1ad3322a939660b", "2026-11-28T19:25:49.398Z", **measured(73, 186, 2, 1), **GRPC
    ),
    "grpc-server-stream": alices(
        "02f79c6b93fd3451cfb7ec38daabe716", "2026-11-28T19:25:49.394Z", **measured(55, 268, 2, 1), **GRPC
    ),
}


@pytest.mark.parametrize("name", sorted(OTHERS_OF_ALICE))
def test_another_authenticated_request_becomes_exactly_its_event(name: str) -> None:
    assert result(serialized(name).parsed) == [OTHERS_OF_ALICE[name]]


NO_EVENT = {
    "401-bad-key": SkipReason.NO_CONSUMER,
    "401-no-key": SkipReason.NO_CONSUMER,
    "404-no-route": SkipReason.NO_CONSUMER,
    "anonymous-consumer": SkipReason.ANONYMOUS_CONSUMER,
    "anonymous-no-auth-plugin": SkipReason.NO_CONSUMER,
    "bad-request-400-invalid-host": SkipReason.NO_CONSUMER,
    "long-uri-414": SkipReason.NO_CONSUMER,
}


@pytest.mark.parametrize("name", sorted(NO_EVENT))
def test_a_request_without_a_subject_is_skipped_with_its_reason(name: str) -> None:
    assert result(serialized(name).parsed) is NO_EVENT[name]


def test_every_serialized_recording_is_asserted_here() -> None:
    in_full = {"authenticated", "502-upstream-down", "stream-sse"}
    assert {recording.name for recording in all_serialized()} == in_full | set(OTHERS_OF_ALICE) | set(
        NO_EVENT
    )


def test_the_requests_in_the_protobuf_recording_have_exactly_these_outcomes() -> None:
    assert [result(r.parsed, codec.decode_value(r.application)) for r in protobuf_requests()] == [
        [alices("f0a07111ff718156b19530092d793f7a", "2026-11-22T06:08:42.806Z", **measured(106, 364, 2, 0))],
        result(application_request().parsed, CONTEXT),  # asserted in full above
        result(llm_request().parsed),
        SkipReason.NO_CONSUMER,  # 404
        SkipReason.NO_CONSUMER,  # 401
        [alices("a66bab0b30f83d205fed67743b2bf058", "2026-11-22T06:08:44.183Z", **measured(113, 364, 1, 0))],
        [alices("2ba21a1251afea58f18ff77776ee617f", "2026-11-22T06:08:46.246Z", **measured(115, 364, 2, 0))],
    ]


def posted_logs() -> list[Log]:
    lines = (WIRE / "http-log-posts.jsonl").read_text().splitlines()
    return [log for line in lines for log in json.loads(json.loads(line)["body"])]


def test_the_logs_that_kongs_http_log_posted_have_exactly_these_outcomes() -> None:
    alice, application, llm, single = posted_logs()
    assert result(alice) == [
        alices("e3ef4c32e12b3966396bfb56ba6e4d66", "2026-11-22T07:01:05.554Z", **measured(106, 364, 2, 0))
    ]
    event = only(application, application["application_context"])
    assert (event["id"], event["subject"]) == (
        "1f03c104d475e9409ae71c28499ce322",
        f"app:{APPLICATION}",
    )
    assert event["data"]["application_id"] == APPLICATION
    assert "consumer_id" not in event["data"]
    assert [(e["id"], e["subject"], e["data"].get("tokens")) for e in events(llm)] == [
        ("45d3be67f50bfc1355d8e663d6367541", f"consumer:{BOB}", None),
        ("45d3be67f50bfc1355d8e663d6367541:proxy:input", f"consumer:{BOB}", 12),
        ("45d3be67f50bfc1355d8e663d6367541:proxy:output", f"consumer:{BOB}", 30),
    ]
    assert result(single) == [
        alices("0c28a515eb4dce198f46f33e45fdc50b", "2026-11-22T07:01:07.096Z", **measured(109, 364, 1, 0))
    ]


def msgpack_logs() -> Iterator[tuple[str, Log]]:
    for path in sorted(WIRE.glob("msgpack-*.jsonl")):
        for line in path.read_text().splitlines():
            decoded = json.loads(line).get("decoded") or []
            text = decoded[3][0].get("Data") if decoded[2:3] == ["plugin.Step"] else None
            if isinstance(text, str) and text.startswith("{"):
                yield path.name, json.loads(text)


def test_the_logs_in_the_msgpack_recordings_become_one_event_each_with_the_id_that_kong_gave() -> None:
    logs = list(msgpack_logs())
    assert len(logs) == 11
    for name, log in logs:
        event = only(log)
        assert event["id"] == log["request"]["id"] == log["response"]["headers"]["x-kong-request-id"], name
        assert event["subject"] == f"consumer:{log['consumer']['id']}", name
        assert event["data"]["status"] == log["response"]["status"], name


def test_no_secret_of_any_recording_is_in_any_event() -> None:
    logs = [r.parsed for r in (*all_serialized(), *protobuf_requests())]
    logs += posted_logs() + [log for _, log in msgpack_logs()]
    rules = looking(Lookup("consumer", "id"), Lookup("application", "id"), meter_anonymous_consumer=True)
    encoded = [orjson.dumps(found) for log in logs if isinstance(found := result(log, CONTEXT, rules), list)]
    assert len(encoded) == len(logs)
    for secret in SECRETS:
        assert all(secret.encode() not in event for event in encoded), secret
