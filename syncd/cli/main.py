"""Entry point and main commands of `syncd`. Data goes to stdout, errors to stderr.

Exit status: `plan` 0 in sync, 2 drift; `apply` 0 applied, 3 something is blocked; 1 error; 64 usage error.
`resync --wait` exits with the result of the run: 0, 2 (dry run with drift), 3 or 1. `audit`: 0 equal, 2
different, 1 error. `close`: 0 closed, 2 objections or late events, 1 error.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from syncd import __version__, log
from syncd.cli import audit, close, daemon, setup
from syncd.cli.options import (
    APPLIED,
    BLOCKED,
    DRIFT,
    ERROR,
    IN_SYNC,
    USAGE,
    Command,
    ConfigOption,
    Finished,
    FromOption,
    Group,
    Last,
    Output,
    OutputOption,
    PlanOutput,
    Sort,
    ToOption,
    UsageOutput,
    complain,
    complete_sources,
    config_path,
    console,
    finish,
    print_json,
)
from syncd.core.errors import SyncdError
from syncd.runs.options import RunOptions, offering

app = typer.Typer(
    name="syncd",
    cls=Group,
    help="Keep the customers of a metering API in sync with Kong consumers and Dev Portal applications.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(setup.meters_app, name="meters")
app.add_typer(daemon.state_app, name="state")


def main() -> int:
    """Run the command line and return the exit status."""
    log.configure(logging.WARNING)
    try:
        app(prog_name="syncd")
    except Finished as finished:
        return int(finished.code or 0)
    except SystemExit as end:
        return USAGE if end.code == 2 else int(end.code or 0)
    except SyncdError as error:
        complain(error)
        return ERROR
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"", "syncd", "openmeter_plugin"}:
            raise
        complain(f"the package {error.name} is not installed; run: pip install 'kong-openmeter[syncd]'")
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


@app.command(cls=Command)
@offering("plan", {"source": complete_sources})
def plan(
    context: typer.Context,
    config: ConfigOption = None,
    output: Annotated[PlanOutput, typer.Option("--output", "-o", help="What to print.")] = PlanOutput.TEXT,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the plan to a file for `apply --plan FILE`."),
    ] = None,
    *,
    options: RunOptions,
) -> None:
    """Show what `apply` would do, without changing anything. Exit status: 0 in sync, 2 drift, 1 error."""
    from syncd.cli import plan_text
    from syncd.cli.render import steps
    from syncd.config import settings
    from syncd.planning import plan_file
    from syncd.runs.factory import existing_history
    from syncd.runs.reconciler import Reconciler
    from syncd.runs.run import new_run

    loaded = settings.load(config_path(context, config))
    with existing_history(loaded) as history, steps() as progress:
        progress.begin("reading sources and customers")
        run = Reconciler(loaded, history).reconcile(new_run("plan", replace(options, dry_run=True)))
    made = run.made_plan
    if out is not None:
        plan_file.write(made, out, options.reviewable())
    match output:
        case PlanOutput.JSON:
            print_json(made.to_json())
        case PlanOutput.MARKDOWN:
            print(plan_text.markdown(made), end="")
        case PlanOutput.TEXT:
            plan_text.show_plan(console(), made)
    finish(IN_SYNC if made.in_sync else DRIFT)


@app.command(cls=Command)
@offering("apply", {"source": complete_sources})
def apply(
    context: typer.Context,
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Apply exactly this reviewed plan, or fail.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal to ask on.")
    ] = False,
    *,
    options: RunOptions,
) -> None:
    """Show the plan, ask, and apply it. Exit status: 0 applied, 3 something is blocked, 1 error."""
    from syncd.cli.apply import apply as apply_plan
    from syncd.cli.apply import can_ask
    from syncd.config import settings

    if plan is not None and any(options.reviewable().values()):
        problem = "only --force can be combined with it; the plan contains the options it was made with"
        raise typer.BadParameter(problem, param_hint="--plan")
    as_json, ask = output is Output.JSON, not yes and plan is None
    if ask and (as_json or not can_ask()):
        problem = "apply asks before it changes anything, which needs a terminal; with --yes it does not ask"
        raise typer.BadParameter(problem, param_hint="--yes")
    loaded = settings.load(config_path(context, config))
    run = apply_plan(loaded, options, plan_path=plan, ask=ask, as_json=as_json)
    finish(BLOCKED if run.blocked else APPLIED)


@app.command(cls=Command)
def usage(
    context: typer.Context,
    config: ConfigOption = None,
    since: FromOption = None,
    until: ToOption = None,
    last: Annotated[Last | None, typer.Option("--last", help="The day, week or month before this.")] = None,
    sort: Annotated[Sort, typer.Option("--sort", help="What to sort by.")] = Sort.REQUESTS,
    output: Annotated[UsageOutput, typer.Option("--output", "-o", help="What to print.")] = UsageOutput.TEXT,
) -> None:
    """Show usage by customer and subject, and usage that no customer is billed for."""
    from syncd.cli import usage_text
    from syncd.cli.render import steps
    from syncd.config import settings
    from syncd.metering.usage import owners, read_usage, rfc3339
    from syncd.runs import factory
    from syncd.usage.estimates import prices_of, read_estimate

    now = datetime.now(UTC)
    when = usage_text.period(since, until, last, now)
    begin, end = (rfc3339(time) if time else None for time in (when.since, when.until))
    loaded = settings.load(config_path(context, config))
    prices = prices_of(loaded.prices)
    with closing(factory.target_of(loaded)) as target, steps() as progress:
        progress.begin("reading the meters")
        observed = target.observe()
        found = usage_text.sorted_usage(read_usage(target, observed, begin, end), sort)
        estimate = (
            read_estimate(target, prices, owners(observed.customers), when.since, when.until or now)
            if prices is not None
            else None
        )
    match output:
        case UsageOutput.JSON:
            print_json({"from": begin, "to": end, **usage_text.to_json(found, estimate)})
        case UsageOutput.CSV:
            usage_text.print_csv(found, when, estimate)
        case UsageOutput.TEXT:
            usage_text.show_usage(console(), found, when, estimate)


@app.command(cls=Command)
def sandbox(
    db: Annotated[Path, typer.Option(metavar="FILE", help="SQLite file; created if it does not exist.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8888,
    token: Annotated[
        str | None, typer.Option(envvar="SYNCD_SANDBOX_TOKEN", help="Require this bearer token.")
    ] = None,
    no_subjects: Annotated[
        bool, typer.Option("--no-subjects", help="Emulate a server without /api/v1/subjects.")
    ] = False,
    max_subjects_per_customer: Annotated[
        int | None, typer.Option(min=1, help="Refuse customers with more subjects.")
    ] = None,
    no_dedupe: Annotated[
        bool, typer.Option("--no-dedupe", help="Emulate a server without deduplication.")
    ] = False,
    flush_seconds: Annotated[
        float, typer.Option(min=0, help="Store events every so often, as a real server does; 0 is at once.")
    ] = 0,
) -> None:
    """Serve an embedded metering API for development, demos and tests. Not for production."""
    import sqlite3

    from syncd.sandbox import serve

    try:
        serve(
            host,
            port,
            db,
            token=token,
            subjects=not no_subjects,
            max_subjects_per_customer=max_subjects_per_customer,
            dedupe=not no_dedupe,
            flush_seconds=flush_seconds,
        )
    except (OSError, sqlite3.Error) as error:
        raise SyncdError(f"the sandbox cannot start on {host}:{port} with {db}: {error}") from None


for _command in (*setup.COMMANDS, *daemon.COMMANDS, audit.audit, close.close, daemon.notify):
    app.command(cls=Command)(_command)
