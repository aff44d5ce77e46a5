"""The commands of `openmeter-plugin`."""

from __future__ import annotations

import os
import socket
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from openmeter_plugin import __version__
from openmeter_plugin.heartbeat import Heartbeats
from openmeter_plugin.listening import DEFAULT_MODE, ListeningSocket
from openmeter_plugin.log import configure_logging
from openmeter_plugin.peers import Mailboxes
from openmeter_plugin.supervisor import Child, supervise

DEFAULT_SPOOL: Final = Path("/var/lib/openmeter-plugin/spool")

_CLICK_USAGE_ERROR: Final = 2
_UMASK: Final = 0o077
"""Usage is nobody's business but the owner's; Kong starts its plugin servers with no umask at all."""

app = typer.Typer(
    name="openmeter-plugin",
    help="The Kong plugin `openmeter`: one CloudEvent per request, on disk before Kong has its answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class FsyncPolicy(StrEnum):
    """When the kernel is asked to put events on the disk itself; kill -9 costs nothing in any case."""

    always = "always"
    interval = "interval"
    never = "never"


SpoolOption = Annotated[
    Path,
    typer.Option(
        "--spool",
        envvar="OPENMETER_PLUGIN_SPOOL",
        help="Directory of the spool, on a local disk that outlives restarts.",
    ),
]


@app.command()
def info() -> None:
    """Print what Kong's query command expects: the plugin's name, priority and schema as JSON."""
    # Answered in __main__ before anything is imported; here for --help and for odd spellings.
    import json

    from openmeter_plugin.schema import plugin_info

    sys.stdout.write(json.dumps(plugin_info()))


@app.command()
def serve(
    context: typer.Context,
    socket_path: Annotated[
        Path,
        typer.Option("--socket", help="Unix socket that Kong connects to (pluginserver_openmeter_socket)."),
    ],
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
) -> None:
    """Serve Kong's ProtoBuf:1 plugin protocol, spool the events and deliver them."""
    configure_logging("supervisor")
    os.umask(_UMASK)
    mode = _octal(socket_mode, "--socket-mode")
    _make_spool(spool)
    listener = context.obj
    if listener is None:
        try:
            listener = ListeningSocket(socket_path, mode)
        except OSError as error:
            _fail(f"--socket: cannot listen on {socket_path}: {error.strerror or error}")

    # From here on Kong's connections wait for us; now there is time to import.
    from openmeter_plugin.worker import Place, WorkerOptions, run_worker

    options = WorkerOptions(spool, fsync.value, fsync_interval)
    heartbeats, mailboxes = Heartbeats(workers + 1), Mailboxes(workers)

    def worker(number: int) -> None:
        run_worker(_own(listener.socket), options, Place(number, heartbeats, mailboxes))

    def delivery() -> None:
        listener.socket.close()
        from openmeter_plugin.delivery.process import run_delivery

        run_delivery(spool, beside=heartbeats.keep_beating(workers))

    children = [Child("worker", partial(worker, number), number) for number in range(workers)]
    supervise([*children, Child("delivery", delivery, workers)], listener, heartbeats, hang_timeout)


@app.command()
def deliver(
    spool: SpoolOption = DEFAULT_SPOOL,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="End when everything that is there is delivered.")
    ] = False,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", hidden=True, help="End when standard input does.")
    ] = False,
) -> None:
    """Deliver a spool without serving: beside stock kong-pdk, or for a volume whose gateway is gone."""
    configure_logging("delivery")
    os.umask(_UMASK)
    if not spool.is_dir():
        _fail(f"--spool: {spool} is not a directory")
    from openmeter_plugin.delivery.process import run_delivery

    run_delivery(spool, until_empty=until_empty, with_parent=with_parent)


@app.command("pdk-dir")
def pdk_dir() -> None:
    """Print the directory for `kong-python-pluginserver -d`: one file in it, the plugin."""
    package = Path(__file__).parent
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


def run(early: ListeningSocket | None = None) -> None:
    """Run the command line; a usage error ends with 64 (EX_USAGE), as it does for syncd.

    `early` is the socket of `serve`, where it listens already.
    """
    try:
        app(obj=early)
    except SystemExit as end:
        if end.code == _CLICK_USAGE_ERROR:
            sys.exit(os.EX_USAGE)
        raise
    finally:
        if early is not None:
            early.remove()


def _own(listening: socket.socket) -> socket.socket:
    """Return a socket object of this process for the listening socket that it inherited."""
    return socket.socket(fileno=os.dup(listening.fileno()))


def _octal(text: str, option: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        _fail(f"{option}: {text} is not an octal mode such as 0660", os.EX_USAGE)
    return mode


def _make_spool(spool: Path) -> None:
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"--spool: cannot make {spool}: {error.strerror or error}")


def _fail(message: str, status: int = 1) -> NoReturn:
    sys.stderr.write(f"openmeter-plugin: {message}\n")
    sys.exit(status)
