"""Commands around the daemon: run, resync, status, history, doctor; its state, and its notifications."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from syncd import log as logs
from syncd.cli.options import (
    APPLIED,
    BLOCKED,
    DRIFT,
    ERROR,
    Command,
    ConfigOption,
    Group,
    Output,
    OutputOption,
    complain,
    complete_runs,
    complete_sources,
    config_path,
    console,
    finish,
    print_json,
)
from syncd.core.errors import ConfigError, SyncdError
from syncd.runs.options import TABLE, RunOptions, offering

if TYPE_CHECKING:
    from syncd.config.settings import Config
    from syncd.daemon.client import DaemonClient
    from syncd.doctor.checkup import Probe
    from syncd.notify.store import SentNotice

RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="Run id, or its first characters.", autocompletion=complete_runs),
]


class LogLevel(StrEnum):
    """The least severe entries of the log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def run(
    context: typer.Context,
    config: ConfigOption = None,
    log_level: Annotated[
        LogLevel,
        typer.Option("--log-level", help="Log nothing less severe.", envvar="SYNCD_LOG_LEVEL"),
    ] = LogLevel.INFO,
) -> None:
    """Run the daemon: syncs at start, then on schedule and on request (`resync`)."""
    from syncd.config import settings
    from syncd.daemon import service

    path = config_path(context, config)
    loaded = settings.load(path)
    logs.configure(logging.getLevelNamesMapping()[log_level.upper()])
    service.run_until_signalled(loaded, lambda: settings.load(path))


@offering("resync", {"source": complete_sources})
def resync(
    context: typer.Context,
    config: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan only; change nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the run and exit with its result.")] = False,
    output: OutputOption = Output.TEXT,
    *,
    options: RunOptions,
) -> None:
    """Trigger a run in the daemon.

    With --allow-move or --adopt it shows the plan first, then applies exactly that plan.
    """
    as_json = output is Output.JSON
    client = daemon_client(context, config)
    asked: dict[str, bool | str | None] = {name: getattr(options, name) for name in TABLE if name != "force"}
    if any(entry.previewed and asked.get(name) for name, entry in TABLE.items()) and not dry_run:
        preview = _wait(client, client.request(**asked, dry_run=True), as_json=as_json)
        _show_plan(preview, as_json=as_json)
        asked = {"reviewed": str(preview["id"])}
    elif dry_run:
        asked["dry_run"] = True
    run: Mapping[str, Any] = client.request(**asked, force=options.force)
    if wait:
        run = _wait(client, run, as_json=as_json)
        if dry_run:
            _show_plan(run, as_json=as_json)
    _show_run(run, as_json=as_json)
    if wait:
        finish(_exit_status(run))


def _wait(client: DaemonClient, run: Mapping[str, Any], *, as_json: bool) -> Mapping[str, Any]:
    """Wait until a run has ended; if it failed, end with its error, and as JSON with the run."""
    from syncd.cli.render import steps
    from syncd.runs.run import RunState

    with steps() as progress:
        progress.begin(f"waiting for run {run['id']}")
        ended = client.wait(dict(run))
    if ended["state"] == RunState.FAILED:
        problem = f"run {run['id']} failed: {ended['error']}"
        if not as_json:
            raise SyncdError(problem)
        print_json(ended)
        complain(problem)
        finish(ERROR)
    return ended


def _show_run(run: Mapping[str, Any], *, as_json: bool) -> None:
    from syncd.cli import render

    if as_json:
        print_json(run)
    else:
        render.show_run(console(), run)


def _show_plan(run: Mapping[str, Any], *, as_json: bool) -> None:
    from syncd.cli import plan_text
    from syncd.planning import plan_file

    if not as_json:
        plan_text.show_plan(console(), plan_file.from_json(run["plan"]))


def _exit_status(run: Mapping[str, Any]) -> int:
    from syncd.runs.run import RunState

    if run["state"] == RunState.BLOCKED:
        return BLOCKED
    return DRIFT if run["dry_run"] and not run["in_sync"] else APPLIED


def status(context: typer.Context, config: ConfigOption = None, output: OutputOption = Output.TEXT) -> None:
    """Show the daemon's status. Exit status: 1 if its last run failed or no daemon is running, else 0."""
    from syncd.cli import render

    result = daemon_client(context, config).status()
    if output is Output.JSON:
        print_json(result)
    else:
        render.show_status(console(), result)
    last = result["last"]
    finish(ERROR if isinstance(last, dict) and last["state"] == "failed" else APPLIED)


