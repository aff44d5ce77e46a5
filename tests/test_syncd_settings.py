"""docs/syncd-settings.md matches the models, and each environment variable in it sets its setting."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from syncd.config.settings import Config, load
from syncd.config.sources import SOURCE_TYPES
from tests import settings_reference
from tests.syncd_settings import Setting, sections

PAGE = settings_reference.SYNCD_PAGE.read_text()
SECTIONS = sections()

_METERING = {"url": "http://openmeter"}
_SOURCES: dict[str, dict[str, Any]] = {
    "kong-admin": {"url": "http://kong"},
    "konnect-consumers": {"region": "eu", "control_plane_id": "plane"},
    "konnect-applications": {"region": "eu", "portal_id": "portal"},
    "declarative-file": {"path": "kong.yml"},
    "applications-file": {"path": "applications.json"},
    "static": {"subjects": []},
}
_GATEWAY = {"name": "east", "url": "http://gateway"}

# The value to try for a setting: by its name if its type allows few values, else by its type.
_BY_NAME: dict[str, Any] = {
    "sources": [{"type": "static", "subjects": [], "name": "other"}],
    "gateways": [{"name": "west", "url": "http://west"}],
    "ignore": [{"subject": "other", "reason": "another"}],
    "mapping": {"overflow": "split"},
    "usage": {"keep": "77d"},
    "keep": "77d",
    "meters": {"kong_llm_calls": ["model"]},
    "prices": {"currency": "USD", "rates": [{"meter": "other", "amount": 1}]},
    "rates": [{"meter": "other", "amount": 1}],
    "currency": "USD",
    "policy_options": {"detach_after": "41d"},
    "guards": {"min_changes": 7},
    "schedule": {"jitter": "7s"},
    "daemon": {"keep_runs": "7d"},
    "create": {"currency": "EUR"},
    "subject_prefixes": {"consumer": "user/"},
    "billing_address": {"city": "Bonn"},
    "metering": {"url": "http://elsewhere"},
    "group_key": "team-{group}",
    "group_name": "Team {group}",
    "key": "{kind}-{username}",
    "cron": "*/10 * * * *",
    "region": "us",
    "customer_url": "https://billing.example.com/{id}",
    "token": "at-least-sixteen-characters",
    "notify": {"timeout": "7s"},
    "urls": ["json://hooks.example.com/billing"],
    "topics": ["blocked"],
    "summary": "0 9 * * 1",
    "state_url": "postgresql://syncd@db.example.com/syncd",
}
_BY_KIND: dict[str, Any] = {
    "URL": "http://elsewhere",
    "URL or `unix:/path`": "unix:/run/openmeter/api",
    "duration": "77d",
    "template": "{username}",
    "string": "some-other",
    "secret string": "at-least-sixteen-characters",
    "label": "team-a",
    "path": "/srv/other",
    "host:port": "127.0.0.1:7",
    "day": "2026-12-31",
    "list of strings": ["visitor"],
    "map of strings": {"externalId": "{custom_id}"},
}


def tried(setting: Setting) -> Any:
    """Return a valid value of the setting other than its default."""
    if setting.name in _BY_NAME:
        return _BY_NAME[setting.name]
    if setting.kind in _BY_KIND:
        return _BY_KIND[setting.kind]
    if setting.kind.startswith("integer"):
        return 17
    allowed = [value.strip("`") for value in setting.kind.split(" or ")]
    return next(value for value in allowed if f"`{value}`" != setting.default)


def document(kind: str, **more: Any) -> dict[str, Any]:
    """Return a minimal configuration with a source of this kind."""
    return {
        "sources": [{"type": kind, **_SOURCES[kind]}],
        "metering": _METERING,
        "gateways": [_GATEWAY],
        "ignore": [{"subject": "healthcheck", "reason": "ours"}],
        "prices": {"currency": "EUR", "rates": [{"meter": "kong_api_requests", "amount": 1}]},
        **more,
    }


def loaded(folder: Path, kind: str) -> Config:
    needs = {"daemon": {"token": "x" * 16}, "mapping": {"file": "customers.csv"}}
    path = folder / "syncd.yaml"
    path.write_text(yaml.safe_dump(document(kind, **needs)))
    return load(path)


def read(config: Config, setting: Setting) -> Any:
    value: Any = config
    for part in setting.place:
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    return value


def test_the_page_is_up_to_date() -> None:
    assert settings_reference.written_syncd(PAGE) == PAGE, "run python -m tests.settings_reference"


def test_every_section_has_a_table() -> None:
    assert sorted(settings_reference.blocks(PAGE)) == sorted(SECTIONS)


def test_every_setting_of_the_configuration_is_in_the_page() -> None:
    assert {setting.name for setting in SECTIONS["settings"]} == set(Config.model_fields)


@pytest.mark.parametrize(
    ("section", "setting"),
    [
        pytest.param(section, setting, id=f"{section}:{setting.name}")
        for section, settings in SECTIONS.items()
        for setting in settings
        if setting.variable and setting.name != "type"
    ],
)
def test_the_variable_of_a_setting_sets_it(
    section: str, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SYNCD_")]:
        monkeypatch.delenv(name)
    # The files and proxies of this test do not exist.
    monkeypatch.setattr("syncd.config.settings._check_connections", lambda _config: None)
    kind = section.removeprefix("sources.") if section.startswith("sources.") else "declarative-file"
    if (kind, setting.name) in {("konnect-consumers", "url"), ("konnect-applications", "url")}:
        monkeypatch.setitem(_SOURCES, kind, {k: v for k, v in _SOURCES[kind].items() if k != "region"})
        monkeypatch.setitem(_SOURCES[kind], "url", "http://konnect")
    before = read(loaded(tmp_path, kind), setting)
    value = tried(setting)
    assert setting.variable
    monkeypatch.setenv(setting.variable, value if isinstance(value, str) else json.dumps(value))
    assert read(loaded(tmp_path, kind), setting) != before


def test_every_type_of_source_has_a_heading() -> None:
    assert set(_SOURCES) == SOURCE_TYPES
    assert [kind for kind in _SOURCES if f"### {kind}\n" not in PAGE] == []
