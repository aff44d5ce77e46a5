"""What the commands of the command line share: options, exit statuses, output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

IN_SYNC = APPLIED = 0
ERROR = 1
DRIFT = 2
BLOCKED = 3
USAGE = 64
"""EX_USAGE of sysexits.h; the library's own 2 would be taken for drift."""

DEFAULT_CONFIG = Path("syncd.yaml")
CONFIG_HELP = "The configuration (default: syncd.yaml)."

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", envvar="SYNCD_CONFIG", metavar="FILE", help=CONFIG_HELP)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


MoveOption = Annotated[
    bool, typer.Option("--allow-move", help="Move subjects between customers of ours, with their open usage.")
]
RetireOption = Annotated[
    bool,
    typer.Option(
        "--allow-retire", help="Delete a customer of ours whose own key is a subject that joins a group."
    ),
]
AdoptOption = Annotated[
    bool, typer.Option("--adopt", help="Take over customers that people made with exactly our key.")
]
EmptyOption = Annotated[
    bool, typer.Option("--allow-empty", help="Let an empty source remove (policy sync) what it named before.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Lift the guards on the share of changes.")]
SourceOption = Annotated[
    str | None, typer.Option("--source", metavar="NAME", help="Only principals of this source; no removals.")
]
PrincipalOption = Annotated[
    str | None,
    typer.Option("--principal", metavar="ID", help="Only this id, username or custom_id; no removals."),
]


class Finished(SystemExit):
    """A command's own exit status; told apart from the 2 that the command-line library exits with."""


def config_path(context: typer.Context, here: Path | None) -> Path:
    """Return the configuration named after the command, else the one before it, else syncd.yaml."""
    return here or context.obj or DEFAULT_CONFIG


def console() -> Console:
    """Return where tables go."""
    return Console(file=sys.stdout)


def print_json(value: object) -> None:
    """Print data for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def finish(status: int) -> NoReturn:
    """End the command with its own exit status."""
    raise Finished(status)
