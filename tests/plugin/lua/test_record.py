"""What a record says: the same, for the billing rules, as kong.log.serialize says of the same request."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.metering.kong_log import QueryResults
from openmeter_plugin.metering.rules import Attribute, Rules
from tests.harness.recordings import SECRETS, Recorded, all_serialized, protobuf_requests, serialized
from tests.plugin.any_logs import PATHS, RECORDINGS, ai_parts, any_rules, json_values
from tests.plugin.lua.equality import decision, of_record
from tests.plugin.lua.stand_in import Edit, LuaPlugin, lines, lost, number, records
from tests.plugin.outcomes import CONTEXT

ALL = [*all_serialized(), *protobuf_requests()]
SETTINGS: dict[str, Any] = {"ingest_endpoint": "http://openmeter/api/v1/events", "api_token": "the-token"}
EVERYTHING = Rules(
    "kong-test",
    attributes=(
        *(Attribute("header", "host", "host"), Attribute("query", "a", "a")),
        *(Attribute("response_header", "content-type", "media"), Attribute("path_capture", "id", "captured")),
        Attribute("consumer_tag", "tier", "tier"),
    ),
    application_context="always",
)


@pytest.fixture
def plugin(tmp_path: Path) -> LuaPlugin:
    return LuaPlugin(tmp_path / "segments")


def configuration(rules: Rules) -> dict[str, Any]:
    """Return the settings that name what these rules read."""
    places = [{"look_up_value_in": lookup.place, "field": lookup.field} for lookup in rules.lookups] or [
        {"look_up_value_in": "consumer"}
    ]
    attributes = [
        {"source": a.place, "look_up_value_in": a.name, "event_property_name": a.property_name}
        for a in rules.attributes
    ]
    return SETTINGS | {
        "subject": places[0] | {"fallbacks": places[1:]},
        "attributes": attributes,
        "application_context": rules.application_context,
    }


def in_lua(value: Any) -> Any:
    """Return the JSON value that is left of this one after Lua: doubles, and one kind of empty table."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return json.loads(number(value)) if abs(value) < 1e300 else 0
    if isinstance(value, list):
        return [in_lua(item) for item in value] or {}
    return {in_lua(name): in_lua(member) for name, member in value.items()}


def apply(root: dict[str, Any], edit: Edit) -> None:
    """Do what edit_result does in Kong's pdk/log.lua, except where that fails the whole log."""
    key, value, mode = edit
    *path, last = key.split(".")
    node = root
    for name in path:
        if name not in node and mode == "replace":
            return
        inner = node.setdefault(name, {})
        if not isinstance(inner, dict):
            return
        node = inner
    if mode == "set" or (mode == "add") == (last not in node):
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value


def serialized_log(log: dict[str, Any], edits: list[Edit]) -> dict[str, Any]:
    result = json.loads(json.dumps(log))
    for edit in edits:
        apply(result, edit)
    return dict(result)


def unedited(recorded: Recorded) -> tuple[dict[str, Any], list[Edit]]:
    """Return a recorded log without what plugins had set in it, and that."""
    log = in_lua(recorded.parsed)
    return log, [("ai", log.pop("ai"), "set")] if "ai" in log else []


# Equality


@pytest.mark.parametrize("recorded", ALL, ids=lambda recorded: recorded.name)
def test_the_record_of_each_recorded_request_makes_the_events_of_its_log(
    plugin: LuaPlugin, recorded: Recorded
) -> None:
    log, edits = unedited(recorded)
    conf = plugin.lua(configuration(EVERYTHING))
    plugin.log(conf, log, *edits, shared={"kaa_application_context": CONTEXT}, captures={"id": "7"})
    (record,) = lines(plugin.folder)
    results = QueryResults(CONTEXT, {"named": {"id": "7"}})
    expected = decision(orjson.dumps(serialized_log(log, edits)), results, EVERYTHING)
    assert of_record(record, EVERYTHING) == expected
    assert (plugin.said, lost(plugin.folder)) == ([], {})


edit_values = (json_values | ai_parts).map(in_lua)


