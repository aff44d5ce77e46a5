"""`syncd meters`: creates the standard meters."""

from __future__ import annotations

from contextlib import closing

import typer

from syncd.cli.options import APPLIED, BLOCKED, ConfigOption, JsonOption, config_path, finish, print_json

app = typer.Typer(help="Manage the standard meters.", no_args_is_help=True)


@app.callback()
def _meters() -> None:
    """Keep `apply` a subcommand: typer would merge the only command into its parent."""


@app.command()
def apply(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Create missing standard meters. Exit status: 0 all exist, 3 one differs, 1 error.

    A meter that differs is reported but never changed.
    """
    from syncd.config import settings
    from syncd.core.text import printable
    from syncd.metering.meters import apply_meters
    from syncd.runs.factory import target_of

    loaded = settings.load(config_path(context, config))
    with closing(target_of(loaded)) as target:
        results = apply_meters(target)
    if as_json:
        print_json({"meters": [result.to_json() for result in results]})
    else:
        for result in results:
            detail = f": {'; '.join(result.differences)}. Not changed" if result.differences else ""
            print(printable(f"{result.key}: {result.status}{detail}"))
    finish(BLOCKED if any(result.status == "differs" for result in results) else APPLIED)
