"""Every command of the README is run, in order, in a clone (what is shared with it: tests.clones).

Also what was in the README and is in pages of its own now: the events, and how the plugin is enabled.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from openmeter_plugin.metering.rules import Rules
from tests.clones import Clone
from tests.documents import blocks, commands
from tests.harness.recordings import llm_request, serialized
from tests.plugin.outcomes import events as made_events

pytestmark = pytest.mark.slow

ENABLE: str = "docs/howto/enable-the-plugin.md"
FIRST_SYNC: str = "docs/howto/first-sync.md"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone.make(tmp_path_factory.mktemp("readme") / "kong-openmeter")


@pytest.mark.timeout(180)
def test_every_command_of_the_readme_ends_as_the_readme_says(clone: Clone) -> None:
    output = clone.run(commands("README.md"))
    ending = next(block.text for block in blocks("README.md", "text") if "counted exactly once" in block.text)
    assert ending in output


def test_the_commands_that_matter_most_are_among_those_that_are_run() -> None:
    run = " ".join(commands("README.md"))
    for command in ("make demo", "syncd run", "syncd sandbox"):
        assert command in run
    run = " ".join(commands(FIRST_SYNC))
    for command in ("syncd plan", "syncd apply", "syncd run", "syncd resync", "syncd sandbox"):
        assert command in run


def test_nothing_of_the_readme_is_left_out() -> None:
    assert [block.reason for block in blocks("README.md", "sh") if block.reason or block.on_host] == []


def test_the_readme_is_short() -> None:
    assert len(Path(__file__).parents[1].joinpath("README.md").read_text().splitlines()) <= 150


def recorded_events() -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for recorded in (serialized("authenticated"), llm_request()):
        events += made_events(recorded.parsed, rules=Rules(source="kong"))
    return events


def test_the_events_that_are_shown_are_what_the_plugin_makes_of_recorded_requests() -> None:
    shown = [json.loads(block.text) for block in blocks("docs/events.md", "json")]
    assert len(shown) == 2
    assert [event for event in shown if event not in recorded_events()] == []


@pytest.mark.parametrize("page", ["README.md", ENABLE])
def test_the_plugin_configuration_that_is_shown_uses_settings_that_kong_knows(page: str) -> None:
    from openmeter_plugin.config.schema import FIELDS, NAME

    (block,) = blocks(page, "yaml")
    (plugin,) = yaml.safe_load(block.text)["plugins"]
    assert plugin["name"] == NAME
    assert set(plugin["config"]) <= {name for field in FIELDS for name in field}


def test_the_settings_of_kong_conf_name_the_plugin_and_commands_that_exist() -> None:
    program = Path(sys.executable).with_name("openmeter-plugin")
    helped = subprocess.run([program, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    settings = [line.partition(" = ") for block in blocks(ENABLE, "ini") for line in block.text.splitlines()]
    assert {name for name, _, _ in settings} == {
        "plugins",
        "pluginserver_names",
        *(f"pluginserver_openmeter_{what}" for what in ("socket", "query_cmd", "start_cmd")),
    }
    for _, _, value in settings:
        if "openmeter-plugin serve" in value:
            assert [word for word in value.split() if word.startswith("--") and word not in helped] == []