@st.composite
def edited_logs(draw: st.DrawFn) -> tuple[dict[str, Any], list[Edit]]:
    """A recorded log, and calls of set_serialize_value that a plugin may have made."""
    recorded: Recorded = draw(st.sampled_from(RECORDINGS))
    log, edits = unedited(recorded)
    if draw(st.booleans()):
        log["response"].setdefault("headers", {})["x-kong-llm-model"] = "openai/gpt"
    keys = [".".join(path) for path in PATHS[recorded.name] if all(isinstance(part, str) for part in path)]
    keys += [
        "ai.proxy",
        "ai.proxy.usage",
        "ai.mcp.rpc",
        "correlation_id",
        "request.headers.x-anonymous-consumer",
    ]
    for key in draw(st.lists(st.sampled_from(keys), max_size=4)):
        edits.append((key, draw(edit_values), draw(st.sampled_from(("set", "add", "replace")))))
    if draw(st.booleans()):
        edits.append(("ai", in_lua(draw(ai_parts)), "set"))
    return log, edits


@cache
def shared_plugin() -> LuaPlugin:
    """Return a plugin for all examples: each makes a segment of its own by its age."""
    return LuaPlugin(Path(mkdtemp()) / "segments")


contexts = st.sampled_from([None, CONTEXT, {"application_id": "a" * 4000}, {"portal_id": 5}])
captures = st.sampled_from([None, {"id": "7"}, {"id": "é", "other": "x"}])


@pytest.mark.slow
@given(edited_logs(), any_rules, contexts, captures)
def test_any_log_taken_apart_into_what_the_plugin_reads_makes_the_same_events(
    edited: tuple[dict[str, Any], list[Edit]], rules: Rules, context: Any, captured: Any
) -> None:
    plugin = shared_plugin()
    for closed in sorted(plugin.folder.glob("*.segment"))[:-1]:
        closed.unlink()
    plugin.now += 2
    log, edits = edited
    plugin.log(
        plugin.lua(configuration(rules)),
        log,
        *edits,
        shared={"kaa_application_context": context} if context else {},
        captures=captured,
    )
    record = lines(plugin.folder)[-1]
    asked = rules.application_context != "never"
    results = QueryResults(context if asked else None, {"named": captured} if captured else None)
    expected = decision(orjson.dumps(serialized_log(log, edits)), results, rules)
    assert of_record(record, rules) == expected
    assert (plugin.said, lost(plugin.folder)) == ([], {})


# What is beyond the log, and what is never in a record


def written(plugin: LuaPlugin, *edits: Edit, name: str = "authenticated", **beyond: Any) -> dict[str, Any]:
    """Have a recorded request logged and return its record."""
    plugin.log(plugin.lua(configuration(EVERYTHING)), in_lua(serialized(name).parsed), *edits, **beyond)
    return records(plugin.folder)[-1]


def test_a_record_says_what_the_log_does_not(plugin: LuaPlugin) -> None:
    record = written(
        plugin,
        completion="",
        responder="error",
        key_tags=["tier:gold"],
        ai_llm_metrics={"prompt_tokens": 3, "payload": "a prompt"},
    )
    assert record["x"] == {
        "completion": "",
        "responder": "error",
        "key_tags": ["tier:gold"],
        "ai_metrics": {"prompt_tokens": 3, "payload": True},
    }
    assert "x" not in written(plugin)


def test_no_record_of_the_recordings_holds_a_secret(plugin: LuaPlugin) -> None:
    conf = plugin.lua(configuration(EVERYTHING))
    for recorded in ALL:
        log, edits = unedited(recorded)
        plugin.log(conf, log, *edits)
    (segment,) = plugin.folder.glob("*.segment")
    content = segment.read_text()
    assert content.count("\n") == len(ALL) + 1
    assert not [secret for secret in SECRETS if secret in content]


@pytest.mark.parametrize(
    ("place", "name"), [("header", "Authorization"), ("query", "apikey"), ("response_header", "Set-Cookie")]
)
def test_a_name_that_carries_credentials_is_not_read_even_if_it_is_configured(
    plugin: LuaPlugin, place: str, name: str
) -> None:
    attribute = {"source": place, "look_up_value_in": name, "event_property_name": "p"}
    conf = plugin.lua(
        SETTINGS | {"attributes": [attribute], "subject": {"look_up_value_in": place, "field": name}}
    )
    log = in_lua(serialized("authenticated").parsed)
    for values in (log["request"]["headers"], log["response"]["headers"]):
        values |= {"authorization": "hidden", "set-cookie": "hidden"}
    log["request"]["querystring"] = {"apikey": "hidden"}
    plugin.log(conf, log, ("request.headers.authorization", "hidden", "set"))
    (line,) = lines(plugin.folder)
    assert b"hidden" not in line


