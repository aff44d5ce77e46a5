"""The commands of `openmeter-plugin`."""

from __future__ import annotations

import gc
import os
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from openmeter_plugin import __version__
from openmeter_plugin.cli import spool as spool_cli
from openmeter_plugin.cli.listeners import (
    http_log_settings,
    listen_for_api,
    octal,
    open_listeners,
    own_socket,
)
from openmeter_plugin.cli.options import delivery_options, fail
from openmeter_plugin.defaults import DEFAULT_SPOOL, SPOOL_VARIABLE
from openmeter_plugin.delivery.options import DEFAULT_LEDGER_DAYS, TOKEN_VARIABLE
from openmeter_plugin.instances.worker_sync import Mailboxes
from openmeter_plugin.log import configure_logging
from openmeter_plugin.process.handoff import Handoff, raise_connection_limit
from openmeter_plugin.process.heartbeat import Heartbeats
from openmeter_plugin.process.sockets import DEFAULT_MODE, Listeners
from openmeter_plugin.process.supervisor import Child, supervise

_CLICK_USAGE_ERROR: Final = 2
_UMASK: Final = 0o077
"""Usage is nobody's business but the owner's; Kong starts its plugin servers with no umask at all."""

app = typer.Typer(
    name="openmeter-plugin",
    help="The Kong plugin `openmeter`: one CloudEvent per request, on disk before Kong has its answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(spool_cli.app, name="spool")


class FsyncPolicy(StrEnum):
    """When the kernel is asked to put events on the disk itself; kill -9 costs nothing in any case."""

    always = "always"
    interval = "interval"
    never = "never"


SpoolOption = Annotated[
    Path,
    typer.Option(
        "--spool",
        envvar=SPOOL_VARIABLE,
        help="Directory of the spool, on a local disk that outlives restarts.",
    ),
]

RetentionOption = Annotated[str, typer.Option(help="How long delivered events stay for redelivery.")]
RetentionSizeOption = Annotated[str, typer.Option(help="How much of them stays at most.")]
MaxAgeOption = Annotated[
    str | None, typer.Option(help="Undelivered events older than this become dead letters (default: never).")
]
LedgerDaysOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=36_500,
        help="Days after which settled lines of the ledger are pruned: longer than any invoice can be"
        " disputed. 0: never.",
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(help="File with the token for every destination, in the place of the plugin's api_token."),
]
ApiOption = Annotated[
    str | None,
    typer.Option(help="host:port or unix:/path to offer the HTTP API at: books, metrics, sending again."),
]
ApiTokenFileOption = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token of the HTTP API, in the place of its variable."),
]


@app.command()
def info() -> None:
    """Print what Kong's query command expects: the plugin's name, priority and schema as JSON."""
    # Answered in __main__ before anything is imported; here for --help and for odd spellings.
    import json

    from openmeter_plugin.config.schema import plugin_info

    sys.stdout.write(json.dumps(plugin_info()))


@app.command("schema-lua")
def schema_lua_command() -> None:
    """Print the plugin's schema as Lua, to be uploaded to Konnect or another control plane."""
    from openmeter_plugin.config.schema import schema_lua

    sys.stdout.write(schema_lua())


