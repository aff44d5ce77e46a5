"""Validation of an instance's configuration: accepted values and error messages."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmeter_plugin.config.instance_config import (
    DROPPING_QUEUE_KEYS,
    ConfigError,
    PluginConfig,
    ineffective_queue_keys,
    parse_config,
    parse_object,
)
from openmeter_plugin.config.metering_settings import (
    SECRET_ARGUMENTS,
    SECRET_REQUEST_HEADERS,
    SECRET_RESPONSE_HEADERS,
)
from openmeter_plugin.config.schema import FIELDS
from openmeter_plugin.metering.event import RESERVED_DATA_KEYS
from openmeter_plugin.metering.rules import Attribute, Filters, Lookup, Rules
from tests.harness.recordings import WIRE
from tests.plugin.configurations import ENDPOINT, SECRET, Config, config, parsed


def recorded() -> Config:
    config: Config = json.loads((WIRE / "start-instance-full-schema.json").read_text())["config"]
    return config


def error_of(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(config(**changes))
    return str(caught.value)


# What is accepted


def test_kongs_recorded_configuration_is_accepted_in_full() -> None:
    model, rules = parse_config(recorded())
    assert model.ingest_endpoint == "http://127.0.0.1:9199/api/v1/events"
    assert model.api_token is not None
    assert model.api_token.get_secret_value() == "om-token-from-vault"
    assert (model.timeout, model.keepalive, model.ssl_verify) == (10_000, 60_000, True)
    assert (model.queue.max_batch_size, model.queue.max_coalescing_delay) == (1, 1)
    assert (model.queue.initial_retry_delay, model.queue.max_retry_delay) == (0.01, 60)
    assert rules.source == "kong"
    assert rules.lookups == (
        Lookup("application", "id"),
        Lookup("consumer", "id"),
        Lookup("header", "x-customer-id"),
    )
    assert rules.attributes == (Attribute("header", "x-department", "department"),)


def test_the_endpoint_alone_is_enough_and_the_rest_has_defaults() -> None:
    model, rules = parse_config({"ingest_endpoint": ENDPOINT})
    assert model.api_token is None
    assert rules.lookups == (Lookup("consumer", "id"), Lookup("application", "id"))
    assert (rules.meter_api_requests, rules.ai.token_usage) == (True, True)
    assert (rules.meter_anonymous_consumer, rules.application_context) == (False, "when_needed")


@pytest.mark.parametrize("empty", [{}, []], ids=["{}", "[]"])
def test_an_empty_lua_table_is_an_empty_list(empty: object) -> None:
    model, rules = parse_config(config(attributes=empty, subject={"fallbacks": empty}))
    assert model.attributes == ()
    assert rules.lookups == (Lookup("consumer", "id"),)


def test_an_empty_lua_table_is_a_record_of_defaults() -> None:
    model, rules = parse_config(config(queue={}, subject={}))
    assert model.queue == PluginConfig(ingest_endpoint=ENDPOINT).queue
    assert rules.lookups == (Lookup("consumer", "id"), Lookup("application", "id"))


def test_null_fields_count_as_absent() -> None:
    model, _ = parse_config(config(api_token=None, attributes=None, subject={"field": None}, queue=None))
    assert model == parse_config({"ingest_endpoint": ENDPOINT})[0]


def test_an_application_field_may_be_given_with_or_without_its_prefix() -> None:
    for field, expected in (("application_id", "id"), ("id", "id"), (None, "id"), ("portal_id", "portal_id")):
        _, rules = parse_config(config(subject={"look_up_value_in": "application", "field": field}))
        assert rules.lookups[0] == Lookup("application", expected)


def test_header_names_are_lower_case_and_argument_names_unchanged() -> None:
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


def test_a_repeated_lookup_is_used_once() -> None:
    subject = {"look_up_value_in": "consumer", "fallbacks": [{"look_up_value_in": "consumer", "field": "id"}]}
    _, rules = parse_config(config(subject=subject))
    assert rules.lookups == (Lookup("consumer", "id"),)


@pytest.mark.parametrize("token", ["  token\n", "token\r\n", "\ttoken"])
def test_white_space_around_a_token_is_stripped(token: str) -> None:
    model = parsed(api_token=token).api_token
    assert model is not None
    assert model.get_secret_value() == "token"


def test_an_empty_token_is_none() -> None:
    assert parsed(api_token=" \n").api_token is None


def test_integers_may_be_written_as_lua_floats() -> None:
    assert parsed(queue={"max_batch_size": 10.0}).queue.max_batch_size == 10


def test_settings_of_kongs_queue_that_drop_events_are_named() -> None:
    assert ineffective_queue_keys(recorded()) == ["max_retry_time", "max_entries"]
    assert ineffective_queue_keys({"queue": {"max_bytes": 0, "max_entries": None}}) == ["max_bytes"]


@pytest.mark.parametrize("queue", [None, [], "x", {}, {"max_batch_size": 3}])
def test_a_queue_without_dropping_settings_has_no_ineffective_key(queue: object) -> None:
    assert ineffective_queue_keys({"queue": queue}) == []
    assert ineffective_queue_keys({}) == []


def test_settings_that_drop_events_have_no_effect() -> None:
    with_them = parsed(queue=dict.fromkeys(DROPPING_QUEUE_KEYS, 1))
    assert with_them == parsed()


def test_a_consumers_tag_is_a_field_to_look_in() -> None:
    _, rules = parse_config(config(subject={"field": "tag"}))
    assert rules.lookups == (Lookup("consumer", "tag"), Lookup("application", "id"))


def test_the_policy_for_requests_without_a_subject_is_compiled() -> None:
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


def test_attributes_of_every_source_are_compiled_with_headers_in_lower_case() -> None:
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
    assert rules.queries_captures
    assert not parse_config(config(attributes=[constant]))[1].queries_captures


def test_filters_are_compiled_to_sets() -> None:
    filters = {
        "statuses": ["200-202", "404"],
        "methods": ["get"],
        "routes": ["a"],
        "services": ["b", "c"],
        "response_sources": ["kong"],
        "upstream_answered": True,
    }
    _, rules = parse_config(config(filters=filters))
    assert rules.filters == Filters(
        frozenset({200, 201, 202, 404}),
        frozenset({"GET"}),
        frozenset({"a"}),
        frozenset({"b", "c"}),
        frozenset({"kong"}),
        upstream_answered=True,
    )


@pytest.mark.parametrize(
    "filters", [None, {}, {"statuses": None, "routes": None}, {"upstream_answered": False}]
)
def test_filters_that_exclude_nothing_are_none(filters: object) -> None:
    assert parse_config(config(filters=filters))[1].filters is None


# What is refused


EMPTY_OR_NO_LIST: tuple[object, ...] = (SECRET, [], {})

WRONG: list[tuple[str, Config]] = [
    *(("ingest_endpoint", {"ingest_endpoint": value}) for value in (SECRET, "", 5, f"ftp://{SECRET}/x")),
    ("ingest_endpoint", {"ingest_endpoint": f"https://user:{SECRET}@host/"}),
    ("ingest_endpoint", {"ingest_endpoint": f"https://host/?token={SECRET}"}),
    ("ingest_endpoint", {"ingest_endpoint": f"https://u:{SECRET}/@host/"}),  # an invalid port
    ("ingest_endpoint", {"ingest_endpoint": f"https://[{SECRET}]/"}),
    (
        "ingest_endpoint",
        {"ingest_endpoint": f"https://u:{SECRET}\N{ACCOUNT OF}@host/"},
    ),  # urlsplit's error would show it
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
    ("filters.upstream_answered", {"filters": {"upstream_answered": SECRET}}),
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
def test_an_invalid_value_is_refused_with_its_field_and_without_the_value(
    field: str, changes: Config
) -> None:
    message = error_of(**changes)
    assert message.startswith(f"{field}: ")
    assert SECRET not in message


def test_the_missing_endpoint_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^ingest_endpoint: Field required$"):
        parse_config({"api_token": SECRET})


def test_one_error_names_every_invalid_field() -> None:
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
def test_an_attribute_that_carries_credentials_is_refused_in_any_case(place: str, name: str) -> None:
    attribute = {"source": place, "look_up_value_in": name.upper(), "event_property_name": "x"}
    assert error_of(attributes=[attribute]).startswith("attributes.0: ")


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("header", "apikey api-key x-api-key x-auth-token x-access-token authorization proxy-authorization"),
        ("header", "cookie set-cookie"),
        ("response_header", "apikey api-key x-api-key x-auth-token x-access-token authorization cookie"),
        ("response_header", "proxy-authorization set-cookie set-cookie2 www-authenticate proxy-authenticate"),
        ("response_header", "authentication-info proxy-authentication-info"),
        ("query", "apikey api_key api-key key token access_token refresh_token id_token"),
        ("query", "jwt client_secret password"),
    ],
)
def test_the_usual_names_of_credentials_are_known(place: str, names: str) -> None:
    for name in names.split():
        attribute = {"source": place, "look_up_value_in": name, "event_property_name": "x"}
        assert "carries credentials" in error_of(attributes=[attribute]), name


@pytest.mark.parametrize("name", sorted(RESERVED_DATA_KEYS))
def test_an_attribute_of_a_property_that_the_plugin_sets_is_accepted_without_effect(name: str) -> None:
    attribute = {"source": "query", "look_up_value_in": "a", "event_property_name": name}
    model, rules = parse_config(config(attributes=[attribute]))
    assert rules.attributes == ()
    assert model.ineffective_attributes == [name]


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", SECRET.encode()])
def test_a_configuration_that_is_not_an_object_is_refused_without_its_content(raw: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^the configuration is not (JSON|an object)$"):
        parse_object(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**7) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([next(iter(f)) for f in FIELDS]), json_values, max_size=4))
def test_any_configuration_is_accepted_or_refused_with_a_config_error(changes: Config) -> None:
    refused = ""
    try:
        parse_config(config(**changes))
    except ConfigError as error:
        refused = str(error)
    assert SECRET not in refused


def test_the_token_is_never_in_a_representation_of_the_configuration() -> None:
    model = parsed()
    for shown in (repr(model), str(model), f"{model!r}", repr(model.model_dump()), model.model_dump_json()):
        assert SECRET not in shown


def test_kong_s_name_for_the_filter_of_statuses_is_the_same_filter() -> None:
    _, rules = parse_config(config(allow_status_codes=["200-201", "404"]))
    assert rules.filters == Filters(statuses=frozenset({200, 201, 404}))
    _, rules = parse_config(config(allow_status_codes=[], filters={"methods": ["GET"]}))
    assert rules.filters == Filters(methods=frozenset({"GET"}))


def test_both_names_of_the_filter_of_statuses_at_once_are_refused_by_both_names() -> None:
    with pytest.raises(ConfigError, match=r"allow_status_codes: .*filters\.statuses: set one of the two"):
        parse_config(config(allow_status_codes=["200"], filters={"statuses": ["200"]}))


def test_a_status_that_is_none_is_refused_by_kong_s_name() -> None:
    with pytest.raises(ConfigError, match="allow_status_codes: a status is a number such as 404"):
        parse_config(config(allow_status_codes=["2xx"]))
