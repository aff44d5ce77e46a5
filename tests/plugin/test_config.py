"""The plugin's configuration as Kong passes it: what is accepted, and what an error says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from openmeter_plugin.config import (
    DROPPING_QUEUE_KEYS,
    ConfigError,
    PluginConfig,
    ineffective_queue_keys,
    parse_config,
    parse_object,
)
from openmeter_plugin.event import RESERVED_DATA_KEYS
from openmeter_plugin.metering import SECRET_ARGUMENTS, SECRET_REQUEST_HEADERS, SECRET_RESPONSE_HEADERS
from openmeter_plugin.rules import Attribute, Filters, Lookup, Rules
from openmeter_plugin.schema import FIELDS, plugin_info
from tests.harness.recordings import WIRE

ENDPOINT = "https://eu.api.konghq.com/v3/openmeter/events"
SECRET = "s3cr3t-value-of-this-test"

Config = dict[str, Any]


def recorded() -> Config:
    config: Config = json.loads((WIRE / "start-instance-full-schema.json").read_text())["config"]
    return config


def config(**changes: object) -> Config:
    return {"ingest_endpoint": ENDPOINT, "api_token": SECRET} | changes


def parsed(**changes: object) -> PluginConfig:
    return parse_config(config(**changes))[0]


def error_of(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(config(**changes))
    return str(caught.value)


# What is accepted


def test_kongs_recorded_configuration_is_accepted_in_full() -> None:
    made, rules = parse_config(recorded())
    assert made.ingest_endpoint == "http://127.0.0.1:9199/api/v1/events"
    assert made.api_token is not None
    assert made.api_token.get_secret_value() == "om-token-from-vault"
    assert (made.timeout, made.keepalive, made.ssl_verify) == (10_000, 60_000, True)
    assert (made.queue.max_batch_size, made.queue.max_coalescing_delay) == (1, 1)
    assert (made.queue.initial_retry_delay, made.queue.max_retry_delay) == (0.01, 60)
    assert rules.source == "kong"
    assert rules.lookups == (
        Lookup("application", "id"),
        Lookup("consumer", "id"),
        Lookup("header", "x-customer-id"),
    )
    assert rules.attributes == (Attribute("header", "x-department", "department"),)


def test_the_endpoint_alone_is_enough_and_the_rest_has_defaults() -> None:
    made, rules = parse_config({"ingest_endpoint": ENDPOINT})
    assert made.api_token is None
    assert rules.lookups == (Lookup("consumer", "id"), Lookup("application", "id"))
    assert (rules.meter_api_requests, rules.meter_ai_token_usage) == (True, True)
    assert (rules.meter_anonymous_consumer, rules.application_context) == (False, "when_needed")


@pytest.mark.parametrize("empty", [{}, []], ids=["{}", "[]"])
def test_a_lua_table_that_is_empty_is_an_empty_list(empty: object) -> None:
    made, rules = parse_config(config(attributes=empty, subject={"fallbacks": empty}))
    assert made.attributes == ()
    assert rules.lookups == (Lookup("consumer", "id"),)


def test_an_empty_lua_table_is_a_record_of_defaults() -> None:
    made, rules = parse_config(config(queue={}, subject={}))
    assert made.queue == PluginConfig(ingest_endpoint=ENDPOINT).queue
    assert rules.lookups == (Lookup("consumer", "id"), Lookup("application", "id"))


def test_fields_that_are_null_are_as_if_absent() -> None:
    made, _ = parse_config(config(api_token=None, attributes=None, subject={"field": None}, queue=None))
    assert made == parse_config({"ingest_endpoint": ENDPOINT})[0]


def test_an_application_field_may_be_given_with_or_without_its_prefix() -> None:
    for field, expected in (("application_id", "id"), ("id", "id"), (None, "id"), ("portal_id", "portal_id")):
        _, rules = parse_config(config(subject={"look_up_value_in": "application", "field": field}))
        assert rules.lookups[0] == Lookup("application", expected)


def test_a_headers_name_is_looked_for_in_lower_case_as_kong_logs_it_and_an_arguments_as_it_is() -> None:
    _, rules = parse_config(
        config(
            subject={
                "look_up_value_in": "header",
                "field": "X-Customer",
                "fallbacks": [{"look_up_value_in": "query", "field": "Customer"}],
            }
        )
    )
    assert rules.lookups == (Lookup("header", "x-customer"), Lookup("query", "Customer"))


def test_a_lookup_that_is_given_twice_is_made_once() -> None:
    subject = {"look_up_value_in": "consumer", "fallbacks": [{"look_up_value_in": "consumer", "field": "id"}]}
    _, rules = parse_config(config(subject=subject))
    assert rules.lookups == (Lookup("consumer", "id"),)


@pytest.mark.parametrize("token", ["  token\n", "token\r\n", "\ttoken"])
def test_white_space_around_a_token_is_not_part_of_it(token: str) -> None:
    made = parsed(api_token=token).api_token
    assert made is not None
    assert made.get_secret_value() == "token"


def test_an_empty_token_is_none() -> None:
    assert parsed(api_token=" \n").api_token is None


def test_whole_numbers_may_come_as_lua_writes_them() -> None:
    assert parsed(queue={"max_batch_size": 10.0}).queue.max_batch_size == 10


def test_the_keys_of_kongs_queue_that_drop_events_are_named_where_they_are_set() -> None:
    assert ineffective_queue_keys(recorded()) == ["max_retry_time", "max_entries"]
    assert ineffective_queue_keys({"queue": {"max_bytes": 0, "max_entries": None}}) == ["max_bytes"]


@pytest.mark.parametrize("queue", [None, [], "x", {}, {"max_batch_size": 3}])
def test_a_queue_without_them_has_no_key_without_effect(queue: object) -> None:
    assert ineffective_queue_keys({"queue": queue}) == []
    assert ineffective_queue_keys({}) == []


def test_the_keys_that_drop_events_limit_nothing() -> None:
    with_them = parsed(queue=dict.fromkeys(DROPPING_QUEUE_KEYS, 1))
    assert with_them == parsed()


def test_a_consumers_tag_is_a_field_to_look_in() -> None:
    _, rules = parse_config(config(subject={"field": "tag"}))
    assert rules.lookups == (Lookup("consumer", "tag"), Lookup("application", "id"))


def test_what_becomes_of_a_request_without_a_subject_is_configured() -> None:
    assert parse_config(config())[1].missing == "skip"
    _, rules = parse_config(config(subject={"missing": "fallback", "fallback_subject": "unassigned"}))
    assert (rules.missing, rules.fallback_subject, rules.require_consumer) == (
        "fallback",
        "unassigned",
        False,
    )
    assert parse_config(config(subject={"missing": "quarantine", "require_consumer": True}))[1] == Rules(
        source="kong", missing="quarantine", require_consumer=True
    )


def test_attributes_of_each_source_are_compiled_headers_in_lower_case() -> None:
    sources = ("header", "query", "response_header", "path_capture", "consumer_tag")
    attributes = [{"source": s, "look_up_value_in": "Some-Name", "event_property_name": s} for s in sources]
    constant = {"source": "constant", "value": "Some-Name", "event_property_name": "c"}
    _, rules = parse_config(config(attributes=[*attributes, constant]))
    assert [(a.place, a.name) for a in rules.attributes] == [
        ("header", "some-name"),
        ("query", "Some-Name"),
        ("response_header", "some-name"),
        ("path_capture", "Some-Name"),
        ("consumer_tag", "Some-Name"),
        ("constant", "Some-Name"),
    ]
    assert rules.asks_captures
    assert not parse_config(config(attributes=[constant]))[1].asks_captures


def test_filters_are_compiled_to_sets() -> None:
    filters = {
        "statuses": ["200-202", "404"],
        "methods": ["get"],
        "routes": ["a"],
        "services": ["b", "c"],
        "response_sources": ["kong"],
    }
    _, rules = parse_config(config(filters=filters))
    assert rules.filters == Filters(
        frozenset({200, 201, 202, 404}),
        frozenset({"GET"}),
        frozenset({"a"}),
        frozenset({"b", "c"}),
        frozenset({"kong"}),
    )


@pytest.mark.parametrize("filters", [None, {}, {"statuses": None, "routes": None}])
def test_filters_that_exclude_nothing_are_none(filters: object) -> None:
    assert parse_config(config(filters=filters))[1].filters is None


# What is refused

EMPTY_OR_NO_LIST: tuple[object, ...] = (SECRET, [], {})

WRONG: list[tuple[str, Config]] = [
    *(("ingest_endpoint", {"ingest_endpoint": value}) for value in (SECRET, "", 5, f"ftp://{SECRET}/x")),
    ("ingest_endpoint", {"ingest_endpoint": f"https://user:{SECRET}@host/"}),
    ("ingest_endpoint", {"ingest_endpoint": f"https://host/?token={SECRET}"}),
    ("ingest_endpoint", {"ingest_endpoint": f"https://u:{SECRET}/@host/"}),  # the port that is none
    ("ingest_endpoint", {"ingest_endpoint": f"https://[{SECRET}]/"}),
    ("ingest_endpoint", {"ingest_endpoint": f"https://u:{SECRET}\N{ACCOUNT OF}@host/"}),  # urlsplit shows it
    ("ingest_endpoint", {"ingest_endpoint": f"https:///{SECRET}"}),
    *(
        ("api_token", {"api_token": value})
        for value in (f"{SECRET}\n2", f"{SECRET}é", [SECRET], {"a": SECRET})
    ),
    ("meter_api_requests", {"meter_api_requests": SECRET}),
    ("meter_ai_token_usage", {"meter_ai_token_usage": [SECRET]}),
    ("meter_anonymous_consumer", {"meter_anonymous_consumer": SECRET}),
    ("ssl_verify", {"ssl_verify": SECRET}),
    *(("timeout", {"timeout": value}) for value in (0, -1, SECRET)),
    *(("keepalive", {"keepalive": value}) for value in (-1, SECRET)),
    *(("source", {"source": value}) for value in ("", "s" * 257, 3)),
    ("application_context", {"application_context": SECRET}),
    ("subject", {"subject": SECRET}),
    ("subject.look_up_value_in", {"subject": {"look_up_value_in": SECRET}}),
    ("subject", {"subject": {"look_up_value_in": "header"}}),
    ("subject", {"subject": {"look_up_value_in": "query"}}),
    ("subject", {"subject": {"look_up_value_in": "header", "field": "Authorization"}}),
    ("subject", {"subject": {"look_up_value_in": "query", "field": "apikey"}}),
    ("subject", {"subject": {"look_up_value_in": "consumer", "field": SECRET}}),
    ("subject", {"subject": {"look_up_value_in": "application", "field": SECRET}}),
    ("subject.field", {"subject": {"field": ""}}),
    ("subject.fallbacks", {"subject": {"fallbacks": SECRET}}),
    ("subject.fallbacks.1", {"subject": {"fallbacks": [{}, {"look_up_value_in": "header"}]}}),
    ("subject.fallbacks.0.look_up_value_in", {"subject": {"fallbacks": [{"look_up_value_in": SECRET}]}}),
    ("attributes", {"attributes": SECRET}),
    ("attributes.0.source", {"attributes": [{"look_up_value_in": "a", "event_property_name": "b"}]}),
    ("attributes.0", {"attributes": [{"source": "query", "event_property_name": "b"}]}),
    ("attributes.0", {"attributes": [{"source": "path_capture", "event_property_name": "b"}]}),
    ("attributes.0", {"attributes": [{"source": "constant", "event_property_name": "b"}]}),
    (
        "attributes.0.value",
        {"attributes": [{"source": "constant", "value": "", "event_property_name": "b"}]},
    ),
    ("subject.missing", {"subject": {"missing": SECRET}}),
    ("subject", {"subject": {"missing": "fallback"}}),
    ("subject.fallback_subject", {"subject": {"missing": "fallback", "fallback_subject": ""}}),
    ("subject.fallback_subject", {"subject": {"missing": "fallback", "fallback_subject": "s" * 1025}}),
    ("subject.require_consumer", {"subject": {"require_consumer": SECRET}}),
    ("filters", {"filters": SECRET}),
    *(
        ("filters", {"filters": {"statuses": [value]}})
        for value in (SECRET, "2xx", "99", "600", "299-200", "200-", "-200", "200-2999", "٢٠٠", " 200", 7)
    ),
    *(
        (f"filters.{name}", {"filters": {name: value}})
        for name in ("statuses", "methods", "routes", "services", "response_sources")
        for value in EMPTY_OR_NO_LIST
    ),
    *((f"filters.{name}.0", {"filters": {name: [""]}}) for name in ("methods", "routes", "services")),
    ("filters.response_sources.0", {"filters": {"response_sources": [SECRET]}}),
    ("attributes.0.event_property_name", {"attributes": [{"source": "query", "look_up_value_in": "b"}]}),
    ("queue", {"queue": SECRET}),
    *(
        ("queue.max_batch_size", {"queue": {"max_batch_size": value}})
        for value in (0, 1_000_001, 1.5, SECRET)
    ),
    *(("queue.max_coalescing_delay", {"queue": {"max_coalescing_delay": value}}) for value in (-1, 3601)),
    ("queue.initial_retry_delay", {"queue": {"initial_retry_delay": 0}}),
    ("queue.max_retry_delay", {"queue": {"max_retry_delay": 0}}),
]


@pytest.mark.parametrize(("field", "changes"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_a_wrong_value_is_refused_with_the_name_of_its_field_and_without_the_value(
    field: str, changes: Config
) -> None:
    message = error_of(**changes)
    assert message.startswith(f"{field}: ")
    assert SECRET not in message


def test_the_missing_endpoint_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^ingest_endpoint: Field required$"):
        parse_config({"api_token": SECRET})


def test_every_field_that_is_wrong_is_named_in_one_error() -> None:
    message = error_of(timeout=0, queue={"max_batch_size": 0}, source="")
    assert [part.split(":")[0] for part in message.split("; ")] == [
        "timeout",
        "queue.max_batch_size",
        "source",
    ]


@pytest.mark.parametrize(
    ("place", "name"),
    [("header", n) for n in sorted(SECRET_REQUEST_HEADERS)]
    + [("response_header", n) for n in sorted(SECRET_RESPONSE_HEADERS)]
    + [("query", n) for n in sorted(SECRET_ARGUMENTS)],
)
def test_what_carries_credentials_is_no_attribute_however_it_is_written(place: str, name: str) -> None:
    attribute = {"source": place, "look_up_value_in": name.upper(), "event_property_name": "x"}
    assert error_of(attributes=[attribute]).startswith("attributes.0: ")


@pytest.mark.parametrize("name", sorted(RESERVED_DATA_KEYS))
def test_no_attribute_takes_the_place_of_a_property_of_the_event(name: str) -> None:
    attribute = {"source": "query", "look_up_value_in": "a", "event_property_name": name}
    assert name in error_of(attributes=[attribute])


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", SECRET.encode()])
def test_what_is_no_object_is_refused_without_its_content(raw: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^the configuration is not (JSON|an object)$"):
        parse_object(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**7) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([next(iter(f)) for f in FIELDS]), json_values, max_size=4))
def test_any_configuration_is_accepted_or_refused_with_a_config_error(changes: Config) -> None:
    refused = ""
    try:
        parse_config(config(**changes))
    except ConfigError as error:
        refused = str(error)
    assert SECRET not in refused


def test_the_token_is_never_in_what_a_configuration_shows_of_itself() -> None:
    made = parsed()
    for shown in (repr(made), str(made), f"{made!r}", repr(made.model_dump()), made.model_dump_json()):
        assert SECRET not in shown


# The schema for Kong beside the model


def schema_fields(fields: list[Config]) -> dict[str, Config]:
    return {name: description for field in fields for name, description in field.items()}


def pairs(
    fields: list[Config], model: type[BaseModel], at: str = ""
) -> Iterator[tuple[str, Config, FieldInfo | None]]:
    """Each field of the schema with its field of the model, records and arrays of records walked into."""
    described = schema_fields(fields)
    for name in [*described, *(n for n in model.model_fields if n not in described)]:
        info = model.model_fields.get(name)
        description = described.get(name, {})
        yield f"{at}{name}", description, info
        inner = description.get("elements", description)
        if info is not None and inner.get("type") == "record":
            yield from pairs(inner["fields"], record_of(info), f"{at}{name}.")


def record_of(info: FieldInfo) -> type[BaseModel]:
    for candidate in (info.annotation, *get_args(info.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    raise AssertionError(f"{info!r} holds no record")


WITHOUT_EFFECT = {f"queue.{key}" for key in DROPPING_QUEUE_KEYS}
DEFAULTS_IN_THE_MODEL = {"subject.missing": "skip", "subject.require_consumer": False}
"""Kong is told of none: a control plane would fill it in, and an older data plane refuse it."""
PAIRS = {at: (description, info) for at, description, info in pairs(FIELDS, PluginConfig)}


def test_schema_and_model_have_the_same_fields_but_for_those_without_effect() -> None:
    assert {at for at, (description, _) in PAIRS.items() if not description} == set()
    assert {at for at, (_, info) in PAIRS.items() if info is None} == WITHOUT_EFFECT


@pytest.mark.parametrize("at", sorted(set(PAIRS) - WITHOUT_EFFECT))
def test_schema_and_model_agree_on_a_fields_default_and_whether_it_must_be_there(at: str) -> None:
    description, info = PAIRS[at]
    assert info is not None
    if description["type"] == "record":
        return  # Kong fills a record's fields in, the model makes one: the fields are compared
    default = info.get_default()
    if at in DEFAULTS_IN_THE_MODEL:
        assert "default" not in description
        assert default == DEFAULTS_IN_THE_MODEL[at]
    elif "default" in description:
        dumped = (
            json.loads(json.dumps([item.model_dump(exclude_none=True) for item in default]))
            if isinstance(default, tuple)
            else default
        )
        assert dumped == description["default"]
    elif "fallbacks." not in at:  # a fallback's place is demanded by Kong, and has a default here
        assert info.is_required() == bool(description.get("required"))
        assert info.is_required() or not default


@pytest.mark.parametrize("at", sorted(at for at, (d, _) in PAIRS.items() if "one_of" in d))
def test_schema_and_model_agree_on_the_values_to_choose_from(at: str) -> None:
    description, info = PAIRS[at]
    if at in WITHOUT_EFFECT:
        return
    assert info is not None
    allowed = get_args(info.annotation)
    assert sorted(allowed) == sorted(description["one_of"])


def bounds(description: Config) -> list[Any]:
    """Values that Kong's validation lets through only just."""
    if description["type"] == "array":
        return []  # of the filters, tested by what is in them
    if "between" in description:
        return list(description["between"])
    if "gt" in description:
        return [description["gt"] + 0.001]
    lengths = [description[key] for key in ("len_min", "len_max") if key in description]
    return ["x" * length for length in lengths]


