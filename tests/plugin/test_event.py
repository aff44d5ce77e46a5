"""From a request that Kong served to its CloudEvents: the exact outcome of every recording, and the rules."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin import wire
from openmeter_plugin.event import Outcome, Quarantined, outcome
from openmeter_plugin.questions import UNASKED, Answers, Needs
from openmeter_plugin.rules import Attribute, Filters, Lookup, Rules, SkipReason
from openmeter_plugin.timestamps import rfc3339
from openmeter_plugin.values import MAX_TEXT
from tests.harness.recordings import (
    SECRETS,
    WIRE,
    Recorded,
    all_serialized,
    application_context,
    application_request,
    llm_request,
    protobuf_requests,
    serialized,
)

NOW = 1_800_000_000_123
NOW_TEXT = "2027-01-15T08:00:00.123Z"
RULES = Rules(source="kong-test")

ALICE = "b32379d9-3d28-5683-a79c-72139be6e34f"
BOB = "def4f7d3-9863-5ad2-8fa9-c949bf26f55e"
APPLICATION = "b15e2460-ba40-431d-9df0-4957fcffacda"
CONTEXT = wire.decode_value(application_context())

Log = dict[str, Any]


def ids() -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"random-{next(numbers)}"


def result(log: object, application: object = None, rules: Rules = RULES, captures: object = None) -> Outcome:
    return outcome(log, Answers(application, captures), rules, now_ms=NOW, new_id=ids())


def events(
    log: object, application: object = None, rules: Rules = RULES, captures: object = None
) -> list[dict[str, Any]]:
    found = result(log, application, rules, captures)
    assert isinstance(found, list), found
    return found


def only(
    log: object, application: object = None, rules: Rules = RULES, captures: object = None
) -> dict[str, Any]:
    (event,) = events(log, application, rules, captures)
    return event


def authenticated(**changes: object) -> Log:
    return serialized("authenticated").parsed | changes


def looking(*lookups: Lookup, **settings: Any) -> Rules:
    return Rules(source="kong-test", lookups=lookups, **settings)


# The recordings, outcome by outcome


def test_an_authenticated_request_becomes_exactly_this_event() -> None:
    assert result(serialized("authenticated").parsed, UNASKED) == [
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
            "subject": "application:b15e2460-ba40-431d-9df0-4957fcffacda",
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


ECHO_ROUTE = "bf3c18fd-347d-5497-8230-0441f2ad7a65"


def alices(request_id: str, time: str, **data: object) -> dict[str, Any]:
    """An event of alice's on the route echo, from what is particular to it."""
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
}


@pytest.mark.parametrize("name", sorted(OTHERS_OF_ALICE))
def test_an_authenticated_request_of_another_kind_becomes_exactly_its_event(name: str) -> None:
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
def test_a_request_of_nobody_in_particular_becomes_no_event_for_the_named_reason(name: str) -> None:
    assert result(serialized(name).parsed) is NO_EVENT[name]


def test_every_serialized_recording_has_its_outcome_asserted_here() -> None:
    in_full = {"authenticated", "502-upstream-down", "stream-sse"}
    assert {recording.name for recording in all_serialized()} == in_full | set(OTHERS_OF_ALICE) | set(
        NO_EVENT
    )


