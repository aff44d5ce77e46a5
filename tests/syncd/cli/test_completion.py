"""Completion, help, colours and the log as people meet them on a terminal."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project, command, started_daemon, when_logged

pytestmark = pytest.mark.slow


def completed(project: Project, line: str) -> list[str]:
    """What bash is offered for a command line, the last word of which is incomplete."""
    words = line.split(" ")
    variables = {"_SYNCD_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    program = "import sys; from syncd.cli.main import app; app(prog_name='syncd')"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project.folder,
        env=project.environment(**variables),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.stderr == ""
    return result.stdout.split()


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    found = Project(tmp_path_factory.mktemp("project"), "http://127.0.0.1:9")
    found.configure(
        "sources: [{type: declarative-file, name: kong-eu, path: kong.yml},"
        " {type: static, name: fixed, subjects: [{key: a}]}]\n"
    )
    return found


@pytest.mark.parametrize("place", ["plan", "apply", "resync"])
def test_the_names_of_sources_are_completed(project: Project, place: str) -> None:
    assert completed(project, f"syncd {place} --source ") == ["kong-eu", "fixed"]
    assert completed(project, f"syncd {place} --source k") == ["kong-eu"]


def test_ids_of_runs_are_completed(project: Project) -> None:
    assert completed(project, "syncd history ") == []
    with running_sandbox() as url:
        project.metering = url
        project.configure()
        assert project.run("apply", "--yes").returncode == 0
    listed = json.loads(project.run("history", "--output", "json").stdout)
    assert completed(project, "syncd history ") == [run["id"][:8] for run in listed]


def test_a_configuration_that_cannot_be_read_completes_nothing(project: Project) -> None:
    project.config.write_text("sources: 7\n")
    assert completed(project, "syncd plan --source ") == []
    assert completed(project, "syncd history ") == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("openmeter_plugin", "spool", "replay"),
        ("openmeter_plugin", "spool", "status"),
        ("openmeter_plugin", "gate", "status"),
        ("openmeter_plugin", "serve"),
        ("syncd", "run"),
        ("syncd", "plan"),
    ],
)
def test_help_shows_no_type_of_a_flag_and_no_limit_that_nobody_meets(arguments: tuple[str, ...]) -> None:
    module, *rest = arguments
    result = subprocess.run(
        [sys.executable, "-m", module, *rest, "--help"], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0
    assert "<bool>" not in result.stdout
    assert "9223372036854775807" not in result.stdout


def test_findings_of_doctor_have_colours_where_there_are_any(project: Project) -> None:
    plain = project.run("doctor").stdout
    assert "\x1b[" not in plain
    assert "problem " in plain
    coloured = project.run("doctor", FORCE_COLOR="1", TERM="xterm-256color").stdout
    assert "\x1b[1;31mproblem" in coloured


def test_the_daemon_logs_no_counts_of_zero_and_nothing_below_its_level(project: Project) -> None:
    with running_sandbox() as url:
        project.metering = url
        project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state}\n")
        with started_daemon(project) as (process, log):
            finished = when_logged(log, "run_finished", process)
        assert isinstance(finished["planned"], dict)
        assert finished["planned"]
        assert all(finished["planned"].values())
        quiet = subprocess.run(
            [*command("run", "--log-level", "loud")],
            cwd=project.folder,
            env=project.environment(),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert quiet.returncode == 64
        assert "'debug', 'info', 'warning', 'error'" in quiet.stderr
