"""Commands of `openmeter-plugin spool`. Every command imports this module, so its imports are light."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openmeter_plugin.books.database import MAX_ROW_ID
from openmeter_plugin.cli.options import (
    CaFileOption,
    ClientCertOption,
    ClientKeyOption,
    Output,
    OutputOption,
    ProxyOption,
    fail,
    faults_of,
    network_options,
    parse_option,
)
from openmeter_plugin.foreign import escaped, printable
from openmeter_plugin.spool.destination import DEFAULT_SPOOL, SPOOL_VARIABLE
from openmeter_plugin.units import duration, plural

if TYPE_CHECKING:
    from rich.console import Console

    from openmeter_plugin.books.models import Model

app = typer.Typer(
    help="Inspect and repair a spool. All commands except replay, redirect, accept-refusals and drain are"
    " read-only and safe next to a running server.",
    no_args_is_help=True,
)

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", envvar=SPOOL_VARIABLE, help="The spool's directory.")
]
_PAGE_SIZE = 500


@app.command()
def status(directory: Directory = DEFAULT_SPOOL, output: OutputOption = Output.TEXT) -> None:
    """Print the books: requests received, events delivered and waiting, and the oldest waiting event."""
    with _report_errors(directory):
        from openmeter_plugin.books.status import read_status

        found = read_status(directory)
        if output is Output.JSON:
            _print_json(found)
            return
        from openmeter_plugin.cli.render import show_status

        show_status(_console(), found)


@app.command()
def verify(directory: Directory = DEFAULT_SPOOL, output: OutputOption = Output.TEXT) -> None:
    """Read every record and check that books, ledger and segments agree; exit with 1 if they do not."""
    with _report_errors(directory):
        from openmeter_plugin.maintenance.verify import verify as verified

        found = verified(directory)
        if output is Output.JSON:
            _print_json(found)
        else:
            from openmeter_plugin.cli.render import show_verification

            show_verification(_console(), found)
    for difference in found.differences:
        sys.stderr.write(f"openmeter-plugin: {printable(difference)}\n")
    raise typer.Exit(0 if found.ok else 1)


@app.command("dead-letters")
def dead_letters(
    directory: Directory = DEFAULT_SPOOL,
    output: OutputOption = Output.TEXT,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number to print, oldest first.")] = None,
) -> None:
    """Print the dead letters, with the metering API's answers."""
    with _report_errors(directory):
        from openmeter_plugin.books.models import DeadLetterEntry, DeadLetters
        from openmeter_plugin.books.refusals import read_dead_letters

        letters: list[DeadLetterEntry] = []
        after: int | None = 0
        while after is not None and (limit is None or len(letters) < limit):
            page = read_dead_letters(directory, after=after, limit=min(_PAGE_SIZE, limit or _PAGE_SIZE))
            letters += page.dead_letters
            after = page.next
        if output is Output.JSON:
            _print_json(DeadLetters(dead_letters=letters[:limit], next=after))
            return
        from openmeter_plugin.cli.render import show_dead_letter

        console = _console()
        for letter in letters[:limit]:
            show_dead_letter(console, letter)


