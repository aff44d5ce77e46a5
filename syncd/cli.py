"""The command line. Data goes to stdout, errors to stderr.

Exit status: `plan` 0 in sync, 2 drift; `apply` 0 applied, 3 something is blocked; 1 error; 64 wrong usage.
`resync --wait` ends as the run did: 0, 2 (dry run with drift), 3 or 1.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from syncd import __version__, logs
from syncd.changes import Plan
from syncd.errors import ApplyStoppedError, SyncdError
from syncd.outcome import Outcome, count

IN_SYNC = APPLIED = 0
ERROR = 1
DRIFT = 2
BLOCKED = 3
USAGE = 64
"""EX_USAGE of sysexits.h; the library's own 2 would be taken for drift."""

app = typer.Typer(
    name="syncd",
    help="Kong consumers and Dev Portal applications become customers and subjects of a metering API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULT_CONFIG = Path("syncd.yaml")
_CONFIG_HELP = "The configuration (default: syncd.yaml)."

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", envvar="SYNCD_CONFIG", metavar="FILE", help=_CONFIG_HELP)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class _Finished(SystemExit):
    """A command's own exit status; told apart from the 2 that the command-line library exits with."""


def main() -> int:
    """Run the command line and return the exit status."""
    logs.configure(logging.WARNING)
    try:
        app(prog_name="syncd")
    except _Finished as finished:
        return int(finished.code or 0)
    except SystemExit as end:
        return USAGE if end.code == 2 else int(end.code or 0)
    except SyncdError as error:
        print(f"syncd: {error}", file=sys.stderr)
        return ERROR
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        print(f"syncd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    config: ConfigOption = None,
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = config


@app.command()
def plan(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show what apply would do. Changes nothing. Exit status: 0 in sync, 2 drift, 1 error."""
    from syncd import config as settings
    from syncd import render, runner

    result = runner.run(settings.load(_path(context, config)), dry_run=True)
    if as_json:
        _print_json(result.plan.to_json())
    else:
        render.show_plan(_console(), result.plan)
    _finish(IN_SYNC if result.plan.in_sync else DRIFT)


@app.command()
def apply(context: typer.Context, config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show the plan and carry it out. Exit status: 0 applied, 3 something is blocked, 1 error."""
    from syncd import config as settings
    from syncd import render, runner

    console = _console()
    plans: list[Plan] = []

    def on_plan(plan: Plan) -> None:
        plans.append(plan)
        if not as_json:
            render.show_plan(console, plan)

    def show(outcomes: tuple[Outcome, ...], error: str | None) -> None:
        if not as_json:
            render.show_outcomes(console, outcomes)
            return
        results = [outcome.to_json() for outcome in outcomes]
        _print_json(
            {"plan": plans[0].to_json(), "summary": count(outcomes), "outcomes": results, "error": error}
        )

    try:
        result = runner.run(settings.load(_path(context, config)), dry_run=False, on_plan=on_plan)
    except ApplyStoppedError as error:
        show(error.outcomes, str(error))
        raise
    show(result.outcomes, None)
    _finish(BLOCKED if result.blocked else APPLIED)


@app.command()
def run(context: typer.Context, config: ConfigOption = None) -> None:
    """Run the daemon: a sync at the start, one each interval, more on request (resync)."""
    from syncd import config as settings
    from syncd import daemon

    loaded = settings.load(_path(context, config))
    logs.configure(logging.INFO)
    daemon.run_until_signalled(loaded)


@app.command()
def resync(
    context: typer.Context,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end; the exit status tells it.")] = False,
) -> None:
    """Ask the running daemon for a sync now. Prints the run as JSON."""
    from syncd import config as settings
    from syncd.daemon_client import DaemonClient
    from syncd.runs import State

    daemon = settings.load(_path(context, config)).daemon
    client = DaemonClient(daemon.listen.url, daemon.token.get_secret_value() if daemon.token else None)
    result = client.request(dry_run=dry_run)
    if not wait:
        _print_json(result)
        return
    result = client.wait(result)
    _print_json(result)
    match State(str(result["state"])):
        case State.FAILED:
            raise SyncdError(f"the run failed: {result['error']}")
        case State.BLOCKED:
            _finish(BLOCKED)
        case _:
            _finish(DRIFT if dry_run and not result["in_sync"] else APPLIED)


@app.command()
def usage(
    context: typer.Context,
    config: ConfigOption = None,
    since: Annotated[str | None, typer.Option("--from", help="RFC 3339, inclusive.")] = None,
    until: Annotated[str | None, typer.Option("--to", help="RFC 3339.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each customer and subject used, and what no customer is charged for."""
    from syncd import config as settings
    from syncd import render, wiring
    from syncd.usage import read_usage

    with closing(wiring.target_of(settings.load(_path(context, config)))) as target:
        found = read_usage(target, since, until)
    if as_json:
        _print_json(found.to_json())
    else:
        render.show_usage(_console(), found)


@app.command()
def sandbox(
    db: Annotated[Path, typer.Option(metavar="FILE", help="The SQLite file; made if it is not there.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any.")] = 8888,
    token: Annotated[
        str | None, typer.Option(envvar="SYNCD_SANDBOX_TOKEN", help="Ask for this bearer token.")
    ] = None,
    no_subjects: Annotated[bool, typer.Option("--no-subjects", help="Have no /api/v1/subjects.")] = False,
    max_subjects_per_customer: Annotated[
        int | None, typer.Option(min=1, help="Refuse more subjects on one customer.")
    ] = None,
) -> None:
    """Serve an embedded metering API for development, demo and tests. Not for production."""
    import sqlite3

    from syncd.sandbox import serve

    limit = max_subjects_per_customer
    try:
        serve(host, port, db, token=token, subjects=not no_subjects, max_subjects_per_customer=limit)
    except (OSError, sqlite3.Error) as error:
        raise SyncdError(f"the sandbox cannot start on {host}:{port} with {db}: {error}") from None


def _path(context: typer.Context, here: Path | None) -> Path:
    """Return the configuration named after the command, else the one before it, else syncd.yaml."""
    return here or context.obj or _DEFAULT_CONFIG


def _console() -> Console:
    return Console(file=sys.stdout)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _finish(status: int) -> NoReturn:
    raise _Finished(status)