def test_the_requests_in_the_protobuf_recording_have_exactly_these_outcomes() -> None:
    assert [result(r.parsed, wire.decode_value(r.application)) for r in protobuf_requests()] == [
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
        f"application:{APPLICATION}",
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
    made = [orjson.dumps(found) for log in logs if isinstance(found := result(log, CONTEXT, rules), list)]
    assert len(made) == len(logs)
    for secret in SECRETS:
        assert all(secret.encode() not in event for event in made), secret


# AI usage, wherever a Kong version puts it

USAGE = {"prompt_tokens": 7, "completion_tokens": 11, "total_tokens": 18}
META = {"provider_name": "openai", "request_model": "gpt-4o", "response_model": "gpt-4o-2024"}

SHAPES = {
    "3.6 flat": ({"usage": USAGE, "meta": META}, ["ai"]),
    "3.7 singular": (
        {
            "ai-proxy": {
                "usage": {"prompt_token": 7, "completion_token": 11, "total_tokens": 18},
                "meta": META,
            }
        },
        ["ai-proxy"],
    ),
    "3.8 per plugin": (
        {
            "ai-proxy": {"usage": USAGE | {"time_per_token": 3.5, "cost": 0.01}, "meta": META, "cache": {}},
            "ai-request-transformer": {"usage": USAGE, "meta": META},
        },
        ["ai-proxy", "ai-request-transformer"],
    ),
    "3.9 proxy": ({"proxy": {"usage": USAGE | {"cost": 0}, "meta": META | {"plugin_id": "p"}}}, ["proxy"]),
}


def tokens_of(ai: object) -> list[tuple[str, object, object]]:
    made = events(authenticated(ai=ai))[1:]
    return [
        (e["id"].removeprefix(f"{made[0]['id'][:32]}:"), e["data"]["type"], e["data"]["tokens"]) for e in made
    ]


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_usage_of_each_kong_version_becomes_an_input_and_an_output_event_per_block(shape: str) -> None:
    ai, keys = SHAPES[shape]
    expected = []
    for key in keys:
        expected += [(f"{key}:input", "input", 7), (f"{key}:output", "output", 11)]
    assert tokens_of(ai) == expected


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_the_usage_of_each_kong_version_names_model_and_provider(shape: str) -> None:
    for event in events(authenticated(ai=SHAPES[shape][0]))[1:]:
        assert (event["type"], event["data"]["model"], event["data"]["provider"]) == (
            "kong.llm_request",
            "gpt-4o",
            "openai",
        )


def test_the_model_of_the_response_stands_in_where_the_request_named_none() -> None:
    ai = {"proxy": {"usage": USAGE, "meta": {"response_model": "gpt-4o-2024"}}}
    assert {e["data"]["model"] for e in events(authenticated(ai=ai))[1:]} == {"gpt-4o-2024"}


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": None},
        {"prompt_tokens": -1, "completion_tokens": True},
        {"prompt_tokens": "many"},
        [],
        "usage",
    ],
)
def test_no_tokens_or_none_that_are_a_number_are_no_usage(usage: object) -> None:
    assert len(events(authenticated(ai={"proxy": {"usage": usage}}))) == 1


def test_a_direction_without_tokens_has_no_event_beside_one_that_has() -> None:
    ai = {"proxy": {"usage": {"prompt_tokens": 5, "completion_tokens": 0}}}
    assert tokens_of(ai) == [("proxy:input", "input", 5)]


def test_tokens_that_are_no_whole_number_are_rounded_rather_than_lost() -> None:
    assert tokens_of({"proxy": {"usage": {"prompt_tokens": 12.6}}}) == [("proxy:input", "input", 13)]


def test_tokens_are_not_metered_where_that_is_off() -> None:
    rules = Rules(source="kong-test", meter_ai_token_usage=False)
    assert [e["type"] for e in events(llm_request().parsed, None, rules)] == ["kong.api_request"]


def test_requests_are_not_metered_where_that_is_off_but_their_tokens_are() -> None:
    rules = Rules(source="kong-test", meter_api_requests=False)
    assert [e["data"]["tokens"] for e in events(llm_request().parsed, None, rules)] == [12, 30]


def test_a_request_with_nothing_that_is_metered_is_counted_as_such() -> None:
    rules = Rules(source="kong-test", meter_api_requests=False)
    assert result(authenticated(), None, rules) is SkipReason.NOTHING_TO_METER


# Whose usage it is


@pytest.mark.parametrize(("field", "subject"), [("username", "alice"), ("custom_id", "cust-alice-001")])
def test_a_consumers_name_or_custom_id_is_the_bare_subject(field: str, subject: str) -> None:
    assert only(authenticated(), None, looking(Lookup("consumer", field)))["subject"] == subject