def test_payloads_and_error_texts_of_ai_plugins_are_left_out(plugin: LuaPlugin) -> None:
    record = written(
        plugin,
        ("ai.proxy.payload.request", "a prompt", "set"),
        ("ai.proxy.usage", {"prompt_tokens": 3}, "set"),
        ("ai.mcp", {"rpc": [{"payload": {"a": "prompt"}, "error": "a prompt"}, {"error": ""}]}, "set"),
    )
    assert record["log"]["ai"] == {
        "proxy": {"usage": {"prompt_tokens": 3}, "payload": True},
        "mcp": {"rpc": [{"payload": True, "error": True}, {"error": False}]},
    }


def test_a_header_with_a_dash_is_not_taken_for_one_with_an_underscore(plugin: LuaPlugin) -> None:
    attribute = {"source": "header", "look_up_value_in": "X_Tenant", "event_property_name": "tenant"}
    log = in_lua(serialized("authenticated").parsed)
    log["request"]["headers"] = {"x-tenant": "wrong"}
    plugin.log(plugin.lua(SETTINGS | {"attributes": [attribute]}), log)
    assert records(plugin.folder)[-1]["log"]["request"]["headers"] in ({}, [])


def test_bytes_that_are_not_utf_8_are_copied_as_kong_copies_them(plugin: LuaPlugin) -> None:
    log = in_lua(serialized("authenticated").parsed)
    log["request"]["headers"] = {"host": b"caf\xe9 \x01\n"}
    plugin.log(plugin.lua(configuration(EVERYTHING)), log)
    (line,) = lines(plugin.folder)
    assert b'"headers":{"host":"caf\xe9 \\u0001\\n"}' in line


def test_the_status_of_a_buffered_response_is_a_number_as_in_kongs_log(plugin: LuaPlugin) -> None:
    log = in_lua(serialized("authenticated").parsed)
    plugin.log(plugin.lua(SETTINGS), log | {"upstream_status": 200})
    plugin.log(plugin.lua(SETTINGS), log | {"upstream_status": "502, 200 : 200"})
    assert [record["log"]["upstream_status"] for record in records(plugin.folder)] == [200, "502, 200 : 200"]


def test_a_method_that_kong_takes_from_the_request_line_is_quoted(plugin: LuaPlugin) -> None:
    log = in_lua(serialized("authenticated").parsed)
    log["request"]["method"] = 'G"E\\T'
    plugin.log(plugin.lua(SETTINGS), log, unexpected=True)
    (record,) = records(plugin.folder)
    assert record["log"]["request"]["method"] == 'G"E\\T'


def test_a_log_of_ai_that_is_too_large_is_left_out_and_the_record_says_so(plugin: LuaPlugin) -> None:
    huge = {"rpc": [{"method": "x" * 3000} for _ in range(100)]}
    record = written(plugin, ("ai.mcp", huge, "set"), ("source", "kong", "set"), ai_llm_metrics=huge)
    assert record["cut"] is True
    assert "ai" not in record["log"]
    assert (record["log"]["source"], record["log"]["consumer"]["username"]) == ("kong", "alice")
    assert len(lines(plugin.folder)[-1]) < 2000


def test_a_log_of_ai_with_too_many_values_is_bounded(plugin: LuaPlugin) -> None:
    record = written(plugin, ("ai.mcp", {"rpc": [{"latency": n} for n in range(5000)]}, "set"))
    assert record["cut"] is True
    assert len(record["log"]["ai"]["mcp"]["rpc"]) <= 2000


def test_each_request_of_a_kong_that_makes_no_ids_has_one(plugin: LuaPlugin) -> None:
    log = in_lua(serialized("authenticated").parsed)
    del log["request"]["id"]
    for _ in range(2):
        plugin.log(plugin.lua(SETTINGS), log)
    first, second = (record["log"]["request"]["id"] for record in records(plugin.folder))
    assert first
    assert first != second
