"""Kong's schema of the plugin, compared with the configuration models and with Kong's own plugin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from openmeter_plugin.config.instance_config import (
    DROPPING_QUEUE_KEYS,
    ConfigError,
    PluginConfig,
    ineffective_queue_keys,
    parse_config,
)
from openmeter_plugin.config.schema import FIELDS, plugin_info
from openmeter_plugin.metering.rules import Attribute, Lookup
from tests.plugin.configurations import Config, config, parsed
from tests.specs import SPECS_DIR

# The schema and the models


def schema_fields(fields: list[Config]) -> dict[str, Config]:
    return {name: description for field in fields for name, description in field.items()}


def pairs(
    fields: list[Config], model: type[BaseModel], at: str = ""
) -> Iterator[tuple[str, Config, FieldInfo | None]]:
    """Yield each field of the schema with its field of the model, recursively."""
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
"""Not in the schema: a control plane would fill the default in, and an older data plane reject it."""
PAIRS = {at: (description, info) for at, description, info in pairs(FIELDS, PluginConfig)}


def test_schema_and_model_have_the_same_fields_except_those_without_effect() -> None:
    assert {at for at, (description, _) in PAIRS.items() if not description} == set()
    assert {at for at, (_, info) in PAIRS.items() if info is None} == WITHOUT_EFFECT


# Records have no default in the schema, but one in the models, so only their fields are compared.
@pytest.mark.parametrize(
    "at", sorted(at for at in set(PAIRS) - WITHOUT_EFFECT if PAIRS[at][0]["type"] != "record")
)
def test_schema_and_model_agree_on_defaults_and_required_fields(at: str) -> None:
    description, info = PAIRS[at]
    assert info is not None
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
    elif "fallbacks." not in at:  # Kong requires a fallback's place; the model has a default
        assert info.is_required() == bool(description.get("required"))
        assert info.is_required() or not default


@pytest.mark.parametrize(
    "at", sorted(at for at, (d, _) in PAIRS.items() if "one_of" in d and at not in WITHOUT_EFFECT)
)
def test_schema_and_model_agree_on_allowed_values(at: str) -> None:
    description, info = PAIRS[at]
    assert info is not None
    # An optional setting is a union of its values and None.
    allowed = [v for a in get_args(info.annotation) for v in get_args(a) or [a] if v is not type(None)]
    assert sorted(allowed) == sorted(description["one_of"])


def bounds(description: Config) -> list[Any]:
    """Return the extreme values that Kong's validation accepts."""
    if description["type"] == "array":
        return []  # filters are tested by their elements
    if "between" in description:
        return list(description["between"])
    if "gt" in description:
        return [description["gt"] + 0.001]
    lengths = [description[key] for key in ("len_min", "len_max") if key in description]
    return ["x" * length for length in lengths]


@pytest.mark.parametrize("at", sorted(at for at, (d, _) in PAIRS.items() if bounds(d)))
def test_the_model_accepts_what_kong_accepts(at: str) -> None:
    outer, _, inner = at.rpartition(".")
    for value in bounds(PAIRS[at][0]):
        if outer.endswith("fallbacks"):
            parsed(subject={"fallbacks": [{"look_up_value_in": "header", inner: value}]})
        elif outer == "subject":
            parsed(subject={"look_up_value_in": "header", "field": "x"} | {inner: value})
        elif outer == "units":
            # Kong does not check that an expression is arithmetic.
            unit = {"name": "credits", "expression": "input"} | {inner: value.replace("x", "1")}
            parsed(units=[unit])
        elif outer == "attributes":
            whole = {"source": "query", "look_up_value_in": "a", "event_property_name": "b"}
            parsed(attributes=[whole | {inner: value}])
        else:
            parsed(**({outer: {inner: value}} if outer else {inner: value}))


def test_secrets_are_marked_as_referenceable_and_encrypted() -> None:
    token = PAIRS["api_token"][0]
    assert (token["type"], token["referenceable"], token["encrypted"]) == ("string", True, True)
    assert PAIRS["ingest_endpoint"][0]["referenceable"] is True


