"""Help of both programs: the options of all commands, in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.main import get_command

import openmeter_plugin.cli.main
import syncd.cli.main
from tests.documents import ROOT


def parameters(app: typer.Typer) -> Iterator[tuple[str, Any, Any]]:
    """Yield each parameter of a program and its commands as "command name", with its context."""
    commands: list[tuple[str, Any]] = [("", get_command(app))]
    while commands:
        path, command = commands.pop()
        context = command.make_context(path, [], resilient_parsing=True)
        for parameter in command.get_params(context):
            yield f"{path} {parameter.name}", parameter, context
        commands += [(f"{path} {name}", sub) for name, sub in getattr(command, "commands", {}).items()]


programs = pytest.mark.parametrize(
    "app", [syncd.cli.main.app, openmeter_plugin.cli.main.app], ids=["syncd", "plugin"]
)


@programs
def test_help_shows_no_type_of_python_for_the_value_of_a_parameter(app: typer.Typer) -> None:
    found = {name: one.display_type_rich(ctx=context) or "" for name, one, context in parameters(app)}
    assert len(found) > 40
    assert {name: value for name, value in found.items() if "<" in value and "|" not in value} == {}


@programs
def test_every_argument_has_a_name_in_capitals(app: typer.Typer) -> None:
    shown = {name: one.metavar for name, one, _ in parameters(app) if one.param_type_name == "argument"}
    assert shown
    assert {name: metavar for name, metavar in shown.items() if not (metavar or "").isupper()} == {}


@programs
def test_json_is_an_output_and_no_option_of_its_own(app: typer.Typer) -> None:
    assert [name for name, one, _ in parameters(app) if "--json" in one.opts] == []


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


def test_the_help_of_syncd_waits_for_no_library_that_only_a_command_needs() -> None:
    slow = {"alembic", "fastapi", "httpcore", "httpx", "pydantic", "sqlalchemy", "starlette", "uvicorn"}
    program = f"import sys, syncd.cli.main; print(*sorted({slow} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (result.stdout.split(), result.stderr) == ([], "")
