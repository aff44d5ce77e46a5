"""Invalid option values: a message that names the option, before anything is done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openmeter_plugin.units import duration
from tests.harness.process import eventually, plugin_server

pytestmark = pytest.mark.slow


def serve(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "openmeter_plugin", "serve", "--socket", "s", "--spool", "spool", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=directory,
    )


@pytest.mark.parametrize("text", ["36526d", "99999999999d", f"{'9' * 400}s"])
def test_a_duration_of_more_than_a_hundred_years_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is more than a hundred years"):
        duration(text)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--retention", "1y", "'1y' is not a duration"),
        ("--retention", "99999999999d", "more than a hundred years"),
        ("--retention-size", "5GB", "'5GB' is not a size"),
        ("--max-age", "9999999d", "more than a hundred years"),
    ],
)
def test_an_invalid_quantity_names_only_its_own_option(
    tmp_path: Path, option: str, value: str, message: str
) -> None:
    result = serve(tmp_path, option, value)
    assert result.returncode == os.EX_USAGE
    assert result.stderr.startswith(f"openmeter-plugin: {option}: ")
    assert message in result.stderr
    assert result.stderr.count("--") == 1


def test_a_missing_token_file_is_logged_at_the_start_and_kong_is_served(
    tmp_path: Path,
) -> None:
    missing = tmp_path / "no-such-token"
    with plugin_server(tmp_path, "--token-file", str(missing)) as server:
        eventually(lambda: '"delivery_cannot_start"' in server.log_text())
        assert f"--token-file: {missing}" in server.log_text()
        assert server.stop() == 0


SECRET = "om_secret_1234"


@pytest.mark.parametrize(
    ("options", "variables", "named"),
    [
        ([], {"OPENMETER_PLUGIN_TOKEN": f"{SECRET}\nx"}, "environment variable OPENMETER_PLUGIN_TOKEN"),
        ([], {"HTTPS_PROXY": "proxy:port"}, "environment variable HTTPS_PROXY"),
        ([], {"HTTP_PROXY": "http://p:1", "NO_PROXY": "a b"}, "environment variable NO_PROXY"),
        (["--ca-file", "/no/such/file"], {}, "--ca-file: cannot read /no/such/file"),
        (["--client-cert", "/no/such/file"], {}, "--client-cert: cannot read /no/such/file"),
        (["--ca-file", __file__], {}, "is not in PEM format"),
    ],
    ids=["token", "proxy", "no proxy", "authority", "certificate", "no PEM"],
)
def test_what_delivery_cannot_start_with_is_named_at_the_start_and_kong_is_served(
    tmp_path: Path, options: list[str], variables: dict[str, str], named: str
) -> None:
    with plugin_server(tmp_path, *options, environment=variables) as server:
        eventually(lambda: '"delivery_cannot_start"' in server.log_text())
        assert named in server.log_text()
        assert SECRET not in server.log_text()
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--proxy", "proxy:3128"), "--proxy: a proxy is a URL"),
        (("--proxy", "ftp://proxy:3128"), "--proxy: a proxy is a URL"),
        (("--client-key", "/some/key"), "--client-key: needs --client-cert"),
    ],
)
def test_network_options_that_can_never_work_end_the_process(
    tmp_path: Path, options: tuple[str, ...], named: str
) -> None:
    result = serve(tmp_path, *options)
    assert result.returncode == os.EX_USAGE
    assert named in result.stderr
