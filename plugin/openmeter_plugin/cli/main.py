"""Commands of `openmeter-plugin`: serve, deliver, info, schema-lua, files, pdk-dir."""

from __future__ import annotations

import gc
import os
import sys
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

import typer

from openmeter_plugin import __version__
from openmeter_plugin.cli import gate as gate_cli
from openmeter_plugin.cli import spool as spool_cli
from openmeter_plugin.cli.help import make_readable
from openmeter_plugin.cli.listeners import (
    duplicate_socket,
    gate_settings,
    http_log_settings,
    listen_for_api,
    open_listeners,
    parse_mode,
)
from openmeter_plugin.cli.options import (
    CaFileOption,
    ClientCertOption,
    ClientKeyOption,
    ProxyOption,
    delivery_options,
    fail,
    network_options,
    refuse_empty_arguments,
    warn_of_unknown_variables,
)
from openmeter_plugin.delivery.options import DEFAULT_LEDGER_DAYS, TOKEN_VARIABLE
from openmeter_plugin.instances.worker_sync import Mailboxes
from openmeter_plugin.log import configure_logging
from openmeter_plugin.process.handoff import Handoff, raise_connection_limit
from openmeter_plugin.process.sockets import DEFAULT_MODE, Listeners
from openmeter_plugin.process.supervisor import Child, Heartbeats, supervise
from openmeter_plugin.spool.destination import DEFAULT_SPOOL, SEGMENTS_VARIABLE, SPOOL_VARIABLE

_CLICK_USAGE_ERROR: Final = 2
_UMASK: Final = 0o077
"""Usage data is private to the owner; Kong starts its plugin servers with umask 0."""

app = typer.Typer(
    name="openmeter-plugin",
    help="The Kong plugin `openmeter`: one CloudEvent per request, on disk before Kong gets its answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(gate_cli.app, name="gate")
app.add_typer(spool_cli.app, name="spool")


class FsyncPolicy(StrEnum):
    """When events are synced from the page cache to the disk; kill -9 never loses an event."""

    always = "always"
    interval = "interval"
    never = "never"


SpoolOption = Annotated[
    Path,
    typer.Option(
        "--spool",
        envvar=SPOOL_VARIABLE,
        help="Directory of the spool, on a local disk that survives restarts.",
    ),
]

RetentionOption = Annotated[str, typer.Option(help="How long to keep delivered events for redelivery.")]
RetentionSizeOption = Annotated[str, typer.Option(help="Maximum size of the kept delivered events.")]
MaxAgeOption = Annotated[
    str | None, typer.Option(help="Undelivered events older than this become dead letters (default: never).")
]
LedgerDaysOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=36_500,
        help="Days after which settled ledger lines are pruned. Choose longer than any invoice can be"
        " disputed. 0: never.",
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(help="File with the token for every destination. Overrides the plugin's api_token."),
]
ApiOption = Annotated[
    str | None,
    typer.Option(help="Serve the HTTP API (books, metrics, replay) at host:port or unix:/path."),
]
ApiTokenFileOption = Annotated[
    Path | None,
    typer.Option(help="File with the bearer token of the HTTP API. Overrides OPENMETER_PLUGIN_ADMIN_TOKEN."),
]


@app.command()
def info(
    lua: Annotated[
        bool, typer.Option("--lua", help="Print a Lua program that prints the JSON, for images without cat.")
    ] = False,
) -> None:
    """Print the plugin's name, priority and schema as JSON, for Kong's query command."""
    # __main__ answers this before any import; this command is for --help and unusual spellings.
    from openmeter_plugin.config.schema import info_json, info_lua

    sys.stdout.write(info_lua() if lua else info_json())


@app.command("schema-lua")
def schema_lua_command() -> None:
    """Print the plugin's schema as Lua, for upload to Konnect or another control plane."""
    from openmeter_plugin.config.schema import schema_lua

    sys.stdout.write(schema_lua())


@app.command()
def files(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of Kong's lua_package_path; it is created.")
    ],
) -> None:
    """Write what a gateway needs: the Lua plugins, and info.json and info.lua for Kong's query command.

    The Lua plugins are openmeter, which hands requests over in Kong segments, and openmeter-gate.
    """
    from openmeter_plugin.config import gate_lua, lua_plugin
    from openmeter_plugin.config.schema import info_json, info_lua

    written = {folder / "info.json": info_json(), folder / "info.lua": info_lua()}
    for place, texts in (
        (folder / lua_plugin.FOLDER, lua_plugin.lua_files()),
        (folder / gate_lua.FOLDER, gate_lua.gate_files()),
    ):
        written |= {place / name: text for name, text in texts.items()}
    for path, text in written.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A Kong that starts meanwhile reads the old file or the new one, never half of it.
            unfinished = path.with_name(f".{path.name}")
            unfinished.write_text(text, "utf-8")
            unfinished.replace(path)
        except OSError as error:
            fail(f"cannot write {error.filename or path}: {error.strerror or error}")
    sys.stdout.write(f"lua_package_path = {folder.absolute()}/?.lua;;\n")