@pytest.mark.parametrize("at", sorted(at for at, (d, _) in PAIRS.items() if bounds(d)))
def test_what_kong_lets_through_is_not_refused_here(at: str) -> None:
    outer, _, inner = at.rpartition(".")
    for value in bounds(PAIRS[at][0]):
        if outer.endswith("fallbacks"):
            parsed(subject={"fallbacks": [{"look_up_value_in": "header", inner: value}]})
        elif outer == "subject":
            parsed(subject={"look_up_value_in": "header", "field": "x"} | {inner: value})
        elif outer == "attributes":
            whole = {"source": "query", "look_up_value_in": "a", "event_property_name": "b"}
            parsed(attributes=[whole | {inner: value}])
        else:
            parsed(**({outer: {inner: value}} if outer else {inner: value}))


def test_secrets_are_marked_for_kong_as_references_and_to_be_encrypted() -> None:
    token = PAIRS["api_token"][0]
    assert (token["type"], token["referenceable"], token["encrypted"]) == ("string", True, True)
    assert PAIRS["ingest_endpoint"][0]["referenceable"] is True


def test_kong_is_told_what_its_query_command_expects() -> None:
    info = json.loads(json.dumps(plugin_info()))
    (plugin,) = info.pop("Plugins")
    assert info == {"Protocol": "ProtoBuf:1"}
    assert (plugin["Name"], plugin["Phases"], plugin["Priority"]) == ("openmeter", ["log"], 15)
    assert plugin["Schema"] == {
        "name": "openmeter",
        "fields": [{"config": {"type": "record", "fields": FIELDS}}],
    }


