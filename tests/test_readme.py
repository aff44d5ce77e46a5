"""Every command of the README is run, in order, from a fresh copy of the project."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from openmeter_plugin.event import outcome
from openmeter_plugin.questions import Answers
from openmeter_plugin.rules import Rules
from tests.harness.recordings import llm_request, serialized

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_STATUS = re.compile(r"#\s*exit status (\d+)")


@dataclass(frozen=True)
class Block:
    """A fenced block of the README, and why it is not run, where it is not."""

    kind: str
    text: str
    reason: str | None


def blocks(kind: str) -> list[Block]:
    found = [Block(m["kind"], m["text"], m["reason"]) for m in _BLOCK.finditer(README)]
    return [block for block in found if block.kind == kind]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def fresh_copy(tmp_path: Path) -> Path:
    """The project as after a clone and `make setup`; the environment is the one that runs the tests."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    copy = tmp_path / "kong-openmeter"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))
    environment = copy / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".ready":
            (environment / entry.name).symlink_to(entry)
    (environment / ".ready").touch()
    return copy


def as_script(commands: list[str], sandbox_port: int, daemon_port: int) -> str:
    """Turn the commands into a script that ends with the first one whose exit status is not the README's."""
    script = [
        "trap 'kill $(jobs -p) 2>/dev/null' EXIT",
        "is_open() { (: </dev/tcp/127.0.0.1/$1) 2>/dev/null; }",
        "listening() { for _ in {1..300}; do is_open $1 && return; sleep 0.05; done; exit 99; }",
        'must() { [ "$1" = "$2" ] || { echo "README: $3 ended with $1, not $2" >&2; exit 98; }; }',
    ]
    for command in commands:
        status = _STATUS.search(command)
        script.append(command.replace("--port 8888", f"--port {sandbox_port}"))
        if command.endswith("&"):
            # Whoever reads on before typing gives it that time.
            script.append(f"listening {sandbox_port if 'sandbox' in command else daemon_port}")
        else:
            script.append(f"must $? {status[1] if status else 0} {shlex.quote(command)}")
    return "\n".join([*script, "wait", ""])


def commands() -> list[str]:
    text = "".join(block.text for block in blocks("sh") if block.reason is None)
    return text.replace("\\\n", " ").splitlines()


@pytest.mark.timeout(180)
def test_every_command_of_the_readme_ends_as_the_readme_says(fresh_copy: Path) -> None:
    sandbox_port, daemon_port = free_port(), free_port()
    example = fresh_copy / "docs" / "examples" / "syncd.yaml"
    text = example.read_text()
    assert "127.0.0.1:8888" in text
    assert "127.0.0.1:8890" in text
    text = text.replace(":8888", f":{sandbox_port}").replace(":8890", f":{daemon_port}")
    example.write_text(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SYNCD_", "OPENMETER_", "MAKE"))}
    environment |= {"PYTHONPATH": f"{fresh_copy / 'plugin'}:{fresh_copy}", "COLUMNS": "100", "NO_COLOR": "1"}
    environment["STATE_DIRECTORY"] = str(fresh_copy / "state")
    log = fresh_copy.parent / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            ["bash", "-c", as_script(commands(), sandbox_port, daemon_port)],
            cwd=fresh_copy,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=150)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{output}\n{log.read_text()}"
    ending = next(block.text for block in blocks("text") if "counted exactly once" in block.text)
    assert ending in output


def test_the_copy_is_what_is_run(fresh_copy: Path) -> None:
    program = "import openmeter_plugin, syncd; print(openmeter_plugin.__file__, syncd.__file__)"
    paths = f"{fresh_copy / 'plugin'}:{fresh_copy}"
    found = subprocess.run(
        [fresh_copy / ".venv" / "bin" / "python", "-c", program],
        cwd=fresh_copy,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(path.startswith(str(fresh_copy)) for path in found.stdout.split())


def test_the_commands_that_matter_most_are_among_those_that_are_run() -> None:
    run = " ".join(commands())
    for command in ("make demo", "syncd plan", "syncd apply", "syncd run", "syncd resync", "syncd sandbox"):
        assert command in run


def test_only_what_cannot_run_here_is_left_out() -> None:
    reasons = [block.reason for block in blocks("sh") if block.reason]
    assert reasons == [
        "needs Kong",
        "this block is run by one of these tests",
        "installs into a folder of the host",
        "runs until it is stopped, in folders of the host",
        "needs Docker",
    ]


def recorded_events() -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for recorded in (serialized("authenticated"), llm_request()):
        made = outcome(recorded.parsed, Answers(None, None), Rules(source="kong"), now_ms=0, new_id=str)
        assert isinstance(made, list)
        events += made
    return events


def test_the_events_in_the_readme_are_what_the_plugin_makes_of_recorded_requests() -> None:
    shown = [json.loads(block.text) for block in blocks("json")]
    assert len(shown) == 2
    assert [event for event in shown if event not in recorded_events()] == []


def test_the_plugin_configuration_in_the_readme_uses_settings_that_kong_knows() -> None:
    from openmeter_plugin.schema import FIELDS, NAME

    (block,) = blocks("yaml")
    (plugin,) = yaml.safe_load(block.text)["plugins"]
    assert plugin["name"] == NAME
    assert set(plugin["config"]) <= {name for field in FIELDS for name in field}


def test_the_options_of_the_server_that_is_not_run_here_exist() -> None:
    lines = README.replace("\\\n", " ").splitlines()
    found = [line for line in lines if "openmeter-plugin serve" in line]
    assert len(found) == 2, found
    program = Path(sys.executable).with_name("openmeter-plugin")
    helped = subprocess.run([program, "serve", "--help"], capture_output=True, text=True, check=True)
    for line in found:
        options = [word for word in line.split() if word.startswith("--")]
        assert {"--socket", "--spool"} <= set(options)
        assert [option for option in options if option not in helped.stdout] == []


@pytest.mark.parametrize("document", ["README.md", "docs/concepts.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_links_to_headings_of_the_readme_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    }
    concepts = (ROOT / "docs" / "concepts.md").read_text()
    anchors = re.findall(r"README\.md#([\w-]+)", concepts)
    assert anchors
    assert set(anchors) <= headings
