"""`syncd apply` with a person at the terminal, and its end by Ctrl-C and SIGTERM."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.syncd.processes import Project, command
from tests.syncd.servers import Answer, Asked, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[httpx.Client]:
    with running_sandbox(tmp_path / "db") as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def project(tmp_path: Path, sandbox: httpx.Client) -> Project:
    folder = tmp_path / "project"
    folder.mkdir()
    return Project(folder, str(sandbox.base_url).rstrip("/"))


def customers(sandbox: httpx.Client) -> int:
    return int(sandbox.get("/api/v1/customers").json()["totalCount"])


def answered(
    project: Project, answer: bytes | signal.Signals, *arguments: str, at: bytes = b"[y/N]"
) -> tuple[int, str]:
    """Exit status and screen of an apply on a terminal, with this answer or signal once it shows `at`."""
    master, slave = pty.openpty()
    environment = project.environment(COLUMNS="100", TERM="xterm")
    with os.fdopen(master, "r+b", buffering=0) as screen:
        process = subprocess.Popen(
            command("apply", *arguments),
            cwd=project.folder,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        seen, replied = b"", False
        try:
            while more := screen.read(65536):
                seen += more
                if at in seen and not replied:
                    replied = True
                    if isinstance(answer, signal.Signals):
                        process.send_signal(answer)
                    else:
                        screen.write(answer)
        except OSError:  # how a terminal signals its end
            pass
        return process.wait(20), seen.decode()


def test_apply_asks_on_a_terminal_and_does_what_it_has_shown(project: Project, sandbox: httpx.Client) -> None:
    status, screen = answered(project, b"yes\n")
    assert status == 0
    assert "+ customer acme (alice, bob)" in screen
    assert screen.index("+ customer acme") < screen.index("Apply this plan? [y/N]")
    assert screen.count("+ customer acme") == 1, "the plan is shown once"
    assert "Applied: 5 done." in screen
    assert customers(sandbox) == 2


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b"\x04", b"yep\n"])
def test_apply_changes_nothing_without_a_clear_yes(
    project: Project, sandbox: httpx.Client, answer: bytes
) -> None:
    status, screen = answered(project, answer)
    assert status == 1
    assert "nothing was changed" in screen
    assert customers(sandbox) == 0


def test_with_yes_or_a_reviewed_plan_apply_does_not_ask(project: Project, sandbox: httpx.Client) -> None:
    assert project.call("plan", "--out", "plan.json").returncode == 2
    assert "[y/N]" not in answered(project, b"", "--plan", "plan.json")[1]
    assert customers(sandbox) == 2
    assert "[y/N]" not in answered(project, b"", "--yes")[1]


def test_apply_asks_nothing_where_there_is_nothing_to_do(project: Project) -> None:
    assert project.call("apply", "--yes").returncode == 0
    status, screen = answered(project, b"")
    assert status == 0
    assert "[y/N]" not in screen


def test_a_guard_that_would_stop_the_run_is_told_before_the_question(project: Project) -> None:
    project.configure("guards: {max_changes: 1}\n")
    status, screen = answered(project, b"yes\n")
    assert status == 1
    assert "guards.max_changes allows 1" in screen
    assert "[y/N]" not in screen


@pytest.mark.parametrize("arguments", [(), ("--output=json",)])
def test_without_a_terminal_apply_needs_yes(
    project: Project, sandbox: httpx.Client, arguments: tuple[str, ...]
) -> None:
    result = project.call("apply", *arguments)
    assert result.returncode == 64
    assert "--yes" in result.stderr
    assert customers(sandbox) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_question_changes_nothing_and_is_the_exit_status(
    project: Project, sandbox: httpx.Client, number: signal.Signals
) -> None:
    status, screen = answered(project, number)
    assert status == 128 + number
    assert "nothing was changed" in screen
    assert "Traceback" not in screen
    assert customers(sandbox) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_on_a_terminal_ends_apply_within_5_s_while_a_source_does_not_answer(
    project: Project, number: signal.Signals
) -> None:
    (project.folder / "kong.yml").unlink()
    os.mkfifo(project.folder / "kong.yml")
    begun = time.monotonic()
    status, screen = answered(project, number, at=b"reading sources")
    assert time.monotonic() - begun < 8  # 5, and the start of the process
    assert status == 128 + number
    assert "nothing was changed" in screen


@contextmanager
def applying(project: Project) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command("apply", "--yes"),
        cwd=project.folder,
        env=project.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def end_of_history(project: Project) -> dict[str, object]:
    run: dict[str, object] = json.loads(project.call("history", "--output=json").stdout)[0]
    return run


def ended(process: subprocess.Popen[str], *signals: signal.Signals) -> tuple[float, str, str]:
    """Seconds until the process has ended after the signals, and what it printed."""
    begun = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)  # two signals at once would be one
    stdout, stderr = process.communicate(timeout=20)
    assert "Traceback" not in stderr
    return time.monotonic() - begun, stdout, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_apply_within_5_s_while_a_source_does_not_answer(
    project: Project, sandbox: httpx.Client, number: signal.Signals
) -> None:
    """Opening a pipe that has no writer waits in the kernel: no request that syncd could end."""
    (project.folder / "kong.yml").unlink()
    os.mkfifo(project.folder / "kong.yml")
    with applying(project) as process:
        while not (project.folder / "state").exists():
            time.sleep(0.01)
        time.sleep(1)  # nothing shows from outside that it has opened the pipe
        seconds, _, stderr = ended(process, number)
    assert seconds < 5
    assert process.returncode == 128 + number
    assert "nothing was changed" in stderr
    assert end_of_history(project)["state"] == "failed"


@contextmanager
def hanging_after(project: Project, sandbox: httpx.Client, creations: int) -> Iterator[threading.Event]:
    """A metering API that creates customers up to this one, which it answers at the end; set once asked."""
    reached, gate = threading.Event(), threading.Event()
    created: list[str] = []

    def answer(asked: Asked) -> Answer:
        if asked.method == "POST" and asked.path == "/api/v1/customers":
            created.append(asked.path)
            if len(created) == creations:
                reached.set()
                gate.wait(20)
        reply = sandbox.request(asked.method, asked.path, params=asked.query, json=asked.body)
        return Answer(reply.content, reply.status_code, {"Content-Type": "application/json"})

    with serving(answer) as server:
        project.metering, project.concurrency = server.url, 1
        project.configure()
        try:
            yield reached
        finally:
            gate.set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_apply_says_what_was_done_and_what_is_left(
    project: Project, sandbox: httpx.Client, number: signal.Signals
) -> None:
    with hanging_after(project, sandbox, 2) as reached, applying(project) as process:
        assert reached.wait(20)
        seconds, stdout, _ = ended(process, number)
    assert seconds < 5
    assert process.returncode == 128 + number
    assert "Applied: 1 done." in stdout
    assert "4 changes are left; `syncd apply` continues" in stdout
    listed = end_of_history(project)
    assert listed["state"] == "failed"
    assert str(listed["error"]).startswith("stopped by request")
    assert listed["outcomes"] == {"done": 1, "unchanged": 0, "blocked": 0, "skipped": 0}


def test_a_second_ctrl_c_ends_apply_at_once(project: Project, sandbox: httpx.Client) -> None:
    with hanging_after(project, sandbox, 2) as reached, applying(project) as process:
        assert reached.wait(20)
        seconds, stdout, _ = ended(process, signal.SIGINT, signal.SIGINT)
    assert seconds < 2
    assert process.returncode == 130
    assert "Applied: 1 done." in stdout
    assert "4 changes are left" in stdout
    assert end_of_history(project)["state"] == "failed"