def test_a_consumer_without_the_wanted_field_is_counted_as_such() -> None:
    rules = looking(Lookup("consumer", "custom_id"))
    assert result(llm_request().parsed, None, rules) is SkipReason.CONSUMER_WITHOUT_FIELD


def test_a_header_is_the_subject_where_that_is_configured() -> None:
    assert only(authenticated(), None, looking(Lookup("header", "x-consumer-username")))["subject"] == "alice"


def test_the_first_of_a_header_that_was_given_twice_is_the_subject() -> None:
    log = authenticated()
    log["request"]["headers"]["x-customer"] = ["acme", "other"]
    assert only(log, None, looking(Lookup("header", "x-customer")))["subject"] == "acme"


def test_a_query_argument_is_the_subject_and_the_first_where_it_was_given_twice() -> None:
    assert only(authenticated(), None, looking(Lookup("query", "b")))["subject"] == "x y"
    assert only(authenticated(), None, looking(Lookup("query", "a")))["subject"] == "1"


def test_a_query_argument_without_a_value_names_nobody() -> None:
    rules = looking(Lookup("query", "flag"))
    assert result(authenticated(), None, rules) is SkipReason.NO_QUERY_ARGUMENT


def test_a_missing_header_is_counted_as_such() -> None:
    assert result(authenticated(), None, looking(Lookup("header", "x-none"))) is SkipReason.NO_HEADER


@pytest.mark.parametrize("field", ["developer_id", "portal_id", "organization_id"])
def test_an_applications_other_ids_are_the_bare_subject(field: str) -> None:
    event = only(application_request().parsed, CONTEXT, looking(Lookup("application", field)))
    assert event["subject"] == CONTEXT[field]


@pytest.mark.parametrize("context", [None, {}, [], "x", 1.0, {"application_id": 3}, {"application_id": ""}])
def test_a_context_without_an_application_is_counted_as_such(context: object) -> None:
    assert result(authenticated(), context, looking(Lookup("application", "id"))) is SkipReason.NO_APPLICATION


def test_the_first_lookup_that_finds_somebody_decides() -> None:
    found = {
        "header": looking(Lookup("header", "x-consumer-username"), Lookup("consumer", "id")),
        "consumer": looking(Lookup("header", "x-none"), Lookup("consumer", "id"), Lookup("query", "a")),
        "query": looking(Lookup("header", "x-none"), Lookup("query", "a"), Lookup("consumer", "id")),
    }
    subjects = {place: only(authenticated(), None, rules)["subject"] for place, rules in found.items()}
    assert subjects == {"header": "alice", "consumer": f"consumer:{ALICE}", "query": "1"}


def test_the_reason_for_no_event_is_that_of_the_first_lookup() -> None:
    rules = looking(Lookup("header", "x-none"), Lookup("query", "none"))
    assert result(authenticated(), None, rules) is SkipReason.NO_HEADER


def test_a_name_that_is_too_long_to_be_one_names_nobody_rather_than_somebody_else() -> None:
    log = authenticated()
    log["request"]["headers"]["x-customer"] = "c" * (MAX_TEXT + 1)
    assert result(log, None, looking(Lookup("header", "x-customer"))) is SkipReason.NO_HEADER
    log["request"]["headers"]["x-customer"] = "c" * MAX_TEXT
    assert only(log, None, looking(Lookup("header", "x-customer")))["subject"] == "c" * MAX_TEXT


def test_the_application_is_asked_for_only_where_no_consumer_is_found() -> None:
    assert isinstance(result(authenticated(), UNASKED), list)
    assert result(serialized("401-no-key").parsed, UNASKED) is Needs.APPLICATION


def test_the_application_is_asked_for_always_where_that_is_configured() -> None:
    rules = Rules(source="kong-test", application_context="always")
    assert result(authenticated(), UNASKED, rules) is Needs.APPLICATION
    assert only(authenticated(), CONTEXT, rules)["data"]["application_id"] == APPLICATION