def history(
    context: typer.Context,
    run_id: RunArgument = None,
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of runs.")] = 20,
) -> None:
    """Show the latest runs, or one run with its changes. Reads the state, not the daemon."""
    from syncd.cli import render
    from syncd.config import settings
    from syncd.runs.history import History
    from syncd.runs.lock import close_interrupted
    from syncd.state.database import State

    service = settings.load(config_path(context, config)).daemon
    with State(service.state) as state:
        history = History(state)
        close_interrupted(state, history)
        found = history.runs(limit) if run_id is None else history.run(run_id)
    if found is None:
        raise SyncdError(f"no run {run_id!r} in the history")
    if output is Output.JSON:
        print_json(found)
    elif isinstance(found, list):
        render.show_runs(console(), found)
    else:
        render.show_recorded_run(console(), found)


def doctor(
    context: typer.Context,
    config: ConfigOption = None,
    output: OutputOption = Output.TEXT,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Send one event, of its own type, twice to test deduplication."),
    ] = False,
    probe_flush: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="With --probe: how long the metering API's sink may collect events before it stores them.",
        ),
    ] = 6.0,
) -> None:
    """Check connectivity, permissions and configuration of everything syncd talks to.

    Exit status: 1 if there is a problem, else 0.
    """
    from syncd.config import settings
    from syncd.doctor.checkup import Probe

    loaded = settings.load(config_path(context, config))
    finish(show_checkup(loaded, output, probe=Probe(probe_flush) if probe else None))


_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
"""By the level of a finding."""


def show_checkup(loaded: Config, output: Output, *, probe: Probe | None) -> int:
    """Run the checks of `doctor`, print what they find, and return the exit status."""
    from syncd.cli.render import line, styled_line
    from syncd.doctor.checks import Level, summary
    from syncd.doctor.checkup import examine

    findings = []
    for finding in examine(loaded, probe=probe):
        findings.append(finding)
        if output is Output.TEXT:
            styled_line(
                console(), f"{finding.level:<8}", _STYLES[finding.level], f" {finding.check}: {finding.text}"
            )
    if output is Output.JSON:
        print_json([finding.to_json() for finding in findings])
    else:
        line(console(), summary(findings))
    return ERROR if any(finding.level is Level.PROBLEM for finding in findings) else APPLIED


def daemon_client(context: typer.Context, config: Path | None) -> DaemonClient:
    """Return a client of the daemon that uses this configuration."""
    from syncd.config import settings
    from syncd.daemon.client import DaemonClient

    service = settings.load(config_path(context, config)).daemon
    return DaemonClient(service.listen.url, service.token.get_secret_value() if service.token else None)


COMMANDS = (run, resync, status, history, doctor)


state_app = typer.Typer(cls=Group, help="Manage the state, such as the run history.", no_args_is_help=True)


class Database(StrEnum):
    """Where the state can be."""

    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


@state_app.command(cls=Command)
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


def notify(
    context: typer.Context,
    config: ConfigOption = None,
    test: Annotated[bool, typer.Option("--test", help="Send a test message to each of notify.urls.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """List the notifications that were sent and still hold, or send a test message.

    `syncd run` sends them; this command sends nothing without --test.
    """
    from syncd.config import settings

    loaded = settings.load(config_path(context, config))
    if test:
        _test(loaded)
    else:
        _list(loaded, as_json=output is Output.JSON)


def _test(config: Config) -> None:
    from syncd.notify.sending import send, target_name

    config.notify.check()
    urls = [url.get_secret_value() for url in config.notify.urls]
    if not urls:
        complain("notify.urls is empty, so there is nowhere to send to (docs/notifications.md)")
        finish(ERROR)
    title, body = f"syncd {config.owner_id}: test", "This is a test of notify.urls. Nothing has happened."
    failures = {one.index: one for one in send(urls, title, body, config.notify.timeout.total_seconds())}
    for index, url in enumerate(urls):
        if index not in failures:
            console().print(f"sent to {target_name(index, url)}", highlight=False, markup=False)
    for failure in failures.values():
        complain(f"{failure.name} failed: {failure.reason}")
    if failures:
        finish(ERROR)


def _list(config: Config, *, as_json: bool) -> None:
    holding = _holding(config)
    if as_json:
        print_json({"notices": [asdict(notice) for notice in holding or ()]})
        return
    if holding is None:
        console().print("nothing was sent yet")
        return
    for notice in holding:
        line = f"{notice.sent_at[:19].replace('T', ' ')} UTC  {notice.topic}  {notice.text}"
        console().print(line, highlight=False, markup=False, soft_wrap=True)
    if not holding:
        console().print("nothing that was sent still holds")


def _holding(config: Config) -> list[SentNotice] | None:
    """Return what was sent and still holds, None if there is no state to read."""
    if not config.daemon.state.exists():
        return None
    from syncd.notify.store import Notices
    from syncd.state.database import State

    with State(config.daemon.state) as state:
        return Notices(state).holding()
