"""Invalid settings: refused by Kong if its schema can express it, else with field and reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmeter_plugin.config.instance_config import _URI_REFERENCE, ConfigError, parse_config
from openmeter_plugin.config.metering_settings import APPLICATION_FIELDS, CONSUMER_FIELDS
from openmeter_plugin.config.schema import FIELDS
from openmeter_plugin.http_log.config import load
from openmeter_plugin.instances.instance import destination_of
from syncd.sandbox.cloudevents import is_uri_reference

URL = "http://127.0.0.1:9/api/v1/events"


def problem(**config: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config({"ingest_endpoint": URL} | config)
    return str(caught.value)


def file_problem(directory: Path, text: str) -> str:
    path = directory / "openmeter-plugin.yaml"
    path.write_text(f"ingest_endpoint: {URL}\n{text}")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    return str(caught.value).removeprefix(f"{path}: ")


# Messages


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"filters": {"statuses": "200"}}, "filters.statuses: must be a list"),
        ({"attributes": {"source": "constant"}}, "attributes: must be a list"),
        ({"queue": 5}, "queue: must be a mapping"),
        ({"subject": {"look_up_value_in": "header"}}, "subject: look_up_value_in: header needs a field"),
        ({"timeout": float("inf")}, "timeout: Input should be a finite number"),
        ({"queue": {"max_retry_delay": float("inf")}}, "queue.max_retry_delay: Input should be a finite"),
    ],
)
def test_the_message_uses_terms_of_the_configuration(config: dict[str, Any], message: str) -> None:
    assert problem(**config).startswith(message)


@pytest.mark.parametrize("url", ["http://h/x y", "http://exa mple/x", "http://h/\x00", "http://h/a\nb"])
def test_an_unusable_endpoint_is_refused(url: str) -> None:
    assert problem(ingest_endpoint=url) == "ingest_endpoint: must be a URL without spaces and line breaks"


def test_a_line_break_after_an_endpoint_from_a_secret_store_is_stripped() -> None:
    raw = {"ingest_endpoint": f"{URL}\n", "__plugin_id": "p"}
    config, _ = parse_config(raw)
    assert destination_of(raw, config) == destination_of(raw | {"ingest_endpoint": URL}, config)
    assert destination_of(raw, config).endpoint == URL


# The file of the http-log input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ingest_endpoint: http://other/x\n", "ingest_endpoint: is set twice, the second time in line 2"),
        ("subject:\n  field: id\n  field: tag\n", "field: is set twice, the second time in line 4"),
        ("attributes: " + "[" * 5000, "is nested too deeply"),
        ("attributes: &all [*all]\n", "may contain only texts, numbers, lists and mappings"),
        ("api_token: !!binary aGVsbG8=\n", "may contain only texts, numbers, lists and mappings"),
        ("timeout: .inf\n", "timeout: Input should be a finite number"),
        ("http_log: {secret: []}\n", "http_log.secret: must have at least one"),
        ("http_log: {secrets: x}\n", "http_log.secrets: there is no such setting"),
    ],
)
def test_mistakes_that_yaml_permits_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert file_problem(tmp_path, text).startswith(message)


def test_a_file_with_keys_that_are_not_texts_is_refused_with_a_message(tmp_path: Path) -> None:
    assert "no such setting" in file_problem(tmp_path, "5: 6\n")
    assert "is not YAML" in file_problem(tmp_path, "? [a]\n: b\n")


def test_a_file_may_use_yaml_merge_keys(tmp_path: Path) -> None:
    path = tmp_path / "openmeter-plugin.yaml"
    path.write_text(
        f"ingest_endpoint: {URL}\n"
        "attributes:\n"
        "  - &one {source: constant, value: a, event_property_name: x}\n"
        "  - {<<: *one, event_property_name: y}\n"
    )
    attributes = json.loads(load(path, {}).plugin)["attributes"]
    assert [a["event_property_name"] for a in attributes] == ["x", "y"]
    assert {a["value"] for a in attributes} == {"a"}


# Refused by Kong's entity checks and patterns (3.9, schema/init.lua)


def field(fields: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry[name] for entry in fields if name in entry)
    return found


def kong_refuses(entity: dict[str, Any]) -> bool:
    for check in field(FIELDS, "subject")["entity_checks"]:
        condition = check["conditional"]
        value, match = entity.get(condition["if_field"]), condition["if_match"]
        if value is None or value not in match.get("one_of", [match.get("eq")]):
            continue
        then, wanted = entity.get(condition["then_field"]), condition["then_match"]
        if (then is None and wanted.get("required")) or (
            then is not None and then not in wanted.get("one_of", [then])
        ):
            return True
    return False


@pytest.mark.parametrize("place", ["consumer", "application", "header", "query"])
@pytest.mark.parametrize(
    "name", [None, *CONSUMER_FIELDS, *APPLICATION_FIELDS, "application_id", "email", "x-app"]
)
def test_kong_and_the_plugin_refuse_the_same_lookups(place: str, name: str | None) -> None:
    entity = {"look_up_value_in": place} | ({"field": name} if name else {})
    try:
        parse_config({"ingest_endpoint": URL, "subject": entity})
        refused = False
    except ConfigError:
        refused = True
    assert kong_refuses(entity) is refused


@pytest.mark.parametrize(
    ("url", "valid"),
    [
        (URL, True),
        ("https://eu.api.konghq.com/v3/openmeter/events", True),
        (f"{URL}\n", True),
        ("nonsense", False),
        ("ftp://h/x", False),
        ("http://", False),
        ("http://user:secret@h/x", False),
        ("http://h/x?token=secret", False),
        ("http://h/x y", False),
    ],
)
def test_kong_and_the_plugin_refuse_the_same_endpoints(url: str, valid: bool) -> None:
    (pattern,) = field(FIELDS, "ingest_endpoint")["match_any"]["patterns"]
    assert bool(re.search(pattern.replace("%", "\\"), url)) is valid
    try:
        parse_config({"ingest_endpoint": url})
    except ConfigError:
        assert not valid
    else:
        assert valid


@pytest.mark.parametrize(
    "source",
    ["kong", "urn:kong:eu", "//10.0.0.1:8000", "//[::1]:8000/a", "http://kong:8000/x", "a/b:c", "a%20b", "é"],
)
def test_a_uri_reference_can_be_the_source(source: str) -> None:
    assert parse_config({"ingest_endpoint": URL, "source": source})[1].source == source
    assert kong_takes_source(source)


@pytest.mark.parametrize("source", ["10.0.0.1:8000", "[::1]:8000", "1kong:eu", "host_1:80/x"])
def test_a_source_such_as_host_and_port_is_refused_by_kong_and_the_plugin(source: str) -> None:
    assert problem(source=source).startswith("source: must be a URI reference")
    assert not kong_takes_source(source)


def kong_takes_source(source: str) -> bool:
    patterns = field(FIELDS, "source")["match_any"]["patterns"]
    return any(
        re.search(pattern.replace("%a", "[A-Za-z]").replace("%w", "A-Za-z0-9"), source)
        for pattern in patterns
    )


@pytest.mark.parametrize("source", ["kong%", "a%zz", "a\tb", "//h:port/", "http://[::1/", "a\x7f"])
def test_a_source_that_only_the_plugin_can_check_is_refused_by_name(source: str) -> None:
    assert problem(source=source).startswith("source: must be a URI reference")


@pytest.mark.slow
@given(st.text(st.sampled_from("ab1:/?#[]@%2F. \t\x7fé"), min_size=1, max_size=12))
@settings(max_examples=2_000)
def test_no_source_is_accepted_that_openmeter_refuses(source: str) -> None:
    if _URI_REFERENCE.fullmatch(source):
        assert is_uri_reference(source)
