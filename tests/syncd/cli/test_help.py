"""Help of both programs: the options of all commands, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.main import get_command

import openmeter_plugin.cli.main
import syncd.cli.main
from tests.documents import ROOT


def shown_values(app: typer.Typer) -> Iterator[tuple[str, str]]:
    """Yield each option of a program and its commands with what help shows for its value."""
    commands: list[tuple[str, Any]] = [("", get_command(app))]
    while commands:
        path, command = commands.pop()
        context = command.make_context(path, [], resilient_parsing=True)
        for parameter in command.get_params(context):
            if parameter.param_type_name == "option":
                yield f"{path} {parameter.name}", parameter.display_type_rich(context) or ""
        commands += [(f"{path} {name}", sub) for name, sub in getattr(command, "commands", {}).items()]


@pytest.mark.parametrize("app", [syncd.cli.main.app, openmeter_plugin.cli.main.app], ids=["syncd", "plugin"])
def test_help_shows_no_type_of_python_for_the_value_of_an_option(app: typer.Typer) -> None:
    found = dict(shown_values(app))
    assert len(found) > 40
    assert {option: value for option, value in found.items() if "<" in value and "|" not in value} == {}


@pytest.mark.parametrize(
    ("app", "program", "pages"),
    [
        (syncd.cli.main.app, "syncd", ["docs/syncd.md"]),
        (openmeter_plugin.cli.main.app, "openmeter-plugin", ["docs/plugin.md", "docs/plugin-operations.md"]),
    ],
    ids=["syncd", "plugin"],
)
def test_the_reference_names_every_command(app: typer.Typer, program: str, pages: list[str]) -> None:
    text = "".join((ROOT / page).read_text() for page in pages)
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    assert [name for name in commands if f"`{program} {name}" not in text] == []
