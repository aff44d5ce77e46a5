"""`syncd meters`: the standard meters."""

from __future__ import annotations

import typer

from syncd.cli.options import APPLIED, BLOCKED, ConfigOption, JsonOption, config_path, finish, print_json

app = typer.Typer(help="The standard meters.", no_args_is_help=True)


@app.callback()
def _meters() -> None:
    """Have `apply` be a command of its own although it is the only one."""


@app.command()
def apply(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Create the standard meters that are missing. Exit status: 0 all there, 3 one differs, 1 error.

    A meter that differs is reported and never changed.
    """
    from syncd.config import settings
    from syncd.http.client import ApiClient
    from syncd.http.retry import Retry
    from syncd.metering.meters import MeterApi, apply_meters
    from syncd.runs.factory import metering_endpoint

    loaded = settings.load(config_path(context, config))
    with ApiClient(metering_endpoint(loaded), Retry(attempts=loaded.metering.attempts)) as client:
        results = apply_meters(MeterApi(client, loaded.metering.dialect))
    if as_json:
        print_json({"meters": [result.to_json() for result in results]})
    else:
        for result in results:
            why = f": {'; '.join(result.differences)}. Left alone" if result.differences else ""
            print(f"{result.key}: {result.status}{why}")
    finish(BLOCKED if any(result.status == "differs" for result in results) else APPLIED)
