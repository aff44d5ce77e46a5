"""The Lua schema, docs/plugin-settings.md and kong.yml, compared with the schema."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from lupa import luajit21

from openmeter_plugin.config.instance_config import parse_config
from openmeter_plugin.config.schema import FIELDS, NAME, VERSION, schema_lua
from openmeter_plugin.metering.rules import SkipReason
from tests import settings_reference

Value = dict[str, Any]


def described(fields: list[Value], at: str = "") -> Iterator[tuple[str, Value]]:
    """Yield each field with its path, including the fields of records and of lists of records."""
    for field in fields:
        ((name, description),) = field.items()
        yield f"{at}{name}", description
        inner = description.get("elements", description)
        yield from described(inner.get("fields", []), f"{at}{name}.")


ALL = dict(described(FIELDS))


def plain(value: Any) -> Any:
    """Convert a Lua value to Python; a table with a first element is a list."""
    if luajit21.lua_type(value) != "table":
        return value
    if 1 in value:
        return [plain(value[index]) for index in range(1, len(value) + 1)]
    return {key: plain(member) for key, member in value.items()}


# For a control plane that cannot query the plugin server


@pytest.fixture
def lua() -> Value:
    # As in Konnect: without Kong's globals and without `require`.
    runtime = luajit21.LuaRuntime(unpack_returned_tuples=True)
    runtime.execute("local all = _G; for name in pairs(all) do all[name] = nil end")
    loaded: Value = plain(runtime.execute(schema_lua()))
    return loaded


def test_the_lua_schema_equals_the_schema_for_kong(lua: Value) -> None:
    protocols, config = lua.pop("fields")
    assert lua == {"name": NAME}
    assert config == {"config": {"type": "record", "fields": FIELDS}}
    assert list(protocols) == ["protocols"]


def test_the_lua_schema_is_for_http_only_and_may_be_scoped_to_a_consumer(lua: Value) -> None:
    protocols = lua["fields"][0]["protocols"]
    http = ["grpc", "grpcs", "http", "https"]
    assert protocols["default"] == protocols["elements"]["one_of"] == http
    assert (protocols["type"], protocols["required"]) == ("set", True)
    assert not any("consumer" in field for field in lua["fields"])


def test_secrets_in_the_lua_schema_are_references_and_encrypted(lua: Value) -> None:
    token = next(field["api_token"] for field in lua["fields"][1]["config"]["fields"] if "api_token" in field)
    assert (token["referenceable"], token["encrypted"]) == (True, True)


def test_the_lua_schema_requires_nothing() -> None:
    assert "require(" not in schema_lua()
    assert "typedefs" not in schema_lua()


def test_the_command_prints_the_lua_schema_and_nothing_else() -> None:
    command = [sys.executable, "-m", "openmeter_plugin", "schema-lua"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, schema_lua(), "")
    assert VERSION in result.stdout.splitlines()[0]


# Kong's rules for schemas (3.9, metaschema.lua)


@pytest.mark.parametrize("at", sorted(ALL))
def test_every_description_has_a_length_that_kong_accepts(at: str) -> None:
    assert 10 <= len(ALL[at]["description"]) <= 500


def test_no_condition_matches_an_unset_field() -> None:
    # Seen on a real Kong: without `required`, an unset field matches any condition.
    records = [d.get("elements", d) for d in ALL.values()]
    conditions = [check["conditional"] for r in records for check in r.get("entity_checks", [])]
    assert len(conditions) == 6
    assert all(condition["if_match"]["required"] is True for condition in conditions)


def test_elements_of_a_setting_with_a_default_have_no_entity_checks() -> None:
    # Seen on a real Kong: else one start in six fails, "error in schema prevents from validating this field".
    with_default = [d for d in ALL.values() if "default" in d and "elements" in d]
    assert with_default
    assert "entity_checks" not in orjson.dumps(with_default).decode()


RELEASED_WITH_DEFAULTS = {
    *("meter_api_requests", "meter_ai_token_usage", "ssl_verify", "timeout", "keepalive", "source"),
    *("meter_anonymous_consumer", "application_context"),
    *("subject.look_up_value_in", "subject.fallbacks"),
    *("queue.max_batch_size", "queue.max_coalescing_delay", "queue.initial_retry_delay"),
    *("queue.max_retry_delay", "queue.concurrency_limit"),
}


def test_no_setting_is_added_with_a_default_or_as_required() -> None:
    # A control plane fills defaults in, and a data plane with an older schema rejects unknown fields.
    assert {at for at, description in ALL.items() if "default" in description} == RELEASED_WITH_DEFAULTS
    assert {at for at, description in ALL.items() if description.get("required")} == {
        *("ingest_endpoint", "subject.fallbacks.look_up_value_in"),
        *("attributes.source", "attributes.event_property_name"),
        *("units.name", "units.expression"),
    }


# docs/plugin-settings.md

PAGE = settings_reference.PAGE.read_text()


def test_the_pages_tables_are_up_to_date() -> None:
    assert settings_reference.written(PAGE) == PAGE, "run python -m tests.settings_reference"


def test_the_page_has_a_table_for_every_record() -> None:
    assert sorted(settings_reference.blocks(PAGE)) == sorted(settings_reference.records())


EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_on_the_page_is_a_valid_configuration(example: str) -> None:
    config = yaml.safe_load(example)
    parse_config(config)
    assert unknown(config, FIELDS) == []


def test_the_page_names_every_skip_reason() -> None:
    assert [reason for reason in SkipReason if f"`{reason}`" not in PAGE] == []


def unknown(config: Value, fields: list[Value]) -> list[str]:
    known = {name: description for field in fields for name, description in field.items()}
    found = [name for name in config if name not in known]
    for name, value in config.items():
        inner = known.get(name, {}).get("elements", known.get(name, {}))
        for record in value if isinstance(value, list) else [value]:
            if isinstance(record, dict) and "fields" in inner:
                found += unknown(record, inner["fields"])
    return found


def test_kong_yml_shows_every_setting() -> None:
    text = (Path(__file__).parents[3] / "kong.yml").read_text()
    plugin = text[text.index("- name: openmeter") :]
    assert [at for at in ALL if not re.search(rf"\b{at.rpartition('.')[2]}\b", plugin)] == []


def test_the_commented_settings_in_kong_yml_are_valid() -> None:
    text = (Path(__file__).parents[3] / "kong.yml").read_text()
    plugin = text[text.index("  - name: openmeter") :].replace("attributes: []", "attributes:")
    uncommented = re.sub(r"^( *)# ?( *(?:- )?[a-z_]+:(?: .*)?)$", r"\1\2", plugin, flags=re.MULTILINE)
    config = yaml.safe_load(uncommented)[0]["config"]
    parse_config(config)
    assert unknown(config, FIELDS) == []
    assert {"field", "missing", "fallback_subject", "require_consumer"} <= set(config["subject"])
    assert len(config["filters"]) == 6