@app.command()
def replay(
    directory: Directory = DEFAULT_SPOOL,
    ids: Annotated[
        list[int] | None,
        typer.Option("--id", max=MAX_ROW_ID, help="Id to replay. Repeat for several."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Replay all.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Replay requests in quarantine instead of dead letters.")
    ] = False,
    config: Annotated[
        Path, typer.Option(help="With --quarantine: file with the settings to make events with.")
    ] = Path("openmeter-plugin.yaml"),
) -> None:
    """Put dead letters, or requests in quarantine, back into the backlog for the delivery process."""
    if bool(ids) == every:
        fail("replay needs either --all or --id", os.EX_USAGE)
    wanted = None if every else ids
    with _report_errors(directory):
        from openmeter_plugin.books.read_models import delivery_runs

        if quarantine:
            text = _replay_quarantine(directory, config, wanted)
        else:
            from openmeter_plugin.books.replay import replay_dead_letters

            text = f"{plural(replay_dead_letters(directory, wanted), 'dead letter')} will be replayed"
        sys.stdout.write(f"{text}\n")
        if not delivery_runs(directory):
            sys.stderr.write(
                "openmeter-plugin: no delivery process is running on this spool; run `drain` to deliver\n"
            )


def _replay_quarantine(directory: Path, config: Path, ids: list[int] | None) -> str:
    import orjson

    from openmeter_plugin.config.instance_config import ConfigError
    from openmeter_plugin.http_log.config import load
    from openmeter_plugin.maintenance.quarantine_replay import replay_quarantine

    try:
        done = replay_quarantine(directory, orjson.loads(load(config).plugin), ids)
    except ConfigError as error:
        fail(f"--config: {error}")
    skipped = sum(done.skipped.values())
    return (
        f"{plural(done.metered, 'request')} became {plural(done.events, 'event')}, to be delivered;"
        f" {skipped} skipped, {_quarantined(directory)} still in quarantine"
    )


def _quarantined(directory: Path) -> int:
    from openmeter_plugin.books.read_models import reading, row_counts

    with reading(directory) as db:
        return row_counts(db)[1]


@app.command()
def redirect(
    source: Annotated[str, typer.Option("--from", help="Id of the destination whose events wait.")],
    directory: Directory = DEFAULT_SPOOL,
    to: Annotated[
        str | None, typer.Option(help="Id of the destination to send them to (default: their own again).")
    ] = None,
) -> None:
    """Send what waits for one destination, and its replays, to another: after a wrong ingest_endpoint."""
    with _report_errors(directory):
        from openmeter_plugin.spool.destination import QUARANTINE, queues_directory, read_destination
        from openmeter_plugin.spool.destination import redirect as write_redirect

        found = {path.name for path in queues_directory(directory).iterdir()} - {QUARANTINE}
        for option, name in (("--from", source), ("--to", to or source)):
            if name not in found:
                fail(f"{option}: must be one of {', '.join(sorted(found)) or '(none)'}", os.EX_USAGE)
        if to == source:
            fail("--to: is the same as --from", os.EX_USAGE)
        write_redirect(directory, source, to)
        try:
            destination = read_destination(directory, source)
        except ValueError as error:
            write_redirect(directory, source, None)
            fail(f"--to: {error}", os.EX_USAGE)
        address = destination.endpoint if destination else "nowhere: it has no description"
        sys.stdout.write(f"events of {source} go to {address}\n")


@app.command("accept-refusals")
def accept_refusals(
    directory: Directory = DEFAULT_SPOOL,
    destination: Annotated[
        str | None, typer.Option(help="Id of the destination; needed if the spool has several.")
    ] = None,
) -> None:
    """Let a held destination's refused events become dead letters until most events are accepted again."""
    with _report_errors(directory):
        from openmeter_plugin.delivery.dead_letters import permit
        from openmeter_plugin.spool.destination import QUARANTINE, queues_directory

        found = sorted(path.name for path in queues_directory(directory).iterdir() if path.name != QUARANTINE)
        wanted = found if destination is None else [name for name in found if name == destination]
        if len(wanted) != 1:
            fail(f"--destination: must be one of {', '.join(found) or '(the spool has none)'}", os.EX_USAGE)
        permit(directory, wanted[0])
        sys.stdout.write(f"refused events of {wanted[0]} become dead letters\n")


@app.command()
def export(
    directory: Directory = DEFAULT_SPOOL,
    dead: Annotated[bool, typer.Option("--dead-letters", help="Export dead letters.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Export requests in quarantine (not events yet).")
    ] = False,
    waiting: Annotated[
        bool, typer.Option("--waiting", help="Export events that are not delivered yet.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Export every event: waiting, retained and dead letters.")
    ] = False,
) -> None:
    """Write CloudEvents to standard output, one JSON document per line."""
    if dead + quarantine + waiting + every != 1:
        fail("export needs exactly one of --dead-letters, --quarantine, --waiting and --all", os.EX_USAGE)
    with _report_errors(directory):
        from openmeter_plugin.maintenance import export as exports

        source = (
            exports.dead_letters
            if dead
            else exports.quarantine
            if quarantine
            else exports.waiting
            if waiting
            else exports.all_events
        )
        for event in source(directory):
            shown = event if event.isascii() else escaped(event.decode("utf-8", "replace")).encode()
            sys.stdout.buffer.write(shown + b"\n")
        sys.stdout.buffer.flush()


@app.command()
def drain(
    directory: Directory = DEFAULT_SPOOL,
    timeout: Annotated[str | None, typer.Option(help="Give up after this time, such as 10m.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Post to this URL instead of the spool's destination.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token. Overrides the token in the spool.")
    ] = None,
    ca_file: CaFileOption = None,
    client_cert: ClientCertOption = None,
    client_key: ClientKeyOption = None,
    proxy: ProxyOption = None,
) -> None:
    """Deliver a spool whose gateway is gone; exit with 0 only if no event is left waiting."""
    seconds = None if timeout is None else parse_option(duration, timeout, "--timeout").total_seconds()
    if endpoint is not None:
        from openmeter_plugin.config.instance_config import usable_endpoint

        endpoint = parse_option(usable_endpoint, endpoint, "--endpoint")
    network = network_options(ca_file, client_cert, client_key, proxy)
    with _report_errors(directory):
        from openmeter_plugin.cli.drain import drain as drained
        from openmeter_plugin.delivery.options import DeliveryOptions

        # Retain everything: after draining an orphaned volume, someone may still want to inspect it.
        options = DeliveryOptions(directory, token_file=token_file, network=network)
        for fault in faults_of(options):
            fail(fault)  # `drain` is interactive, so it does not wait until it is corrected
        options = replace(options, retention=replace(options.retention, age=timedelta.max, size=sys.maxsize))
        if endpoint is not None:
            options = replace(options, endpoint=endpoint)
        found = drained(options, _console(stderr=True), seconds)
    total = found.total
    left = total.backlog + total.not_accounted.requests
    _console().print(
        f"{plural(total.books.delivered, 'event')} delivered, {total.backlog} left waiting,"
        f" {plural(found.dead_letters, 'dead letter')}, {plural(found.quarantined, 'request')} in quarantine",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(1 if left else 0)


@app.command()
def wait(
    kong_port: Annotated[
        int, typer.Option(min=1, max=65535, help="A port of loopback where Kong listens until it ends.")
    ],
    directory: Directory = DEFAULT_SPOOL,
) -> None:
    """Wait until Kong has ended and every event is delivered: a hook where the spool ends with its pod."""
    from openmeter_plugin.cli.drain import wait_until_delivered

    wait_until_delivered(directory, kong_port)


@contextmanager
def _report_errors(directory: Path) -> Iterator[None]:
    """Turn errors of a spool into a message on standard error and exit status 1."""
    from openmeter_plugin.books.read_models import SpoolError, check_spool

    try:
        check_spool(directory)
        yield
    except SpoolError as error:
        fail(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        fail(f"{error.filename or directory}: {error.strerror or error}")
    except sqlite3.Error as error:
        fail(f"the books of {directory}: {error}")


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_json(model: Model) -> None:
    sys.stdout.write(escaped(model.model_dump_json(indent=2)) + "\n")