# Kong's own plugin `metering-and-billing`, from its published schema (Kong Gateway 3.15)

KONGS_OWN: dict[str, tuple[str, list[Any] | None]] = {
    "api_token": ("string", None),
    "attributes": ("array", None),
    "attributes.event_property_name": ("string", None),
    "attributes.look_up_value_in": ("string", None),
    "attributes.source": ("string", ["header", "query"]),
    "ingest_endpoint": ("string", None),
    "keepalive": ("number", None),
    "meter_ai_token_usage": ("boolean", None),
    "meter_api_requests": ("boolean", None),
    "queue": ("record", None),
    "queue.concurrency_limit": ("integer", [-1, 1]),
    "queue.initial_retry_delay": ("number", None),
    "queue.max_batch_size": ("integer", None),
    "queue.max_bytes": ("integer", None),
    "queue.max_coalescing_delay": ("number", None),
    "queue.max_entries": ("integer", None),
    "queue.max_retry_delay": ("number", None),
    "queue.max_retry_time": ("number", None),
    "ssl_verify": ("boolean", None),
    "subject": ("record", None),
    "subject.field": ("string", None),
    "subject.look_up_value_in": ("string", ["application", "consumer", "header", "query"]),
    "timeout": ("number", None),
}

KONGS_BETWEEN = {
    "queue.initial_retry_delay": [0.001, 1_000_000],
    "queue.max_batch_size": [1, 1_000_000],
    "queue.max_coalescing_delay": [0, 3600],
    "queue.max_entries": [1, 1_000_000],
    "queue.max_retry_delay": [0.001, 1_000_000],
}


