"""The factory: sources, target and rules from a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd.config.settings import Config, load
from syncd.core.errors import ConfigError
from syncd.metering.v3 import OpenMeterV3
from syncd.runs.factory import metering_endpoint, rules_of, sources_of, target_of
from syncd.sources.kong_admin import KongAdmin
from syncd.sources.konnect import KonnectApplications, KonnectConsumers

KONNECT = """
sources:
- {type: konnect-consumers, region: eu, control_plane_id: cp, token: kpat_a, tags: [metered], name: europe}
- {type: konnect-applications, url: "http://127.0.0.1:9", portal_id: portal, token: kpat_b}
- {type: kong-admin, url: "http://127.0.0.1:8001"}
metering: {dialect: openmeter-v3, url: "https://eu.api.konghq.com"}
"""

MINIMAL = """
sources: [{type: static, subjects: []}]
metering: {url: "http://127.0.0.1:8888"}
"""


def loaded(folder: Path, text: str) -> Config:
    path = folder / "syncd.yaml"
    path.write_text(text)
    return load(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text)
    return str(caught.value)


def test_sources_are_named_by_their_name_or_else_by_type_and_location(tmp_path: Path) -> None:
    consumers, applications, kong = sources_of(loaded(tmp_path, KONNECT))
    assert [source.name for source in (consumers, applications, kong)] == [
        "europe",
        "konnect-applications-1",
        "kong-admin-2",
    ]
    assert isinstance(consumers, KonnectConsumers)
    assert (consumers.endpoint.url, consumers.endpoint.token) == ("https://eu.api.konghq.com", "kpat_a")
    assert (consumers.control_plane_id, consumers.tags) == ("cp", ("metered",))
    assert isinstance(applications, KonnectApplications)
    assert applications.endpoint.url == "http://127.0.0.1:9"
    assert isinstance(kong, KongAdmin)


def test_the_same_configuration_makes_equal_sources_so_readings_can_be_reused(
    tmp_path: Path,
) -> None:
    config = loaded(tmp_path, KONNECT)
    assert sources_of(config, sleep=lambda _: None) == sources_of(config)


def test_two_sources_of_the_same_name_are_refused(tmp_path: Path) -> None:
    text = MINIMAL.replace("subjects: []}", "subjects: [], name: a}, {type: static, subjects: [], name: a}")
    assert "two sources are called a" in refusal(tmp_path, text)


@pytest.mark.parametrize("place", ["", "region: eu, url: 'http://127.0.0.1:9', "])
def test_a_konnect_source_needs_one_place(tmp_path: Path, place: str) -> None:
    source = f"{{type: konnect-consumers, {place}control_plane_id: cp}}"
    text = f"sources: [{source}]\nmetering: {{url: 'http://127.0.0.1:8888'}}\n"
    assert "needs either region (such as us or eu) or url" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://eu.api.konghq.com", "https://eu.api.konghq.com/v3"),
        ("https://eu.api.konghq.com/v3", "https://eu.api.konghq.com/v3"),
        ("http://openmeter:8888", "http://openmeter:8888/api/v3"),
        ("http://openmeter:8888/api/v3/", "http://openmeter:8888/api/v3"),
    ],
)
def test_the_paths_of_v3_are_found_on_konnect_and_on_ones_own_server(
    tmp_path: Path, url: str, base: str
) -> None:
    config = loaded(tmp_path, KONNECT.replace("https://eu.api.konghq.com", url))
    assert metering_endpoint(config).url == base
    target = target_of(config)
    assert isinstance(target, OpenMeterV3)
    target.close()


def test_mapping_rules_come_from_the_configuration_and_the_mapping_file(tmp_path: Path) -> None:
    (tmp_path / "customers.csv").write_text("id,customer\n1,acme\n")
    config = loaded(
        tmp_path,
        KONNECT
        + """
mapping:
  group_by: file
  file: customers.csv
  name: "Ms {username}"
  max_subjects_per_customer: 1
  overflow: split
  create:
    email: "{username}@x.example"
    billing_address: {country: DE}
    metadata: {externalId: "{custom_id}"}
""",
    )
    rules = rules_of(config)
    assert (rules.group_by, rules.max_subjects_per_customer, rules.overflow) == ("file", 1, "split")
    assert [row.customer for row in rules.assignments] == ["acme"]
    assert (rules.templates.name, rules.templates.email) == ("Ms {username}", "{username}@x.example")
    assert rules.templates.billing_address == {"country": "DE"}
    assert rules.labels_only


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("key: '{usrname}'", "mapping.key: can use only the fields"),
        ("key: '{subject'", "mapping.key: is not a template"),
        ("key: '{username!r}'", "mapping.key: can use only the fields"),
        ("key: '{0}'", "mapping.key: can use only the fields"),
        ("key: fixed", "key must contain"),
        ("group_key: all", "group_key must contain {group}"),
        ("group_name: '{username}'", "mapping.group_name: can use only the fields {group}"),
        ("create: {metadata: {sync-owner: me}}", "reserved for syncd's own metadata"),
        ("create: {metadata: {externalId: '{x}'}}", "mapping.create.metadata: can use only"),
        ("create: {billing_address: {planet: x}}", "mapping.create.billing_address.planet"),
        ("group_by: file", "so file must be set"),
        ("max_subjects_per_customer: 0", "mapping.max_subjects_per_customer"),
    ],
)
def test_an_invalid_mapping_is_refused_at_the_start(tmp_path: Path, setting: str, says: str) -> None:
    assert says in refusal(tmp_path, f"{MINIMAL}mapping: {{{setting}}}\n")


def test_a_missing_mapping_file_stops_the_run(tmp_path: Path) -> None:
    config = loaded(tmp_path, MINIMAL + "mapping: {group_by: file, file: gone.csv}\n")
    with pytest.raises(ConfigError, match=r"gone\.csv"):
        rules_of(config)
