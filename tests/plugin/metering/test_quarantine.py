"""Quarantine records and their replay: the same events, once the payer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.metering.event import Quarantined
from openmeter_plugin.metering.kong_log import PdkQuery, QueryResults
from openmeter_plugin.metering.quarantine import quarantine_record, replay_record
from openmeter_plugin.metering.rules import Attribute, Lookup, Rules, SkipReason
from tests.harness.recordings import SECRETS, all_serialized, llm_request, protobuf_requests, serialized
from tests.plugin.any_logs import any_rules, damaged_logs
from tests.plugin.outcomes import CONTEXT, NOW, NOW_TEXT, decided, events, ids

pytestmark = pytest.mark.slow

ATTRIBUTES = (
    Attribute("header", "user-agent", "agent"),
    Attribute("path_capture", "city", "city"),
    Attribute("constant", "eu", "region"),
)
QUARANTINING = Rules(
    source="kong", lookups=(Lookup("consumer", "tag"),), missing="quarantine", attributes=ATTRIBUTES
)
CORRECTED = replace(QUARANTINING, lookups=(Lookup("consumer", "id"),))
RESULTS = QueryResults(CONTEXT, {"named": {"city": "oslo"}})

RECORDINGS = [*all_serialized(), *protobuf_requests()]


def quarantined(log: Any, rules: Rules = QUARANTINING, results: QueryResults = RESULTS) -> dict[str, Any]:
    found = decided(log, results, rules)
    assert isinstance(found, Quarantined)
    record = quarantine_record(found.reason, log, results, found.attributes, now_ms=NOW, new_id=ids())
    stored: dict[str, Any] = json.loads(orjson.dumps(record))  # as read from the spool
    return stored


@pytest.mark.parametrize(
    "log", [serialized("authenticated").parsed, llm_request().parsed], ids=["one", "llm"]
)
def test_a_replayed_request_has_the_events_that_it_would_have_had(log: dict[str, Any]) -> None:
    original = events(log, RESULTS.application, CORRECTED, RESULTS.captures)
    assert replay_record(quarantined(log), CORRECTED) == original


def test_a_replay_under_the_same_rules_quarantines_again() -> None:
    found = replay_record(quarantined(serialized("authenticated").parsed), QUARANTINING)
    assert isinstance(found, Quarantined)
    assert found.reason is SkipReason.CONSUMER_WITHOUT_FIELD


def test_a_replay_can_bill_a_fixed_subject() -> None:
    rules = replace(QUARANTINING, missing="fallback", fallback_subject="unassigned")
    found = replay_record(quarantined(serialized("anonymous-no-auth-plugin").parsed), rules)
    assert isinstance(found, list)
    assert [event["subject"] for event in found] == ["unassigned"]


def test_a_subject_in_a_header_cannot_be_found_at_replay() -> None:
    log = serialized("anonymous-no-auth-plugin").parsed
    log["request"]["headers"]["x-customer"] = "globex"
    rules = replace(QUARANTINING, lookups=(Lookup("header", "x-customer"),), require_consumer=True)
    record = quarantined(log, rules)
    assert record["reason"] == "consumer_required"
    assert (
        replay_record(record, replace(rules, require_consumer=False, missing="skip")) is SkipReason.NO_HEADER
    )


def test_a_request_without_an_id_and_a_time_has_the_same_ones_at_each_replay() -> None:
    log = serialized("authenticated").parsed
    del log["request"]["id"]
    log["started_at"] = "soon"
    record = quarantined(log)
    first, second = replay_record(record, CORRECTED), replay_record(record, CORRECTED)
    assert first == second
    assert isinstance(first, list)
    assert (first[0]["id"], first[0]["time"]) == ("random-1", NOW_TEXT)


def test_attributes_from_tags_and_constants_survive_an_invalid_configuration() -> None:
    log = serialized("authenticated").parsed
    log["consumer"]["tags"] = ["tier:gold"]
    record = quarantine_record("source: too long", log, RESULTS, now_ms=NOW, new_id=ids())
    rules = replace(CORRECTED, attributes=(*ATTRIBUTES, Attribute("consumer_tag", "tier", "tier")))
    found = replay_record(record, rules)
    assert isinstance(found, list)
    data = found[0]["data"]
    assert (data["tier"], data["region"]) == ("gold", "eu")
    assert not {"agent", "city"} & set(data)


def test_the_record_names_its_destination() -> None:
    log = serialized("authenticated").parsed
    record = quarantine_record("r", log, RESULTS, destination="aaaabbbbccccdddd", now_ms=NOW, new_id=ids())
    assert record["destination"] == "aaaabbbbccccdddd"


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda r: r.name)
def test_no_secret_is_kept(recording: Any) -> None:
    record = quarantine_record("r", recording.parsed, RESULTS, now_ms=NOW, new_id=ids())
    raw = orjson.dumps(record)
    assert [secret for secret in SECRETS if secret.encode() in raw] == []


@pytest.mark.parametrize("record", [None, [], {}, {"log": []}, {"log": None, "attributes": []}, "x", 5])
def test_an_invalid_record_has_no_events(record: object) -> None:
    assert replay_record(record, replace(CORRECTED, missing="skip")) is SkipReason.NO_CONSUMER


@settings(max_examples=300, deadline=None)
@given(damaged_logs(), any_rules, st.sampled_from([CONTEXT, None, [], 3]))
def test_any_record_can_be_encoded_and_replayed(log: Any, rules: Rules, application: object) -> None:
    results = QueryResults(application, {"named": {"id": "7"}})
    record = quarantine_record("r", log, results, now_ms=NOW, new_id=ids())
    stored = json.loads(json.dumps(record))
    found = replay_record(stored, rules)
    assert not isinstance(found, PdkQuery)
    assert repr(replay_record(stored, rules)) == repr(found)
