"""`syncd init` and `syncd check`: a configuration to begin with, and its faults before anything runs."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from syncd.config.settings import load
from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project

MAPPING = "mapping: {group_by: file, file: map.csv}\n"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_sandbox(tmp_path_factory.mktemp("sandbox") / "db") as url:
        yield url


@pytest.fixture
def project(tmp_path: Path, sandbox: str) -> Project:
    return Project(tmp_path, sandbox)


def test_init_writes_a_commented_file_that_is_valid_and_runs_doctor(project: Project, sandbox: str) -> None:
    project.config.unlink()
    result = project.call("init", "--kong", "kong.yml", "--metering", sandbox, "--group-by", "tag")
    assert "Wrote syncd.yaml." in result.stdout
    assert "source: declarative-file-0: 4 principals" in result.stdout or "3 principals" in result.stdout
    text = project.config.read_text()
    assert text.count("\n# ") > 10
    config = load(project.config)
    assert (config.metering.url, config.metering.dialect) == (sandbox, "openmeter-v1")
    assert config.mapping.group_by == "tag"
    assert project.call("check").returncode == 0
    assert project.call("plan").returncode == 2


def test_init_takes_an_admin_api_and_konnect(project: Project) -> None:
    project.config.unlink()
    given = ("--kong", "http://kong:8001", "--metering", "https://eu.api.konghq.com", "--group-by", "none")
    assert project.call("init", *given, "--no-doctor").returncode == 0
    config = load(project.config)
    assert config.sources[0].type == "kong-admin"
    assert config.metering.dialect == "openmeter-v3"


def test_init_never_overwrites_a_file(project: Project) -> None:
    before = project.config.read_text()
    result = project.call("init", "--kong", "kong.yml", "--metering", "http://x", "--group-by", "tag")
    assert result.returncode == 1
    assert "syncd.yaml exists already" in result.stderr
    assert project.config.read_text() == before


@pytest.mark.parametrize(
    ("option", "value", "status"), [("--metering", "kong:8001", 1), ("--group-by", "teams", 64)]
)
def test_init_leaves_no_file_that_is_invalid(project: Project, option: str, value: str, status: int) -> None:
    project.config.unlink()
    given = {"--kong": "kong.yml", "--metering": "http://x", "--group-by": "tag", option: value}
    result = project.call("init", *(word for pair in given.items() for word in pair))
    assert result.returncode == status
    assert option.strip("-") in result.stderr
    assert not project.config.exists()


def test_init_without_a_terminal_needs_its_options(project: Project) -> None:
    project.config.unlink()
    result = project.call("init", "--kong", "kong.yml")
    assert result.returncode == 64
    assert "--metering" in result.stderr


def test_check_opens_no_connection(project: Project) -> None:
    project.metering = "http://metering.invalid"
    project.configure()
    with patch.object(socket, "socket", side_effect=AssertionError("a connection")):
        result = project.call("check")
    assert result.returncode == 0
    assert "syncd.yaml is valid" in result.stdout


def test_check_names_what_it_did_not_read(project: Project) -> None:
    project.configure("sources: [{type: kong-admin, url: 'http://127.0.0.1:9', name: kong}]\n")
    result = project.call("check")
    assert result.returncode == 0
    assert "Note: not read, because that needs the network: kong." in result.stdout


def test_check_names_rows_of_the_mapping_file_that_fit_no_principal(project: Project) -> None:
    (project.folder / "map.csv").write_text("kind,id,username,customer\nconsumer,,aliec,acme\n")
    project.configure(MAPPING)
    result = project.call("check")
    assert result.returncode == 0
    assert "map.csv line 2: no source has consumer 'aliec'" in result.stdout
    notes = json.loads(project.call("check", "--output", "json").stdout)["notes"]
    assert any("aliec" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("metering: {ulr: 'http://x'}\n", "metering.ulr: there is no such setting; did you mean `url`?"),
        ("policy: sync\npolicy: sync\n", "policy is there twice"),
        ("metering: {url: '${NO_SUCH}'}\n", "the environment variable NO_SUCH is not set"),
        ("sources: [{type: declarative-file, path: gone.yml}]\n", "cannot read gone.yml"),
        (MAPPING, "mapping.file: cannot read map.csv"),
    ],
)
def test_check_tells_each_fault_and_ends_with_1(project: Project, settings: str, says: str) -> None:
    project.configure(settings)
    result = project.call("check")
    assert (result.returncode, result.stdout) == (1, "")
    assert says in result.stderr
    assert says in json.loads(project.call("check", "--output", "json").stdout)["error"]
