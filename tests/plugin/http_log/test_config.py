"""Starting with the http-log input: its settings file, and the errors in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from openmeter_plugin.config.instance_config import ConfigError
from openmeter_plugin.http_log.config import SECRET_VARIABLE, TOKEN_VARIABLE, load
from openmeter_plugin.http_log.receiver import QUERY_FIELDS
from openmeter_plugin.process.sockets import listen_on
from tests.plugin.http_log_posts import SECRET, TOKEN, configuration

pytestmark = pytest.mark.slow


def test_a_server_without_http_log_imports_no_web_server() -> None:
    code = """
import sys
import openmeter_plugin.cli.main, openmeter_plugin.kong.worker
print(sorted({"uvicorn", "starlette", "fastapi", "yaml"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


# Starting


def serve(*arguments: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", "serve", "--spool", "spool", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=directory,
        env=os.environ | environment,
    )


def test_without_an_input_the_error_names_both(tmp_path: Path) -> None:
    result = serve(directory=tmp_path)
    assert result.returncode == os.EX_USAGE
    assert "--socket" in result.stderr
    assert "--http-log" in result.stderr


@pytest.mark.parametrize("address", ["8095", ":8095", "127.0.0.1:", "127.0.0.1:x", "::1:8095", "unix:"])
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is neither host:port"):
        listen_on(address, 0o660)


def test_an_invalid_address_is_a_usage_error(tmp_path: Path) -> None:
    result = serve("--http-log", "8095", directory=tmp_path)
    assert result.returncode == os.EX_USAGE
    assert "--http-log: 8095 is neither" in result.stderr


def test_an_invalid_file_ends_the_start_and_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(configuration().replace("http://", "ftp://"))
    result = serve(
        *("--http-log", "127.0.0.1:0", "--http-log-config", "c.yaml", "--socket", "s"), directory=tmp_path
    )
    assert result.returncode == 1
    assert "c.yaml: ingest_endpoint: " in result.stderr
    assert not (tmp_path / "s").exists()


def test_an_address_that_others_reach_needs_a_secret(tmp_path: Path) -> None:
    text = configuration().replace(f"  secret: {SECRET}", "  header: x-key")
    (tmp_path / "openmeter-plugin.yaml").write_text(text)
    result = serve("--http-log", "0.0.0.0:0", directory=tmp_path)
    assert result.returncode == 1
    assert "http_log.secret: is required" in result.stderr


WRONG: list[tuple[str, str]] = [
    ("subjet: there is no such setting", configuration(plugin="subjet: x")),
    ("subject.feild: there is no such setting", configuration(plugin="subject: {feild: id}")),
    ("attributes.0.x: there is no such setting", configuration(plugin="attributes: [{x: 1}]")),
    ("subject.look_up_value_in: ", configuration(plugin="subject: {look_up_value_in: cookie}")),
    ("ingest_endpoint: ", configuration().replace("ingest_endpoint", "# ingest_endpoint")),
    ("api_token: a vault reference", configuration().replace(TOKEN, '"{vault://env/token}"')),
    ("http_log.secret: ", configuration().replace(SECRET, "short")),
    ("http_log.secret: ", configuration().replace(SECRET, '"{vault://env/metering-key}"')),
    ("http_log.secret: ", configuration().replace(SECRET, '"sixteen letters and spaces"')),
    ("http_log.header: ", configuration(http_log="  header: Content-Type")),
    ("http_log.max_body: ", configuration(http_log="  max_body: 1GiB")),
    ("http_log.max_boddy: ", configuration(http_log="  max_boddy: 1MiB")),
    ("http_log: must be a mapping", configuration().replace("http_log:", "http_log: []\nfilters:")),
    ("must be a mapping", "[]"),
    ("must be a mapping", ""),
    ("is not YAML, line 2", "a: 1\n\tb: token-of-this-test"),
]


@pytest.mark.parametrize(("problem", "text"), WRONG, ids=[f"{n} {p}" for n, (p, _) in enumerate(WRONG)])
def test_an_error_in_the_file_is_named_without_showing_a_secret(
    tmp_path: Path, problem: str, text: str
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "c.yaml", {})
    assert str(caught.value).startswith(f"{tmp_path}/c.yaml: ")
    assert problem in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert SECRET not in str(caught.value)


def test_the_files_in_the_documentation_are_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "http-log.md").read_text()
    settings, kong = (block.partition("```")[0] for block in text.split("```yaml\n")[1:])
    (tmp_path / "c.yaml").write_text(settings)
    secrets = load(tmp_path / "c.yaml", {}).settings
    (plugin,) = yaml.safe_load(kong)["plugins"]
    assert secrets.header in plugin["config"]["headers"]
    assert secrets.write_timeout < plugin["config"]["timeout"] / 1000
    assert set(plugin["config"]["custom_fields_by_lua"]) == set(QUERY_FIELDS.values())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml: cannot be read: No such file"):
        load(tmp_path / "c.yaml", {})


def test_the_environment_overrides_the_secrets_and_an_empty_variable_does_not_disable_them(
    tmp_path: Path,
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(configuration())
    environment = {
        TOKEN_VARIABLE: "from-outside\n",
        SECRET_VARIABLE: "first-secret-of-two second-secret-of-two",
    }
    config = load(file, environment)
    assert orjson.loads(config.plugin)["api_token"] == "from-outside"
    secrets = [secret.get_secret_value() for secret in config.settings.secret]
    assert secrets == ["first-secret-of-two", "second-secret-of-two"]
    assert TOKEN not in repr(config)
    assert secrets[0] not in repr(config)
    for empty in ("", " ", "\n"):
        with pytest.raises(ConfigError, match=r"http_log\.secret: "):
            load(file, {SECRET_VARIABLE: empty})
    assert orjson.loads(load(file, {TOKEN_VARIABLE: ""}).plugin)["api_token"] == TOKEN


def test_a_secret_of_16_characters_is_long_enough_and_one_of_15_is_not(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(configuration())
    assert load(file, {SECRET_VARIABLE: "s" * 16}).settings.secret[0].get_secret_value() == "s" * 16
    with pytest.raises(ConfigError, match=r"http_log\.secret\.?0?: .*at least 16 characters"):
        load(file, {SECRET_VARIABLE: "s" * 15})


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o604])
@pytest.mark.parametrize("section", ["api_token", "http_log"])
def test_a_file_with_secrets_that_others_can_read_is_logged_with_the_remedy(
    tmp_path: Path, lines: list[Any], section: str, mode: int
) -> None:
    whole = yaml.safe_load(configuration())
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({name: whole[name] for name in ("ingest_endpoint", section)}))
    file.chmod(mode)
    load(file, {})
    remedies = [line["remedy"] for line in lines if line["event"] == "configuration_readable_by_others"]
    assert remedies == ([] if mode == 0o600 else ["chmod 600"])
