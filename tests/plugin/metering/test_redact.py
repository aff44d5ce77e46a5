"""Redaction of logs in quarantine: enough for their events, and no secrets."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.kong import codec
from openmeter_plugin.metering.ai_events import AiRules
from openmeter_plugin.metering.event import Decision
from openmeter_plugin.metering.kong_log import QueryResults, log_of
from openmeter_plugin.metering.quarantine import redacted, redacted_application
from openmeter_plugin.metering.rules import Attribute, Filters, Lookup, Rules
from openmeter_plugin.metering.subject import is_anonymous
from tests.harness.recordings import (
    SECRETS,
    WIRE,
    Recorded,
    all_serialized,
    application_context,
    protobuf_requests,
    serialized,
)
from tests.plugin.any_logs import ai_parts, any_ai_rules, damaged_logs
from tests.plugin.outcomes import decided

RECORDINGS: list[Any] = [*all_serialized(), *protobuf_requests()]
RECORDINGS += [
    Recorded(f"posted {log['request']['id'][:4]}", orjson.dumps(log))
    for line in (WIRE / "http-log-posts.jsonl").read_text().splitlines()
    for log in json.loads(json.loads(line)["body"])
]
CONTEXT = codec.decode_value(application_context())

LOOKUPS = (
    (Lookup("consumer", "id"), Lookup("application", "id")),
    (Lookup("consumer", "username"),),
    (Lookup("consumer", "custom_id"), Lookup("consumer", "id")),
    (Lookup("application", "developer_id"), Lookup("consumer", "id")),
    (Lookup("consumer", "tag"), Lookup("consumer", "id")),
)
FILTERS = (
    None,
    Filters(frozenset({200}), frozenset({"GET"}), frozenset({"echo"}), frozenset({"echo"})),
    Filters(response_sources=frozenset({"upstream"})),
    Filters(upstream_answered=True),
)
ATTRIBUTES = (Attribute("consumer_tag", "tier", "tier"), Attribute("constant", "eu", "region"))


def decision(log: object, application: object, rules: Rules) -> Decision:
    return decided(log, QueryResults(application, None), rules)


def all_rules() -> list[Rules]:
    return [
        Rules(
            source="kong",
            lookups=lookups,
            meter_anonymous_consumer=anonymous,
            require_consumer=anonymous,
            missing="quarantine",
            attributes=ATTRIBUTES,
            filters=filters,
        )
        for lookups in LOOKUPS
        for anonymous in (False, True)
        for filters in FILTERS
    ]


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_the_redacted_recording_holds_no_secret(recording: Recorded) -> None:
    raw = orjson.dumps(redacted(recording.parsed))
    assert [secret for secret in SECRETS if secret.encode() in raw] == []


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_the_redacted_recording_holds_no_header_no_address_and_no_path(recording: Recorded) -> None:
    raw = orjson.dumps(redacted(recording.parsed)).decode()
    for hint in ("curl", "localhost", "127.0.0.1", "apikey", "uri", "url", "x-consumer", "client_ip"):
        assert hint not in raw


def test_the_recordings_contain_the_secrets_that_are_searched_for() -> None:
    raw = b"".join(recording.log for recording in RECORDINGS)
    assert all(secret.encode() in raw for secret in ("alice-key", "bob-key", "x y", "flag&b"))


@pytest.mark.parametrize("application", [None, CONTEXT], ids=["no application", "application"])
@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_a_redacted_recording_has_the_decision_of_the_original(
    recording: Recorded, application: object
) -> None:
    log = recording.parsed
    for rules in all_rules():
        kept = decision(redacted(log), redacted_application(application), rules)
        assert kept == decision(log, application, rules)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(damaged_logs(), st.sampled_from(all_rules()))
def test_a_redacted_damaged_log_has_the_same_decision(log: dict[str, Any], rules: Rules) -> None:
    kept = decision(redacted(log), redacted_application(CONTEXT), rules)
    assert kept == decision(log, CONTEXT, rules)


def anonymous(redacted_log: dict[str, Any]) -> bool:
    log = log_of(redacted_log)
    assert log is not None
    return is_anonymous(log)


def test_an_anonymous_consumer_stays_anonymous() -> None:
    assert anonymous(redacted(serialized("anonymous-consumer").parsed))
    assert not anonymous(redacted(serialized("authenticated").parsed))


def test_a_spoofed_anonymous_header_of_an_authenticated_client_is_not_kept() -> None:
    log = serialized("authenticated").parsed
    log["request"]["headers"]["x-anonymous-consumer"] = "true"
    assert not anonymous(redacted(log))
    assert b"anonymous" not in orjson.dumps(redacted(log))


def test_the_conversation_that_an_ai_plugin_logs_is_not_kept() -> None:
    block = {
        "usage": {"prompt_tokens": 1, "cost": 3},
        "meta": {"request_model": "m", "plugin_id": "p"},
        "payload": {"request": "tell me a secret"},
    }
    log = {"ai": {"proxy": block, "payload": {"request": "tell me a secret"}, **block}}
    kept = {"usage": {"prompt_tokens": 1, "cost": 3}, "meta": {"request_model": "m"}}
    assert redacted(log)["ai"] == kept | {"proxy": kept}


def test_the_usage_of_every_kong_version_is_kept_with_its_model_and_provider() -> None:
    blocks = {
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "meta": {"response_model": "gpt-4o-2024", "provider_name": "openai"},
        "ai-proxy": {"usage": {"prompt_token": 3, "completion_token": 4}, "meta": {"request_model": "m"}},
    }
    log = serialized("authenticated").parsed | {"ai": blocks}
    for rules in all_rules():
        assert decision(redacted(log), None, rules) == decision(log, None, rules)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(ai_parts, any_ai_rules, st.sampled_from(["1.1 kong/3.9.1", "1.1 kong/3.16.0.1", "1.1 other", None]))
def test_a_redacted_log_of_ai_traffic_has_the_same_events(
    ai: dict[str, Any], rules: AiRules, via: str | None
) -> None:
    log = serialized("authenticated").parsed | {"ai": ai}
    log["response"]["headers"] = {"via": via, "x-secret": "s"}
    wanted = Rules(source="kong", ai=rules)
    assert decision(redacted(log), None, wanted) == decision(log, None, wanted)


def test_what_an_agent_sent_and_why_it_failed_is_not_kept() -> None:
    rpc = {
        "method": "tools/call",
        "error": "a secret",
        "payload": {"request": "a secret"},
        "params": "a secret",
    }
    log = {"ai": {"mcp": {"rpc": [rpc], "mcp_session_id": "s", "audit": ["a secret"]}, "a2a": {"rpc": [rpc]}}}
    kept = {"method": "tools/call", "error": True}
    assert redacted(log)["ai"] == {"mcp": {"rpc": [kept], "mcp_session_id": "s"}, "a2a": {"rpc": [kept]}}


def test_a_name_under_usage_that_is_no_field_is_not_kept() -> None:
    log = {"ai": {"proxy": {"usage": {"prompt_tokens": 1, "My secret": 2, "x" * 65: 3}}}}
    assert redacted(log)["ai"] == {"proxy": {"usage": {"prompt_tokens": 1}}}


@pytest.mark.parametrize("value", [None, [], "x", 1, True, {}])
def test_a_value_that_is_not_a_log_is_redacted_to_nothing(value: object) -> None:
    assert redacted(value) == {}
    assert redacted_application(value) is None


def test_only_the_named_ids_of_an_application_are_kept() -> None:
    assert redacted_application(CONTEXT | {"token": "t", "developer_id": ["x"]}) == {
        name: CONTEXT[name] for name in ("application_id", "portal_id", "organization_id")
    }


@given(damaged_logs())
def test_a_redacted_log_can_always_be_encoded(log: dict[str, Any]) -> None:
    kept = redacted(log)
    assert set(kept) <= {
        *("request", "response", "latencies", "route", "service", "consumer", "authenticated_entity"),
        *("started_at", "source", "upstream_status", "workspace_name", "ai"),
    }
    json.dumps(kept)


def test_only_the_text_tags_of_a_consumer_are_kept() -> None:
    log = {"consumer": {"id": "c", "tags": ["tier:gold", {"secret": "s"}, ["nested"], 5, None, "team:a"]}}
    assert redacted(log)["consumer"] == {"id": "c", "tags": ["tier:gold", "team:a"]}
