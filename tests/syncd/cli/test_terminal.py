"""Output for people: tables and progress on a terminal, plain lines elsewhere, no unwanted colours."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import pytest
import structlog

from syncd import log
from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project, command, daemon_process
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_sandbox(tmp_path_factory.mktemp("sandbox") / "db") as url:
        yield url


@pytest.fixture
def project(tmp_path: Path, sandbox: str) -> Project:
    return Project(tmp_path, sandbox)


def on_a_terminal(project: Project, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run a command on a terminal; return its exit status and the terminal's content."""
    master, slave = pty.openpty()
    environment = project.environment(COLUMNS="160", TERM="xterm", **variables)
    with closing(os.fdopen(master, "rb", buffering=0)) as screen:
        process = subprocess.Popen(
            command(*arguments), cwd=project.folder, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        seen = b""
        try:
            while more := screen.read(65536):
                seen += more
        except OSError:  # how a terminal signals its end
            pass
        return process.wait(20), seen.decode()


def test_a_plan_has_colours_on_a_terminal_and_progress_is_shown(project: Project) -> None:
    status, screen = on_a_terminal(project, "plan")
    assert status == 2
    assert "\x1b[32m  + customer" in screen, "green"
    assert "reading sources and customers" in screen


def test_no_color_removes_colours(project: Project) -> None:
    _, screen = on_a_terminal(project, "plan", NO_COLOR="1")
    assert "  + customer" in screen
    assert "\x1b[32m" not in screen


def test_elsewhere_a_plan_is_plain_lines_only(project: Project) -> None:
    result = project.run("plan")
    assert result.returncode == 2
    assert result.stderr == ""
    assert not set(result.stdout) & set("\x1b┃│┏")
    assert result.stdout.count("  + customer ") == 2


def test_json_goes_to_stdout_without_progress(project: Project) -> None:
    result = project.run("plan", "-ojson")
    assert json.loads(result.stdout)["summary"]
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [("plan",), ("resync",), ("status",), ("usage",), ("doctor",)])
def test_errors_go_to_stderr_only(project: Project, arguments: tuple[str, ...]) -> None:
    (project.folder / "syncd.yaml").write_text("sources: [")
    result = project.run(*arguments)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("syncd: ")


def test_the_shell_can_complete_commands() -> None:
    environment = os.environ | {
        "_SYNCD_COMPLETE": "complete_bash",
        "COMP_WORDS": "syncd re",
        "COMP_CWORD": "1",
    }
    ended = subprocess.run(command(), env=environment, capture_output=True, text=True, timeout=30)
    assert ended.stdout.split() == ["resync"]


def test_status_and_resync_show_what_the_daemon_did(project: Project) -> None:
    with daemon_process(project):
        result = eventually(lambda: text if "last" in (text := project.call("status").stdout) else None)
        assert "succeeded" in result
        assert "Next run: 20" in result
        ended = project.call("resync", "--wait")
        assert ended.returncode == 0
        assert "in sync" in ended.stdout
        assert json.loads(project.call("resync", "--wait", "-ojson").stdout)["in_sync"] is True


STEERING = "\x1b]0;owned\x07 \x9b31m \u202ereversed"


def steers(screen: str) -> bool:
    # What syncd itself sends to a terminal: colours, and the cursor of its progress line.
    own = re.sub(r"\x1b\[[0-9;?]*[mKAhl]", "", screen)
    return any(char in own for char in "\x1b\x07\x9b\u202e")


def test_an_answer_of_an_api_cannot_steer_the_terminal(project: Project) -> None:
    def kong(_asked: Asked) -> Answer:
        return Answer({"message": f"no {STEERING}"}, 400)

    with serving(kong) as server:
        project.settings = f"sources: [{{type: kong-admin, url: '{server.url}'}}]\n"
        project.configure()
        for arguments in (["plan"], ["apply", "--yes"], ["doctor"], ["doctor", "-ojson"]):
            _, screen = on_a_terminal(project, *arguments)
            assert "reversed" in screen, arguments
            assert not steers(screen), (arguments, screen)
        for arguments in (["history"], ["history", "-ojson"]):
            _, screen = on_a_terminal(project, *arguments)
            assert "reversed" in screen
            assert not steers(screen), (arguments, screen)


def test_names_of_consumers_cannot_steer_the_terminal_and_json_keeps_them(project: Project) -> None:
    document = {"_format_version": "3.0", "consumers": [{"username": f"eve{STEERING}"}]}
    (project.folder / "kong.yml").write_text(json.dumps(document))
    reasons = [change["reason"] for change in json.loads(project.call("plan", "-ojson").stdout)["changes"]]
    assert any(f"eve{STEERING}" in reason for reason in reasons)
    for arguments in (["plan"], ["plan", "-ojson"], ["apply", "--yes"]):
        _, screen = on_a_terminal(project, *arguments)
        assert "eve" in screen
        assert not steers(screen), (arguments, screen)


def test_the_log_on_a_terminal_cannot_be_steered(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.object(sys.stderr, "isatty", return_value=True, create=True):
        log.configure()
        try:
            structlog.get_logger("test").warning("seen", error=STEERING.replace(" ", ""))
        finally:
            structlog.reset_defaults()
    screen = capsys.readouterr().err
    assert "reversed" in screen
    assert not steers(screen)
