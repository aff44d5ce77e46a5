"""What the configuration says about slips of the pen: the setting, the line, and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd.config.settings import Config, load
from syncd.config.sources import StaticSource
from syncd.config.variables import variables_of
from syncd.core.errors import ConfigError

MINIMAL = """\
sources: [{type: declarative-file, path: kong.yml}]
metering: {url: "http://127.0.0.1:8888"}
"""
TYPES = "applications-file, declarative-file, kong-admin, konnect-applications, konnect-consumers, static"
ALL = f"The types: {TYPES}"
NAME = "must be 1 to 63 letters, digits, dots, dashes and underscores, and begin with a letter or a digit"


def loaded(folder: Path, text: str) -> Config:
    path = folder / "syncd.yaml"
    path.write_text(text)
    return load(path)


def faults(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(str(folder / "syncd.yaml"))
    return [line.strip() for line in rest] or [first.removeprefix(f"{folder / 'syncd.yaml'}").lstrip(": ")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            MINIMAL.replace("url:", "ulr:"),
            [
                "line 2, column 1: metering.url: is required (environment: SYNCD_METERING__URL)",
                "line 2, column 12: metering.ulr: there is no such setting; did you mean `url`?",
            ],
        ),
        (
            MINIMAL + "polciy: sync\n",
            ["line 3, column 1: polciy: there is no such setting; did you mean `policy`?"],
        ),
        (
            MINIMAL.replace("{type: declarative-file", "{type: declarativ-file"),
            [
                (
                    f"line 1, column 11: sources[0]: there is no such type of source; "
                    f"did you mean declarative-file? {ALL}"
                )
            ],
        ),
        (
            MINIMAL.replace("type: declarative-file, ", ""),
            [f"line 1, column 11: sources[0]: a source needs a type: {TYPES}"],
        ),
        (
            MINIMAL.replace("path:", "pth:"),
            [
                "line 1, column 11: sources[0].path: is required (environment: SYNCD_SOURCES__0__PATH)",
                "line 1, column 36: sources[0].pth: there is no such setting; did you mean `path`?",
            ],
        ),
        (
            "sources: kong\nmetering: {url: 'http://x'}\n",
            ["line 1, column 1: sources: must be a list"],
        ),
        ("sources: []\nmetering: {url: 'http://x'}\n", ["line 1, column 1: sources: needs at least 1 entry"]),
        (
            MINIMAL + "daemon:\n  dashboard: perhaps\n",
            [
                (
                    "line 4, column 3: daemon.dashboard: must be true or false "
                    "(environment: SYNCD_DAEMON__DASHBOARD)"
                )
            ],
        ),
        (
            MINIMAL + "guards:\n  min_changes: 0\n  max_changes: many\n",
            [
                (
                    "line 4, column 3: guards.min_changes: must be at least 1 "
                    "(environment: SYNCD_GUARDS__MIN_CHANGES)"
                ),
                (
                    "line 5, column 3: guards.max_changes: must be a whole number "
                    "(environment: SYNCD_GUARDS__MAX_CHANGES)"
                ),
            ],
        ),
        (
            MINIMAL + "policy: mirror\n",
            [
                (
                    "line 3, column 1: policy: must be 'create-only', "
                    "'upsert-only' or 'sync' (environment: SYNCD_POLICY)"
                ),
            ],
        ),
        (MINIMAL + "schedule: soon\n", ["line 3, column 1: schedule: must be a mapping of settings"]),
        (
            MINIMAL.replace("path: kong.yml", "path: kong.yml, name: '-x'"),
            [f"line 1, column 52: sources[0].name: {NAME} (environment: SYNCD_SOURCES__0__NAME)"],
        ),
    ],
)
def test_each_fault_is_told_once_with_its_line_and_what_was_meant(
    tmp_path: Path, text: str, says: list[str]
) -> None:
    assert faults(tmp_path, text) == says


def test_no_words_of_pydantic_and_no_variable_that_does_not_exist_are_shown(tmp_path: Path) -> None:
    static = "{type: static, subjects: [{key: 1, kee: 2}]}"
    text = f"sources: [{{type: kong-admin, tags: x, timout: 3s}}, 5, {static}]\n"
    shown = faults(tmp_path, text + "metering: [1]\nmapping: {create: {billing_adress: x}}\ngateways: {}\n")
    for word in ("Input", "permitted", "tuple", "Tuple", "dictionary", "validation", "instance of"):
        assert not any(word in line for line in shown)
    assert all(line.startswith("line ") for line in shown)
    suggested = {line.rpartition("(environment: ")[2].rstrip(")") for line in shown if "(environment" in line}
    assert suggested <= set(variables_of(Config))
    assert any("did you mean `billing_address`?" in line for line in shown)


@pytest.mark.parametrize(
    ("text", "line"),
    [(MINIMAL + "policy: sync\npolicy: sync\n", 4), (MINIMAL + "daemon:\n  token: a\n  token: b\n", 5)],
)
def test_a_setting_that_is_there_twice_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    (fault,) = faults(tmp_path, text)
    assert f"line {line}" in fault
    assert "is there twice" in fault


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SYNCD_METERNG__TOKEN", "SYNCD_METERING__TOKEN"),
        ("SYNCD_METERING_TOKEN", "SYNCD_METERING__TOKEN"),
        ("SYNCD_SOURCE__1__TOKEN", "SYNCD_SOURCES__1__TOKEN"),
        ("SYNCD_POLCIY", "SYNCD_POLICY"),
        ("SYNCD_MAPPING__GROUPBY", "SYNCD_MAPPING__GROUP_BY"),
        ("SYNCD_SOURCES__0__PAHT", "SYNCD_SOURCES__0__PATH"),
    ],
)
def test_a_variable_without_a_setting_is_refused_and_the_right_one_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, meant: str
) -> None:
    monkeypatch.setenv(variable, "hunter2")
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, MINIMAL)
    assert variable in str(caught.value)
    assert f"did you mean {meant}?" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "variable",
    [
        "SYNCD_CONFIG",
        "SYNCD_SANDBOX_TOKEN",
        "SYNCD_SERVICE_HOST",
        "SYNCD_SERVICE_PORT_HTTP",
        "SYNCD_PORT",
        "SYNCD_PORT_8890_TCP_ADDR",
        "SYNCD_METRICS_SERVICE_PORT",
    ],
)
def test_variables_of_the_command_line_and_of_a_kubernetes_service_are_no_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "tcp://10.0.0.1:8890")
    assert loaded(tmp_path, MINIMAL).owner_id == "default"


def test_a_list_in_the_environment_that_is_no_json_is_refused_with_an_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNCD_MAPPING__ANONYMOUS_CONSUMERS", "hunter2")
    with pytest.raises(ConfigError, match="JSON") as caught:
        loaded(tmp_path, MINIMAL)
    assert "variable SYNCD_MAPPING__ANONYMOUS_CONSUMERS cannot be read" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_variables_in_the_file_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMETER_TOKEN", "s3cret")
    monkeypatch.setenv("INTERVAL", "45")
    monkeypatch.delenv("NOT_SET", raising=False)
    config = loaded(
        tmp_path,
        MINIMAL.replace('8888"', '8888", token: "${OPENMETER_TOKEN}", attempts: "${ATTEMPTS:-7}"')
        + "schedule: {interval: '${INTERVAL}s'}\ndaemon: {state_dir: '$${b} $5'}\n",
    )
    assert config.metering.token is not None
    assert config.metering.token.get_secret_value() == "s3cret"
    assert config.metering.attempts == 7
    assert config.schedule.interval.total_seconds() == 45
    assert config.daemon.state_dir == tmp_path / "${b} $5"


@pytest.mark.parametrize("text", ["${NOT_SET}", "x-${NOT_SET}", "${}", "${{ env 'X' }}", "${open", "${a b}"])
def test_a_reference_that_cannot_be_expanded_is_refused_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    (fault,) = faults(tmp_path, MINIMAL.replace('8888"', f'8888", token: "{text}"'))
    assert fault.startswith("metering.token: ")
    assert "NOT_SET" in fault or "must begin a variable" in fault


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("metering.token", 'metering: {url: "http://x", token: "hunter\\n2"}'),
        ("metering.token", 'metering: {url: "http://x", token: "hünter2"}'),
        ("sources[0].token", 'sources: [{type: kong-admin, url: "http://x", token: "hunter\\t2"}]'),
        ("gateways[0].token", 'gateways: [{name: a, url: "http://x", token: "hunter\\x7f2"}]'),
        ("daemon.token", 'daemon: {token: "hunter2-of-16-or-\\0-more"}'),
        ("daemon.token", 'daemon: {token: "short-hunter2"}'),
    ],
)
def test_a_token_that_cannot_be_used_is_refused_without_its_value(
    tmp_path: Path, where: str, text: str
) -> None:
    section = text.partition(":")[0]
    others = [line for line in MINIMAL.splitlines() if not line.startswith(section)]
    (fault,) = faults(tmp_path, "\n".join([*others, text]))
    assert f"{where}: " in fault
    assert "hunter" not in fault
    assert "hünter" not in fault


def test_white_space_around_a_token_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNCD_METERING__TOKEN", "sk-1\n")
    monkeypatch.setenv("SYNCD_DAEMON__TOKEN", " token-of-16-or-more\r\n")
    config = loaded(tmp_path, MINIMAL)
    assert config.metering.token is not None
    assert config.daemon.token is not None
    assert config.metering.token.get_secret_value() == "sk-1"
    assert config.daemon.token.get_secret_value() == "token-of-16-or-more"


def test_static_subjects_keep_their_text(tmp_path: Path) -> None:
    subjects = (
        "[{key: 0017, customer: 1_000, name: 12:30, metadata: {zip: 02134, since: 2024-02-30}}, {key: yes}]"
    )
    text = MINIMAL.replace(
        "{type: declarative-file, path: kong.yml}", f"{{type: static, subjects: {subjects}}}"
    )
    (source,) = loaded(tmp_path, text).sources
    assert isinstance(source, StaticSource)
    first, second = source.subjects
    assert (first.key, first.customer, first.name) == ("0017", "1_000", "12:30")
    assert first.metadata == {"zip": "02134", "since": "2024-02-30"}
    assert second.key == "yes"


def test_a_static_subject_with_a_control_character_is_refused(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "{type: declarative-file, path: kong.yml}", '{type: static, subjects: [{key: "a\\0b"}]}'
    )
    (fault,) = faults(tmp_path, text)
    assert "sources[0].subjects[0].key: must not contain control characters" in fault
