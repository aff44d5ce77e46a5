"""Every command of the README is run, in order, from a fresh copy of the project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from openmeter_plugin.event import outcome
from openmeter_plugin.questions import Answers
from openmeter_plugin.rules import Rules
from tests import documents
from tests.documents import ROOT, Block, Copy
from tests.harness.recordings import llm_request, serialized

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    return Copy.make(tmp_path_factory.mktemp("readme") / "kong-openmeter")


def blocks(kind: str) -> list[Block]:
    return documents.blocks("README.md", kind)


def commands() -> list[str]:
    return documents.commands("README.md")


@pytest.mark.timeout(180)
def test_every_command_of_the_readme_ends_as_the_readme_says(copy: Copy) -> None:
    output = copy.run(commands())
    ending = next(block.text for block in blocks("text") if "counted exactly once" in block.text)
    assert ending in output


def test_the_copy_is_what_is_run(copy: Copy) -> None:
    program = "import openmeter_plugin, syncd; print(openmeter_plugin.__file__, syncd.__file__)"
    found = subprocess.run(
        [copy.folder / ".venv" / "bin" / "python", "-c", program],
        cwd=copy.folder,
        env=copy.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(path.startswith(str(copy.folder)) for path in found.stdout.split())


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
