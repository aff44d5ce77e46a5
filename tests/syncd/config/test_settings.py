from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from syncd.config.settings import Config, load
from syncd.config.sources import ApplicationsFileSource, DeclarativeFileSource, KongAdminSource
from syncd.core.errors import ConfigError

MINIMAL = """
sources: [{type: declarative-file, path: kong.yml}]
metering: {url: "http://127.0.0.1:8888"}
"""


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SYNCD_CONFIG", "SYNCD_METERING__TOKEN", "SYNCD_METERING__URL"):
        monkeypatch.delenv(name, raising=False)


def loaded(folder: Path, text: str) -> Config:
    path = folder / "syncd.yaml"
    path.write_text(text)
    return load(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text)
    return str(caught.value)


def test_the_defaults_never_delete_and_listen_on_loopback(tmp_path: Path) -> None:
    config = loaded(tmp_path, MINIMAL)
    assert config.policy == "upsert-only"
    assert config.owner_id == "default"
    assert config.mapping.group_by == "tag"
    assert config.mapping.subject_field == "id"
    assert not config.mapping.include_anonymous
    assert config.schedule.interval == timedelta(minutes=5)
    assert config.daemon.listen.url == "http://127.0.0.1:8890"


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = MINIMAL.replace("path: kong.yml", "path: ../kong.yml").replace(
        "}]", "}, {type: applications-file, path: /srv/apps.json}]", 1
    )
    first, second = loaded(tmp_path, text).sources
    assert isinstance(first, DeclarativeFileSource)
    assert first.path == tmp_path / "../kong.yml"
    assert isinstance(second, ApplicationsFileSource)
    assert second.path == Path("/srv/apps.json")


def test_the_environment_takes_precedence_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_METERING__TOKEN", "from-environment")
    monkeypatch.setenv("SYNCD_SCHEDULE__INTERVAL", "30s")
    config = loaded(tmp_path, MINIMAL + "schedule: {interval: 1h}\n")
    assert config.metering.token is not None
    assert config.metering.token.get_secret_value() == "from-environment"
    assert config.metering.url == "http://127.0.0.1:8888"
    assert config.schedule.interval == timedelta(seconds=30)


def test_the_environment_can_set_the_token_of_one_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_SOURCES__1__TOKEN", "kong-secret")
    text = MINIMAL.replace("}]", '}, {type: kong-admin, url: "http://kong:8001"}]', 1)
    first, second = loaded(tmp_path, text).sources
    assert isinstance(first, DeclarativeFileSource)
    assert isinstance(second, KongAdminSource)
    assert second.url == "http://kong:8001"
    assert second.token is not None
    assert second.token.get_secret_value() == "kong-secret"


def test_an_environment_variable_for_a_missing_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_SOURCES__7__TOKEN", "kong-secret")
    message = refusal(tmp_path, MINIMAL)
    assert "SYNCD_SOURCES__7__" in message
    assert "kong-secret" not in message


def test_an_environment_variable_for_an_unknown_setting_of_a_section_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_METERING__TOKNE", "secret-value")
    message = refusal(tmp_path, MINIMAL)
    assert "SYNCD_METERING__TOKNE" in message
    assert "did you mean SYNCD_METERING__TOKEN?" in message
    assert "secret-value" not in message


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("metering: {url: 'http://x'}", "sources"),
        ("sources: []\nmetering: {url: 'http://x'}", "sources"),
        ("sources: [{type: static, subjects: []}]", "metering"),
        (MINIMAL + "polciy: upsert-only", "polciy"),
        (MINIMAL + "policy: mirror", "policy"),
        (MINIMAL + "policy_options: {detach_after: 40d, delete_after: 39d}", "policy_options"),
        (MINIMAL + "guards: {max_update_percent: 101}", "guards.max_update_percent"),
        (MINIMAL + "guards: {min_changes: 0}", "guards.min_changes"),
        (MINIMAL + "schedule: {cron: '61 * * * *'}", "schedule.cron"),
        (MINIMAL + "schedule: {interval: 5}", "schedule.interval"),
        (MINIMAL + "schedule: {interval: 0s}", "schedule.interval"),
        (MINIMAL + "owner_id: 'a--b'", "owner_id"),
        (MINIMAL + "owner_id: ''", "owner_id"),
        (MINIMAL + "mapping: {group_by: nobody}", "mapping.group_by"),
        (MINIMAL + "daemon: {listen: '0.0.0.0:8890'}", "daemon: listen is not a loopback address"),
        (MINIMAL + "daemon: {listen: '0.0.0.0:8890'}", "token must be set (SYNCD_DAEMON__TOKEN)"),
        (MINIMAL + "daemon: {listen: '0.0.0.0:8890', token: ''}", "daemon.token: must not be empty"),
        (MINIMAL + "daemon: {token: ' '}", "daemon.token: must not be empty"),
        (MINIMAL + "mapping: {subject_field: tag, group_by: none}", "group_by must be tag"),
        (MINIMAL + "daemon: {listen: '8890'}", "daemon.listen"),
        (MINIMAL.replace("http://", "ftp://"), "metering.url"),
        (MINIMAL.replace("declarative-file", "konnect-consumers"), "sources[0]"),
        (MINIMAL.replace("path:", "file:"), "sources[0].path"),
        (
            "sources: [{type: static, subjects: [{key: ''}]}]\nmetering: {url: 'http://x'}",
            "sources[0].subjects[0].key",
        ),
        (
            "sources: [{type: static, subjects: [{key: a, metadata: {sync-owner: me}}]}]\nmetering: {url: 'http://x'}",
            "sources[0].subjects[0].metadata",
        ),
        (
            "sources: [{type: kong-admin, url: 'http://k', tags: ['a,b']}]\nmetering: {url: 'http://x'}",
            "sources[0].tags[0]",
        ),
    ],
)
def test_an_invalid_setting_is_refused_with_its_name_and_the_file(
    tmp_path: Path, text: str, field: str
) -> None:
    message = refusal(tmp_path, text)
    assert field in message
    assert str(tmp_path / "syncd.yaml") in message