@app.command()
def serve(
    context: typer.Context,
    socket_path: Annotated[
        Path | None,
        typer.Option("--socket", help="Unix socket that Kong connects to (pluginserver_openmeter_socket)."),
    ] = None,
    http_log: Annotated[
        str | None,
        typer.Option(help="Receive posts of Kong's http-log plugin at host:port or unix:/path."),
    ] = None,
    http_log_config: Annotated[
        Path, typer.Option(help="File with the plugin's settings for --http-log.")
    ] = Path("openmeter-plugin.yaml"),
    segments: Annotated[
        Path | None,
        typer.Option(
            "--segments",
            envvar=SEGMENTS_VARIABLE,
            help="Folder to which the plugin in Lua writes Kong segments, best on a tmpfs.",
        ),
    ] = None,
    spool: SpoolOption = DEFAULT_SPOOL,
    socket_mode: Annotated[
        str,
        typer.Option(help="Octal permissions of the socket. Any process that can connect can send usage."),
    ] = DEFAULT_MODE,
    fsync: Annotated[
        FsyncPolicy,
        typer.Option(help="When to sync events to disk; a power loss costs unsynced events."),
    ] = FsyncPolicy.interval,
    fsync_interval: Annotated[float, typer.Option(min=0.01, help="Seconds between two syncs.")] = 1.0,
    workers: Annotated[
        int,
        typer.Option(min=1, max=64, help="Processes that serve Kong. One handles about 39,000 events/s."),
    ] = 1,
    hang_timeout: Annotated[
        float, typer.Option(min=2.0, help="Seconds without a heartbeat before a process is replaced.")
    ] = 10.0,
    retention: RetentionOption = "1d",
    retention_size: RetentionSizeOption = "1GiB",
    max_age: MaxAgeOption = None,
    ledger_days: LedgerDaysOption = DEFAULT_LEDGER_DAYS,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    proxy: ProxyOption = None,
    api: ApiOption = None,
    api_token_file: ApiTokenFileOption = None,
    gate: Annotated[
        Path | None, typer.Option(help="File with the settings of the gate, which stops requests.")
    ] = None,
) -> None:
    """Take requests from Kong by its plugin protocol, http-log or Kong segments; spool and deliver events."""
    configure_logging("supervisor")
    warn_of_unknown_variables(os.environ)
    os.umask(_UMASK)
    mode = parse_mode(socket_mode, "--socket-mode")
    network = network_options(ca_file, client_cert, client_key, proxy)
    delivering = delivery_options(spool, retention, retention_size, max_age, token_file, ledger_days, network)
    listeners: Listeners = context.obj
    open_listeners(listeners, socket_path, http_log, mode, required=segments is None)
    _make_spool(spool)
    settings = http_log_settings(listeners.http_log, http_log_config)
    access = listen_for_api(listeners, api, api_token_file)
    gating = gate_settings(listeners, gate)

    # From here on the sockets queue Kong's connections, so there is time for slow imports.
    from openmeter_plugin.kong.acceptor import ConnectionCounts
    from openmeter_plugin.kong.worker import WorkerOptions, WorkerSlot, run_worker
    from openmeter_plugin.segments.stats import ReaderStats
    from openmeter_plugin.spool.writer import SpoolWriter

    keep_tokens = token_file is None and TOKEN_VARIABLE not in os.environ
    options = WorkerOptions(
        spool,
        fsync.value,
        fsync_interval,
        keep_tokens=keep_tokens,
        socket_activated=listeners.plugin is not None and not listeners.plugin.owned,
        in_place=lambda: listeners.plugin is not None and listeners.plugin.in_place,
    )
    workers = workers if listeners.plugin is not None else 0
    names = [f"worker-{number}" for number in range(workers)]
    optional = ("http-log", settings), ("segments", segments), ("gate", gating)
    names += [name for name, there in optional if there is not None]
    slots = {name: slot for slot, name in enumerate([*names, "delivery"])}
    heartbeats, mailboxes = Heartbeats(len(slots)), Mailboxes(workers)
    counts = ConnectionCounts(workers) if workers else None
    handoffs = [Handoff(raise_connection_limit() // workers) for _ in range(workers)]

    reader_stats = ReaderStats()
    open_writer = partial(
        SpoolWriter, spool, fsync=fsync.value, fsync_interval=fsync_interval, keep_tokens=keep_tokens
    )

    def worker(number: int) -> None:
        listener = duplicate_socket(listeners.plugin)
        _close(listeners, *handoffs[:number], *handoffs[number + 1 :])
        if listener is not None and counts is not None:
            run_worker(listener, options, WorkerSlot(number, heartbeats, mailboxes, counts, handoffs[number]))

    def receiver() -> None:
        listener = duplicate_socket(listeners.http_log)
        _close(listeners, *handoffs)
        from openmeter_plugin.http_log.process import run_http_log

        if listener is not None and settings is not None:
            run_http_log(listener, settings, open_writer, heartbeats.keep_beating(slots["http-log"]))

    def segments_reader() -> None:
        _close(listeners, *handoffs)
        from openmeter_plugin.segments.process import run_segments

        beat = partial(heartbeats.beat, slots["segments"])
        if segments is not None:
            run_segments(segments, spool, fsync.value, open_writer, beat, reader_stats)

    def gate_process() -> None:
        listener = duplicate_socket(listeners.gate)
        _close(listeners, *handoffs)
        from openmeter_plugin.gate.process import run_gate

        if listener is not None and gating is not None:
            run_gate(listener, gating, spool, heartbeats.keep_beating(slots["gate"]))

    def delivery() -> None:
        api_socket = duplicate_socket(listeners.api)
        _close(listeners, *handoffs)
        from openmeter_plugin.api.runtime import ApiListener, Siblings, run

        siblings = Siblings(
            *(heartbeats, slots["delivery"], slots, hang_timeout),
            reader=reader_stats if segments else None,
            gate=gating.socket if gating is not None else None,
        )
        run(delivering, ApiListener(api_socket, access) if api_socket and access else None, siblings)

    gc.freeze()  # collecting garbage in all of this would delay Kong by 15 ms from time to time
    others = {"http-log": receiver, "segments": segments_reader, "gate": gate_process, "delivery": delivery}
    children = [
        Child("worker", partial(worker, number), number, handoffs[number]) for number in range(workers)
    ]
    children += [Child(name, run, slots[name]) for name, run in others.items() if name in slots]
    supervise(children, listeners, heartbeats, hang_timeout)


@app.command()
def deliver(
    spool: SpoolOption = DEFAULT_SPOOL,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="Exit when the backlog is empty.")
    ] = False,
    retention: RetentionOption = "1d",
    retention_size: RetentionSizeOption = "1GiB",
    max_age: MaxAgeOption = None,
    ledger_days: LedgerDaysOption = DEFAULT_LEDGER_DAYS,
    token_file: TokenFileOption = None,
    ca_file: CaFileOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    proxy: ProxyOption = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", hidden=True, help="Exit when standard input ends.")
    ] = False,
    api: ApiOption = None,
    api_token_file: ApiTokenFileOption = None,
) -> None:
    """Deliver a spool without serving Kong: next to stock kong-pdk, or for a volume whose gateway is gone."""
    configure_logging("delivery")
    warn_of_unknown_variables(os.environ)
    os.umask(_UMASK)
    if not spool.is_dir():
        fail(f"--spool: {spool} is not a directory")
    network = network_options(ca_file, client_cert, client_key, proxy)
    options = delivery_options(spool, retention, retention_size, max_age, token_file, ledger_days, network)
    from openmeter_plugin.api.runtime import ApiListener, run

    listeners = Listeners()
    access = listen_for_api(listeners, api, api_token_file)
    api_listener = ApiListener(listeners.api.socket, access) if listeners.api and access else None
    try:
        run(options, api_listener, until_empty=until_empty, with_parent=with_parent)
    finally:
        listeners.remove()


@app.command("pdk-dir")
def pdk_dir() -> None:
    """Print the directory for `kong-python-pluginserver -d`; it contains only the plugin."""
    if find_spec("kong_pdk") is None:
        # Kong's server loads the plugin in its own environment, so both have to be in this one.
        sys.stderr.write("kong-pdk is not installed; run: pip install 'kong-openmeter[kong-pdk]'\n")
        raise typer.Exit(1)
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
    """Run the command line. A usage error exits with 64 (EX_USAGE), as in syncd.

    `early` holds the sockets of `serve` that already listen.
    """
    listeners = early or Listeners()
    try:
        refuse_empty_arguments(sys.argv[1:])
        app(obj=listeners, prog_name=app.info.name)
    except SystemExit as end:
        if end.code == _CLICK_USAGE_ERROR:
            sys.exit(os.EX_USAGE)
        raise
    finally:
        listeners.remove()


def _close(listeners: Listeners, *handoffs: Handoff) -> None:
    """Close what a child process has inherited and does not use."""
    listeners.close()
    for handoff in handoffs:
        handoff.close()


def _make_spool(spool: Path) -> None:
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--spool: cannot create {spool}: {error.strerror or error}")


make_readable(app)
