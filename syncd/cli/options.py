"""Options, exit statuses, output helpers and shell completion shared by the commands.

Completion runs at each press of the tab key: whatever fails ends in no suggestions, never in an error on the
line.
"""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from openmeter_plugin.cli.help import Command as ReadableCommand
from openmeter_plugin.cli.help import Group as Group  # noqa: PLC0414 - for the other modules
from syncd.core.errors import SyncdError

if TYPE_CHECKING:
    from syncd.config.settings import Config

IN_SYNC = APPLIED = 0
ERROR = 1
DRIFT = 2
BLOCKED = 3
USAGE = 64
"""EX_USAGE of sysexits.h; the 2 that typer exits with would look like drift."""

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")

DEFAULT_CONFIG = Path("syncd.yaml")
CONFIG_HELP = "Configuration file (default: syncd.yaml)."

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", envvar="SYNCD_CONFIG", metavar="FILE", help=CONFIG_HELP)
]


class Output(StrEnum):
    """What a command prints."""

    TEXT = "text"
    JSON = "json"


class UsageOutput(StrEnum):
    """What `usage` prints."""

    TEXT = "text"
    CSV = "csv"
    JSON = "json"


class PlanOutput(StrEnum):
    """What `plan` prints."""

    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


class Last(StrEnum):
    """A period before the current one, in UTC."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class Sort(StrEnum):
    """What customers and subjects are sorted by."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    NAME = "name"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="What to print.")]


class Command(ReadableCommand):
    """A command that prints an error as JSON too, if its output is JSON."""

    def invoke(self, ctx: Any) -> object:  # typer brings a click of its own
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SyncdError as error:
            if ctx.params.get("output") == Output.JSON:
                print_json({"error": str(error)})
            raise


def moment(text: str) -> datetime:
    """Return the time of an option: RFC 3339, or a day, which begins at midnight UTC.

    A period includes its start and excludes its end, so ``--from 2026-11-01 --to 2026-12-01`` is November.
    """
    try:
        if _DAY.fullmatch(text):
            return datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
        found = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter("must be a time such as 2026-11-22T07:00:00Z, or a day (UTC)") from None
    if found.tzinfo is None:
        raise typer.BadParameter("needs a time zone, as in 2026-11-22T07:00:00Z")
    return found


FromOption = Annotated[
    datetime | None,
    typer.Option("--from", parser=moment, metavar="TIME", help="Start, inclusive: RFC 3339 or a day (UTC)."),
]
ToOption = Annotated[
    datetime | None,
    typer.Option("--to", parser=moment, metavar="TIME", help="End, exclusive: RFC 3339 or a day (UTC)."),
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


def printable(text: str, keep: str = "") -> str:
    """Return the text with each character that cannot be seen written as ``?``, except those in `keep`.

    Names, reasons and answers come from outside. Control characters (C0, DEL, C1) would steer a terminal,
    and format characters such as U+202E would show a text in another order than it is stored.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else "?" for char in text)


def complain(problem: object) -> None:
    """Print an error to stderr; it may quote what others wrote."""
    print(f"syncd: {printable(str(problem), keep=chr(10))}", file=sys.stderr, flush=True)


def finish(status: int) -> NoReturn:
    """End the command with its own exit status."""
    raise Finished(status)


_MAX_RUNS = 50


def complete_sources(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of the sources that begin so."""
    from syncd.config.sources import source_names

    config = _config_so_far(context)
    names = source_names(config.sources) if config else []
    return [name for name in names if name.startswith(incomplete)]


def complete_runs(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the ids of the latest runs that begin so, each with when it was and how it ended."""
    config = _config_so_far(context)
    if config is None or not config.daemon.state.exists():
        return []
    from syncd.runs.history import History
    from syncd.state.database import State

    try:
        with State(config.daemon.state) as state:
            found = History(state).runs(_MAX_RUNS)
    except SyncdError:
        return []
    return [
        (str(run["id"])[:8], f"{str(run['requested_at'])[:16]} {run['state']}")
        for run in found
        if str(run["id"]).startswith(incomplete)
    ]


def _config_so_far(context: typer.Context) -> Config | None:
    """Return the configuration of the command line so far, None if it cannot be read."""
    from syncd.config import settings

    # Completion runs no callbacks, so the option before the command is in the parameters of its context.
    contexts = [context, context.parent] if context.parent else [context]
    given = next((path for one in contexts if (path := one.params.get("config"))), None)
    try:
        return settings.load(Path(given or os.environ.get("SYNCD_CONFIG") or DEFAULT_CONFIG))
    except SyncdError:
        return None