def test_the_application_is_never_asked_for_where_that_is_configured() -> None:
    rules = Rules(source="kong-test", application_context="never")
    assert result(serialized("401-no-key").parsed, UNASKED, rules) is SkipReason.NO_CONSUMER
    rules = looking(Lookup("application", "id"), application_context="never")
    assert result(serialized("401-no-key").parsed, UNASKED, rules) is SkipReason.NO_APPLICATION


def test_an_anonymous_consumer_is_metered_where_that_is_configured() -> None:
    rules = Rules(source="kong-test", meter_anonymous_consumer=True)
    event = only(serialized("anonymous-consumer").parsed, None, rules)
    assert event["subject"] == "consumer:1cd57acc-61b9-5afa-9668-80123fa9b98d"


def test_an_anonymous_consumers_application_pays() -> None:
    event = only(serialized("anonymous-consumer").parsed, CONTEXT)
    assert event["subject"] == f"application:{APPLICATION}"


def test_a_client_that_calls_itself_anonymous_is_billed_when_it_is_authenticated() -> None:
    log = authenticated()
    log["request"]["headers"]["x-anonymous-consumer"] = "true"
    assert only(log)["subject"] == f"consumer:{ALICE}"


def test_a_consumer_without_the_anonymous_header_is_billed_although_no_credential_is_named() -> None:
    log = authenticated()
    del log["authenticated_entity"]
    assert only(log)["subject"] == f"consumer:{ALICE}"


# The rest of the event


def test_a_request_without_an_id_gets_a_random_one_for_all_its_events() -> None:
    log = llm_request().parsed
    del log["request"]["id"]
    assert [e["id"] for e in events(log)] == ["random-1", "random-1:proxy:input", "random-1:proxy:output"]


def test_a_request_with_an_id_asks_for_no_random_one() -> None:
    def refuse() -> str:
        raise AssertionError("a random id was asked for")

    made = outcome(authenticated(), Answers(), RULES, now_ms=NOW, new_id=refuse)
    assert isinstance(made, list)


@pytest.mark.parametrize("started_at", [None, 0, -5, "soon", True, 253_402_300_800_000, 1e300, []])
def test_a_request_without_a_usable_time_has_the_time_at_which_it_came(started_at: object) -> None:
    assert only(authenticated(started_at=started_at))["time"] == NOW_TEXT


