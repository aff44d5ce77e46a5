"""Options, exit statuses and output helpers shared by the commands."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from syncd.core.period import parse_moment
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


def moment(text: str) -> datetime:
    """Return the time of an option; a day means its first moment, in UTC."""
    try:
        return parse_moment(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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