def test_plugin_info_is_what_kongs_query_command_expects() -> None:
    info = json.loads(json.dumps(plugin_info()))
    (plugin,) = info.pop("Plugins")
    assert info == {"Protocol": "ProtoBuf:1"}
    assert (plugin["Name"], plugin["Phases"], plugin["Priority"]) == ("openmeter", ["log"], 15)
    assert plugin["Schema"] == {
        "name": "openmeter",
        "fields": [{"config": {"type": "record", "fields": FIELDS}}],
    }


# Kong's own plugin `metering-and-billing`, from its published schema (Kong Gateway 3.16)


KONG_PLUGIN: dict[str, tuple[str, list[Any] | None]] = {
    "allow_status_codes": ("array", None),
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
    "queue.breaker_cooldown": ("number", None),
    "queue.concurrency_limit": ("integer", [-1, 1]),
    "queue.failure_threshold": ("integer", None),
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

KONG_PLUGIN_BETWEEN: dict[str, list[float]] = {
    "queue.failure_threshold": [0, 1_000_000],
    "queue.initial_retry_delay": [0.001, 1_000_000],
    "queue.max_batch_size": [1, 1_000_000],
    "queue.max_coalescing_delay": [0, 3600],
    "queue.max_entries": [1, 1_000_000],
    "queue.max_retry_delay": [0.001, 1_000_000],
}


ADDED_IN_3_16 = {"allow_status_codes", "queue.breaker_cooldown", "queue.failure_threshold"}
PUBLISHED = SPECS_DIR / "kong-metering-and-billing-plugin-3.15.json"


@pytest.mark.skipif(not PUBLISHED.exists(), reason="Kong's published schema is not at hand (tests/specs.py)")
def test_the_table_of_kongs_own_plugin_is_its_published_schema_of_3_15_and_what_3_16_added() -> None:
    published = dict(published_fields(json.loads(PUBLISHED.read_text())["properties"]["config"]))
    assert {at: kind for at, kind in KONG_PLUGIN.items() if at not in ADDED_IN_3_16} == {
        at: ({"object": "record"}.get(field["type"], field["type"]), field.get("enum"))
        for at, field in published.items()
    }
    ranges = {
        at: [field["minimum"], field["maximum"]] for at, field in published.items() if "minimum" in field
    }
    assert {at: between for at, between in KONG_PLUGIN_BETWEEN.items() if at not in ADDED_IN_3_16} == ranges


def published_fields(record: dict[str, Any], at: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, field in record["properties"].items():
        yield f"{at}{name}", field
        inner = field.get("items", field)
        if "properties" in inner:
            yield from published_fields(inner, f"{at}{name}.")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timeout": 0}, "timeout"),
        ({"keepalive": -1}, "keepalive"),
        ({"ingest_endpoint": "openmeter:8888"}, "ingest_endpoint"),
        ({"allow_status_codes": ["2xx"]}, "allow_status_codes"),
        ({"allow_status_codes": ["200"], "filters": {"statuses": ["200"]}}, "filters.statuses"),
        ({"subject": {"look_up_value_in": "header"}}, "look_up_value_in"),
        ({"subject": {"look_up_value_in": "consumer", "field": "email"}}, "subject"),
    ],
)
def test_a_value_that_kongs_schema_lets_pass_but_that_cannot_work_is_refused_with_its_name(
    changes: Config, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config(config(**changes))


@pytest.mark.parametrize("at", sorted(KONG_PLUGIN))
def test_every_setting_of_kongs_own_plugin_has_its_name_type_and_values(at: str) -> None:
    kind, values = KONG_PLUGIN[at]
    description, _ = PAIRS[at]
    assert description["type"] == kind
    assert set(values or ()) <= set(description.get("one_of", ()))
    assert ("one_of" in description) == (values is not None)
    assert description.get("between") == KONG_PLUGIN_BETWEEN.get(at, description.get("between"))


def test_no_additional_setting_is_required() -> None:
    added = {at for at in PAIRS if at not in KONG_PLUGIN}
    required_fields = {
        at
        for at in added
        if PAIRS[at][0].get("required") and not at.startswith(("subject.fallbacks.", "units."))
    }
    assert required_fields == set()
    assert added == {
        *("application_context", "meter_anonymous_consumer", "source", "subject.fallbacks"),
        *("subject.fallbacks.field", "subject.fallbacks.look_up_value_in"),
        *("subject.missing", "subject.fallback_subject", "subject.require_consumer", "attributes.value"),
        *("filters", "filters.statuses", "filters.methods", "filters.routes", "filters.services"),
        *("filters.response_sources", "filters.upstream_answered"),
        *("ai_tokens", "ai_cache_hits", "meter_ai_calls", "meter_agent_requests"),
        *("units", "units.name", "units.expression"),
        *("subject_prefixes", "subject_prefixes.consumer", "subject_prefixes.application"),
    }


def test_a_configuration_of_kongs_own_plugin_with_every_setting_is_accepted() -> None:
    config_model, rules = parse_config(
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
    assert (config_model.timeout, config_model.ssl_verify, config_model.queue.max_batch_size) == (
        3000,
        False,
        10,
    )
    assert config_model.queue.concurrency_limit == -1
    assert rules.ai.token_usage is False
    assert rules.lookups[0] == Lookup("header", "x-customer-id")
    assert rules.attributes == (Attribute("header", "x-department-id", "department"),)


def of_kongs_plugin(at: str) -> st.SearchStrategy[Any]:
    """Values that Kong's own schema accepts for a setting; negative times make no sense there either."""
    kind, values = KONG_PLUGIN[at]
    if values is not None:
        return st.sampled_from(values)
    between = KONG_PLUGIN_BETWEEN.get(at, [1, 1_000_000])
    low, high = between[0], int(between[1])
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "boolean": st.booleans(),
        "integer": st.integers(int(low), high),
        "number": st.integers(max(1, int(low)), high) | st.floats(max(low, 0.001), high),
        "string": st.sampled_from(["x-department-id", "department", "status", "model", "ai_usage_gap"])
        | st.text(min_size=1),
    }
    return kinds[kind]


def members_of_kongs_plugin(outer: str, *required: str) -> st.SearchStrategy[Config]:
    names = [at.rpartition(".")[2] for at in KONG_PLUGIN if at.rpartition(".")[0] == outer]
    values = {name: of_kongs_plugin(f"{outer}.{name}") for name in names}
    optional = {name: value for name, value in values.items() if name not in required}
    return st.fixed_dictionaries({name: values[name] for name in required}, optional=optional)


subjects_of_kongs_plugin = st.sampled_from(
    [
        {},
        *({"look_up_value_in": "consumer", "field": field} for field in ("id", "username", "custom_id")),
        {"look_up_value_in": "application"},
        {"look_up_value_in": "header", "field": "X-Customer"},
        {"look_up_value_in": "query", "field": "customer"},
    ]
)


@given(
    st.fixed_dictionaries(
        {
            "ingest_endpoint": st.sampled_from(
                [
                    "https://us.api.konghq.com/v3/openmeter/events",
                    "http://openmeter:8888/api/v1/events",
                ]
            ),
            "api_token": st.just("kpat_x"),
        },
        optional={
            **{
                at: of_kongs_plugin(at) for at in ("meter_api_requests", "meter_ai_token_usage", "ssl_verify")
            },
            **{at: of_kongs_plugin(at) for at in ("timeout", "keepalive")},
            "allow_status_codes": st.lists(st.sampled_from(["200-299", "404", "500-599"]), max_size=3),
            "attributes": st.lists(
                members_of_kongs_plugin("attributes", "event_property_name", "look_up_value_in", "source"),
                max_size=3,
            ),
            "queue": members_of_kongs_plugin("queue"),
            "subject": subjects_of_kongs_plugin,
        },
    )
)
def test_every_configuration_of_kongs_own_plugin_is_valid_here(given: Config) -> None:
    model, rules = parse_config(given)
    assert unknown_settings(given) == []
    assert rules.meter_api_requests is given.get("meter_api_requests", True)
    allowed = given.get("allow_status_codes")
    assert (rules.filters is not None) == bool(allowed)
    # What has no effect here is named at the start, so that nothing differs in silence.
    named = {*ineffective_queue_keys(given), *model.ineffective_attributes}
    silent = {*given.get("queue", {}), *(a["event_property_name"] for a in given.get("attributes", ()))}
    assert {*DROPPING_QUEUE_KEYS, "status", "model"} & silent <= named


def unknown_settings(given: Config) -> list[str]:
    return [name for name in given if name not in {key for field in FIELDS for key in field}]