@pytest.mark.parametrize(
    ("started_at", "text"),
    [
        (1, "1970-01-01T00:00:00.001Z"),
        (1795326543779.0, "2026-11-22T05:49:03.779Z"),
        (1795326543778.9998, "2026-11-22T05:49:03.779Z"),
        ("1795326543779", "2026-11-22T05:49:03.779Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_the_time_is_that_of_the_requests_start(started_at: object, text: str) -> None:
    assert only(authenticated(started_at=started_at))["time"] == text


@given(st.integers(0, 253_402_300_799_999))
def test_times_are_what_datetime_makes_of_them(milliseconds: int) -> None:
    moment = datetime.fromtimestamp(milliseconds // 1000, UTC).replace(microsecond=milliseconds % 1000 * 1000)
    expected = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert rfc3339(milliseconds) == expected
    assert rfc3339(milliseconds) == expected


def test_what_is_absent_in_the_log_is_absent_in_the_event() -> None:
    event = only({"consumer": {"id": "c"}, "request": {"id": "r"}, "started_at": 1})
    assert event["data"] == {"consumer_id": "c"}


def test_a_request_that_kong_answered_itself_has_no_upstream_latency() -> None:
    log = authenticated(latencies={"request": 2, "proxy": -1, "kong": 1, "receive": 0})
    assert "upstream_latency_ms" not in only(log)["data"]
    assert only(log)["data"]["latency_ms"] == 2


def test_sizes_that_kong_wrote_as_text_are_numbers_in_the_event() -> None:
    log = authenticated()
    log["request"]["size"] = "122"
    assert only(log)["data"]["request_bytes"] == 122


def test_configured_attributes_are_in_the_data_of_every_event_of_the_request() -> None:
    rules = Rules(
        source="kong-test",
        attributes=(
            Attribute("header", "user-agent", "agent"),
            Attribute("query", "b", "why"),
            Attribute("header", "x-none", "never"),
        ),
    )
    for event in events(authenticated(ai=SHAPES["3.9 proxy"][0]), None, rules):
        assert (event["data"]["agent"], event["data"]["why"]) == ("curl/7.88.1", "x y")
        assert "never" not in event["data"]


def test_an_attribute_that_a_client_makes_long_is_cut() -> None:
    log = authenticated()
    log["request"]["headers"]["user-agent"] = "a" * 10_000
    rules = Rules(source="kong-test", attributes=(Attribute("header", "user-agent", "agent"),))
    assert only(log, None, rules)["data"]["agent"] == "a" * MAX_TEXT


@pytest.mark.parametrize("log", [None, [], "", 0, True, 1.5, "null", [{}]])
def test_a_log_that_is_no_object_is_counted_as_a_bad_record(log: object) -> None:
    assert result(log, UNASKED) is SkipReason.BAD_RECORD


# Whatever Kong may send

PLACES = (
    *(Lookup("consumer", "id"), Lookup("consumer", "username"), Lookup("consumer", "custom_id")),
    Lookup("consumer", "tag"),
    *(Lookup("application", "id"), Lookup("application", "portal_id")),
    *(Lookup("header", "host"), Lookup("query", "a")),
)

ATTRIBUTES = (
    *(Attribute("header", "host", "host"), Attribute("query", "b", "b")),
    *(Attribute("response_header", "content-type", "media"), Attribute("path_capture", "id", "captured")),
    *(Attribute("consumer_tag", "tier", "tier"), Attribute("constant", "eu", "region")),
)


def some(values: Iterable[Any]) -> st.SearchStrategy[frozenset[Any] | None]:
    """No filter, or one over some of the values."""
    return st.none() | st.frozensets(st.sampled_from(list(values)), min_size=1)


any_filters = st.none() | st.builds(
    Filters,
    statuses=some((200, 404, 502)),
    methods=some(("GET", "POST")),
    routes=some(("echo", "llm", "bf3c18fd-347d-5497-8230-0441f2ad7a65")),
    services=some(("echo", "broken")),
    response_sources=some(("kong", "upstream")),
)

any_rules = st.builds(
    Rules,
    source=st.just("kong-test"),
    meter_api_requests=st.booleans(),
    meter_ai_token_usage=st.booleans(),
    meter_anonymous_consumer=st.booleans(),
    lookups=st.lists(st.sampled_from(PLACES), max_size=4, unique=True).map(tuple),
    require_consumer=st.booleans(),
    missing=st.sampled_from(("skip", "fallback", "quarantine")),
    fallback_subject=st.just("unassigned"),
    attributes=st.lists(st.sampled_from(ATTRIBUTES), max_size=4).map(tuple),
    filters=any_filters,
    application_context=st.sampled_from(("when_needed", "always", "never")),
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.text(st.characters(categories=["Cs"]), max_size=2)
    | st.sampled_from(["true", "1" * 5000, "x" * 3000, 12, 1795326543779, -1, 2**53 + 1]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "usage", "meta", "prompt_tokens", "completion_tokens", "ai", "proxy", ""])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)

RECORDINGS = [*all_serialized(), *protobuf_requests()]


def paths(value: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, list):
        members = enumerate(value)
    for key, inner in members:
        yield from paths(inner, (*at, key))


PATHS = {recording.name: list(paths(recording.parsed)) for recording in RECORDINGS}


@st.composite
def damaged_logs(draw: st.DrawFn) -> Log:
    """A recording with up to three of its fields gone or something else."""
    recording: Recorded = draw(st.sampled_from(RECORDINGS))
    log = recording.parsed
    if draw(st.booleans()):
        log["ai"] = draw(json_values)
    for path in draw(st.lists(st.sampled_from(PATHS[recording.name]), min_size=1, max_size=3)):
        parent: Any = log
        for key in path[:-1]:
            if not isinstance(parent, (dict, list)) or (isinstance(parent, dict) and key not in parent):
                break
            if isinstance(parent, list) and not (isinstance(key, int) and key < len(parent)):
                break
            parent = parent[key]
        else:
            if isinstance(parent, dict):
                if draw(st.booleans()):
                    parent.pop(path[-1], None)
                else:
                    parent[path[-1]] = draw(json_values)
    return log


applications = st.one_of(st.just(UNASKED), st.just(CONTEXT), json_values)
captures = st.one_of(st.just(UNASKED), st.just({"named": {"id": "7"}}), json_values)

REQUIRED = ("specversion", "id", "source", "type", "subject", "time", "data")


def assert_valid(found: Outcome) -> None:
    if isinstance(found, (SkipReason, Needs)):
        return
    if isinstance(found, Quarantined):
        assert type(found.reason) is SkipReason
        assert all(type(value) is str and 0 < len(value) <= MAX_TEXT for value in found.attributes.values())
        return
    assert type(found) is list
    assert found
    assert len({event["id"] for event in found}) == len(found)
    for event in found:
        assert tuple(event) == REQUIRED
        assert all(type(event[name]) is str and event[name] for name in REQUIRED[:-1])
        assert event["type"] in ("kong.api_request", "kong.llm_request")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event["time"])
        for value in event["data"].values():
            assert type(value) in (str, int)
            assert value != ""
            assert len(value) <= MAX_TEXT if isinstance(value, str) else 0 <= value <= 2**53
        if event["type"] == "kong.llm_request":
            assert event["data"]["tokens"] > 0
            assert event["data"]["type"] in ("input", "output")
        json.loads(json.dumps(event, allow_nan=False))


@settings(max_examples=400, deadline=None)
@given(damaged_logs(), applications, any_rules, captures)
def test_a_recording_with_any_field_gone_or_of_any_type_has_a_valid_outcome(
    log: Log, application: object, rules: Rules, captures: object
) -> None:
    assert_valid(result(log, application, rules, captures))


@settings(max_examples=150, deadline=None)
@given(json_values, applications, any_rules, captures)
def test_any_json_value_has_a_valid_outcome(
    log: object, application: object, rules: Rules, captures: object
) -> None:
    assert_valid(result(log, application, rules, captures))


@settings(max_examples=300, deadline=None)
@given(damaged_logs(), any_rules)
def test_kong_is_asked_each_question_once_at_most_and_only_where_the_rules_depend_on_it(
    log: Log, rules: Rules
) -> None:
    answers, asked = Answers(), []
    while isinstance(found := outcome(log, answers, rules, now_ms=NOW, new_id=ids()), Needs):
        asked.append(found)
        answers = answers.with_answer(found, None)
    assert len(set(asked)) == len(asked)
    if rules.application_context == "never":
        assert Needs.APPLICATION not in asked
    if not any(attribute.place == "path_capture" for attribute in rules.attributes):
        assert Needs.CAPTURES not in asked
    # Whether Kong is asked or not: what it would have answered has the same outcome.
    assert repr(found) == repr(result(log, answers.without_the_rest().application, rules))


@settings(max_examples=150, deadline=None)
@given(damaged_logs(), applications, any_rules)
def test_the_outcome_is_the_same_each_time_and_the_log_is_left_alone(
    log: Log, application: object, rules: Rules
) -> None:
    before = copy.deepcopy((log, application))
    first = result(log, application, rules)
    assert repr((log, application)) == repr(before)
    assert repr(result(log, application, rules)) == repr(first)


def test_two_usage_blocks_of_one_name_still_have_ids_of_their_own() -> None:
    ai = {"usage": USAGE, "ai": {"usage": USAGE}, "": {"usage": USAGE}}
    made = events(authenticated(ai=ai))
    assert len({event["id"] for event in made}) == len(made) == 7
