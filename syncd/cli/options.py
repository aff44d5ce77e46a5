"""Options, exit statuses and output helpers shared by the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from syncd.core.text import printable

IN_SYNC = APPLIED = 0
ERROR = 1
DRIFT = 2
BLOCKED = 3
USAGE = 64
"""EX_USAGE of sysexits.h; the 2 that typer exits with would look like drift."""

DEFAULT_CONFIG = Path("syncd.yaml")
CONFIG_HELP = "Configuration file (default: syncd.yaml)."

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", envvar="SYNCD_CONFIG", metavar="FILE", help=CONFIG_HELP)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MoveOption = Annotated[
    bool,
    typer.Option(
        "--allow-move", help="Move subjects between managed customers, with usage not yet invoiced."
    ),
]
RetireOption = Annotated[
    bool,
    typer.Option(
        "--allow-retire", help="Delete managed customers whose key is a subject that moves to another."
    ),
]
AdoptOption = Annotated[
    bool, typer.Option("--adopt", help="Adopt existing customers whose key matches exactly.")
]
EmptyOption = Annotated[
    bool,
    typer.Option("--allow-empty", help="Allow removals (policy sync) even if a source returns no consumers."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Override the guards on the share of changes.")]
SourceOption = Annotated[
    str | None,
    typer.Option("--source", metavar="NAME", help="Only principals of this source; removes nothing."),
]
PrincipalOption = Annotated[
    str | None,
    typer.Option(
        "--principal",
        metavar="ID",
        help="Only the principal with this id, username or custom_id; removes nothing.",
    ),
]


class Finished(SystemExit):
    """A command's own exit status, as opposed to the 2 with which typer exits."""


def config_path(context: typer.Context, here: Path | None) -> Path:
    """Return the configuration file given after the command, else the one before it, else syncd.yaml."""
    return here or context.obj or DEFAULT_CONFIG


def console() -> Console:
    """Return the console for tables."""
    return Console(file=sys.stdout)


def print_json(value: object) -> None:
    """Print a value as JSON; what a terminal would act on is escaped by JSON's rules, which loses nothing."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not (plain := text.replace("\n", "")).isprintable():
        for char in {char for char in plain if not char.isprintable()}:
            text = text.replace(char, json.dumps(char)[1:-1])
    print(text)


def complain(problem: object) -> None:
    """Print an error to stderr; it may quote what others wrote."""
    print(f"syncd: {printable(str(problem), keep=chr(10))}", file=sys.stderr, flush=True)


def finish(status: int) -> NoReturn:
    """End the command with its own exit status."""
    raise Finished(status)
