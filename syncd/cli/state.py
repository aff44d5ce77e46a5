"""``syncd state``: moves the state between its databases."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import typer

from syncd.cli.options import (
    Command,
    ConfigOption,
    Group,
    Output,
    OutputOption,
    config_path,
    console,
    print_json,
)
from syncd.core.errors import ConfigError

app = typer.Typer(cls=Group, help="Manage the state, such as the run history.", no_args_is_help=True)


class Database(StrEnum):
    """Where the state can be."""

    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


@app.command(cls=Command)
def migrate(
    context: typer.Context,
    to: Annotated[Database, typer.Option("--to", help="Where to copy the state.")],
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Copy the state between the file in daemon.state_dir and the database daemon.state_url.

    The target has to be empty; the source stays as it is. Stop `syncd run` first.
    """
    from syncd.cli.render import counts, line
    from syncd.config import settings
    from syncd.runs.lock import write_lock
    from syncd.state.database import State, copy_state

    service = settings.load(config_path(context, config)).daemon
    if service.state_url is None:
        raise ConfigError("set daemon.state_url (SYNCD_DAEMON__STATE_URL): it names one of the two databases")
    database, file = service.state, replace(service.state, url=None)
    source, target = (file, database) if to is Database.POSTGRESQL else (database, file)
    if not source.exists():
        raise ConfigError(f"there is no state to copy: {source} does not exist")
    holder = "syncd state migrate"
    with (
        State(source) as old,
        State(target) as new,
        write_lock(old, holder, patience=0),
        write_lock(new, holder, patience=0),
    ):
        copied = copy_state(old, new)
    if output is Output.JSON:
        print_json({"from": str(source), "to": str(target), "rows": copied})
    else:
        line(console(), f"Copied from {source} to {target}: {counts(copied)}.")