def test_the_guards_and_grace_periods_have_careful_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path, MINIMAL)
    assert config.policy_options.detach_after == timedelta(days=40)
    assert config.policy_options.delete_after is None
    guards = config.guards
    assert (guards.max_update_percent, guards.max_removal_percent, guards.min_changes) == (30, 30, 10)
    assert guards.max_changes is None


def test_the_state_folder_follows_the_conventions_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/srv/state:/other")
    assert loaded(tmp_path, MINIMAL).daemon.state_dir == Path("/srv/state")
    here = loaded(tmp_path, MINIMAL + "daemon: {state_dir: here}").daemon.state_dir
    assert here == tmp_path / "here"
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert loaded(tmp_path, MINIMAL).daemon.state_dir == Path("/var/lib/syncd")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/jane/state")
    assert loaded(tmp_path, MINIMAL).daemon.state_dir == Path("/home/jane/state/syncd")


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL.replace('"http://127.0.0.1:8888"', '"http://user:hunter2@host"'),
        MINIMAL + "owner_id: [hunter2]",
        MINIMAL.replace('"}', '", token: [hunter2]}'),
        "metering: {token: hunter2\n  url: x: y",
    ],
)
def test_a_refusal_never_repeats_the_value(tmp_path: Path, text: str) -> None:
    assert "hunter2" not in refusal(tmp_path, text)


def test_a_token_is_not_shown_when_the_configuration_is_printed(tmp_path: Path) -> None:
    config = loaded(tmp_path, MINIMAL.replace('"}', '", token: hunter2}'))
    assert "hunter2" not in repr(config)
    assert "hunter2" not in config.model_dump_json()


def test_an_address_beyond_loopback_is_accepted_with_a_token(tmp_path: Path) -> None:
    config = loaded(tmp_path, MINIMAL + "daemon: {listen: '0.0.0.0:8890', token: a-token-of-16-or-more}")
    assert not config.daemon.listen.is_loopback


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "1: 2\n", "'a", "sources: &x [*x]", "a: 1\n---\nb: 2\n"])
def test_a_file_that_is_not_a_mapping_of_settings_is_refused(tmp_path: Path, text: str) -> None:
    assert "syncd.yaml" in refusal(tmp_path, text)


def test_the_example_of_the_documentation_is_valid() -> None:
    path = Path(__file__).parents[3] / "docs" / "examples" / "syncd.yaml"
    config = load(path)
    assert config.mapping.group_by == "tag"
    assert [source.type for source in config.sources] == ["declarative-file", "applications-file"]


def test_the_address_to_listen_on_can_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_DAEMON__LISTEN", "127.0.0.1:1234")
    assert loaded(tmp_path, MINIMAL).daemon.listen.port == 1234


def test_an_unreadable_environment_variable_is_refused_without_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_DAEMON", "{secret-value")
    message = refusal(tmp_path, MINIMAL)
    assert "SYNCD_DAEMON" in message
    assert "secret-value" not in message