@app.command()
def serve(
    context: typer.Context,
    socket_path: Annotated[
        Path | None,
        typer.Option("--socket", help="Unix socket that Kong connects to (pluginserver_openmeter_socket)."),
    ] = None,
    http_log: Annotated[
        str | None,
        typer.Option(help="host:port or unix:/path to receive what Kong's http-log plugin posts."),
    ] = None,
    http_log_config: Annotated[
        Path, typer.Option(help="Settings for --http-log, as Kong's configuration has none of ours.")
    ] = Path("openmeter-plugin.yaml"),
    spool: SpoolOption = DEFAULT_SPOOL,
    socket_mode: Annotated[
        str, typer.Option(help="Permissions of the socket, octal; who can connect can send usage.")
    ] = DEFAULT_MODE,
    fsync: Annotated[
        FsyncPolicy, typer.Option(help="How much a power loss may cost: nothing, one interval, or more.")
    ] = FsyncPolicy.interval,
    fsync_interval: Annotated[float, typer.Option(min=0.01, help="Seconds between two syncs.")] = 1.0,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that serve Kong; one takes some 10,000 requests/s.")
    ] = 1,
    hang_timeout: Annotated[
        float, typer.Option(min=2.0, help="Seconds without a sign of life before a process is replaced.")
    ] = 10.0,
    retention: RetentionOption = "1d",
    retention_size: RetentionSizeOption = "1GiB",
    max_age: MaxAgeOption = None,
    ledger_days: LedgerDaysOption = DEFAULT_LEDGER_DAYS,
    token_file: TokenFileOption = None,
    api: ApiOption = None,
    api_token_file: ApiTokenFileOption = None,
) -> None:
    """Serve Kong's ProtoBuf:1 plugin protocol, http-log's posts or both; spool and deliver the events."""
    configure_logging("supervisor")
    os.umask(_UMASK)
    mode = octal(socket_mode, "--socket-mode")
    delivering = delivery_options(spool, retention, retention_size, max_age, token_file, ledger_days)
    listeners: Listeners = context.obj
    open_listeners(listeners, socket_path, http_log, mode)
    _make_spool(spool)
    settings = http_log_settings(listeners.http_log, http_log_config)
    access = listen_for_api(listeners, api, api_token_file)

    # From here on Kong's connections wait for us; now there is time to import.
    from openmeter_plugin.kong.acceptor import ConnectionCounts
    from openmeter_plugin.kong.worker import WorkerOptions, WorkerSlot, run_worker

    options = WorkerOptions(
        spool,
        fsync.value,
        fsync_interval,
        keep_tokens=token_file is None and TOKEN_VARIABLE not in os.environ,
        socket_activated=listeners.plugin is not None and not listeners.plugin.owned,
    )
    heartbeats, mailboxes, shares = Heartbeats(workers + 1), Mailboxes(workers), ConnectionCounts(workers)
    handoffs = [Handoff(raise_connection_limit() // workers) for _ in range(workers)]

    def worker(number: int) -> None:
        if listeners.api is not None:
            listeners.api.socket.close()
        if settings is not None:
            from openmeter_plugin.http_log.receiver import prepare_process

            prepare_process()
        for other in (*handoffs[:number], *handoffs[number + 1 :]):
            other.close()
        place = WorkerSlot(number, heartbeats, mailboxes, shares, handoffs[number])
        run_worker(own_socket(listeners.plugin), options, place, own_socket(listeners.http_log), settings)

    def delivery() -> None:
        offered = own_socket(listeners.api)
        listeners.close()
        for connections in handoffs:
            connections.close()
        from openmeter_plugin.api.runtime import ApiListener, Siblings, run

        names = {f"worker-{number}": number for number in range(workers)} | {"delivery": workers}
        family = Siblings(heartbeats, workers, names, hang_timeout)
        run(delivering, ApiListener(offered, access) if offered and access else None, family)

    gc.freeze()  # searching all of this for garbage would hold Kong up for 15 ms now and then
    children = [
        Child("worker", partial(worker, number), number, handoffs[number]) for number in range(workers)
    ]
    supervise([*children, Child("delivery", delivery, workers)], listeners, heartbeats, hang_timeout)


@app.command()
def deliver(
    spool: SpoolOption = DEFAULT_SPOOL,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="End when everything that is there is delivered.")
    ] = False,
    retention: RetentionOption = "1d",
    retention_size: RetentionSizeOption = "1GiB",
    max_age: MaxAgeOption = None,
    ledger_days: LedgerDaysOption = DEFAULT_LEDGER_DAYS,
    token_file: TokenFileOption = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", hidden=True, help="End when standard input does.")
    ] = False,
    api: ApiOption = None,
    api_token_file: ApiTokenFileOption = None,
) -> None:
    """Deliver a spool without serving: beside stock kong-pdk, or for a volume whose gateway is gone."""
    configure_logging("delivery")
    os.umask(_UMASK)
    if not spool.is_dir():
        fail(f"--spool: {spool} is not a directory")
    options = delivery_options(spool, retention, retention_size, max_age, token_file, ledger_days)
    from openmeter_plugin.api.runtime import ApiListener, run

    listeners = Listeners()
    access = listen_for_api(listeners, api, api_token_file)
    offer = ApiListener(listeners.api.socket, access) if listeners.api and access else None
    try:
        run(options, offer, until_empty=until_empty, with_parent=with_parent)
    finally:
        listeners.remove()


@app.command("pdk-dir")
def pdk_dir() -> None:
    """Print the directory for `kong-python-pluginserver -d`: one file in it, the plugin."""
    package = Path(__file__).parents[1]
    installed = package / "pdk_dir"
    sys.stdout.write(f"{installed if installed.is_dir() else package.parent}\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"openmeter-plugin {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(early: Listeners | None = None) -> None:
    """Run the command line; a usage error ends with 64 (EX_USAGE), as it does for syncd.

    `early` holds the sockets of `serve` that listen already.
    """
    listeners = early or Listeners()
    try:
        app(obj=listeners, prog_name=app.info.name)
    except SystemExit as end:
        if end.code == _CLICK_USAGE_ERROR:
            sys.exit(os.EX_USAGE)
        raise
    finally:
        listeners.remove()


def _make_spool(spool: Path) -> None:
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--spool: cannot make {spool}: {error.strerror or error}")