@pytest.mark.parametrize("at", sorted(KONGS_OWN))
def test_a_setting_of_kongs_own_plugin_is_there_with_its_name_type_and_values(at: str) -> None:
    kind, values = KONGS_OWN[at]
    description, _ = PAIRS[at]
    assert description["type"] == kind
    assert set(values or ()) <= set(description.get("one_of", ()))
    assert ("one_of" in description) == (values is not None)
    assert description.get("between") == KONGS_BETWEEN.get(at, description.get("between"))


def test_nothing_that_kongs_own_plugin_leaves_out_is_demanded() -> None:
    added = {at for at in PAIRS if at not in KONGS_OWN}
    demanded = {
        at for at in added if PAIRS[at][0].get("required") and not at.startswith("subject.fallbacks.")
    }
    assert demanded == set()
    assert added == {
        *("application_context", "meter_anonymous_consumer", "source", "subject.fallbacks"),
        *("subject.fallbacks.field", "subject.fallbacks.look_up_value_in"),
        *("subject.missing", "subject.fallback_subject", "subject.require_consumer", "attributes.value"),
        *("filters", "filters.statuses", "filters.methods", "filters.routes", "filters.services"),
        "filters.response_sources",
    }


def test_a_configuration_of_kongs_own_plugin_with_every_setting_is_accepted() -> None:
    made, rules = parse_config(
        config(
            attributes=[
                {
                    "event_property_name": "department",
                    "look_up_value_in": "X-Department-Id",
                    "source": "header",
                }
            ],
            keepalive=60_000,
            meter_ai_token_usage=False,
            meter_api_requests=True,
            queue={
                "concurrency_limit": -1,
                "initial_retry_delay": 0.5,
                "max_batch_size": 10,
                "max_bytes": 1000,
                "max_coalescing_delay": 2,
                "max_entries": 5,
                "max_retry_delay": 30,
                "max_retry_time": 60,
            },
            ssl_verify=False,
            subject={"field": "x-customer-id", "look_up_value_in": "header"},
            timeout=3000,
        )
    )
    assert (made.timeout, made.ssl_verify, made.queue.max_batch_size) == (3000, False, 10)
    assert made.queue.concurrency_limit == -1
    assert rules.meter_ai_token_usage is False
    assert rules.lookups[0] == Lookup("header", "x-customer-id")
    assert rules.attributes == (Attribute("header", "x-department-id", "department"),)
