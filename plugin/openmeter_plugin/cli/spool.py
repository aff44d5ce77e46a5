"""`openmeter-plugin spool ...`: to look at a spool and see to it. Every command imports this: it is light."""

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

from openmeter_plugin.cli.options import fail, quantity
from openmeter_plugin.defaults import DEFAULT_SPOOL, LARGEST_ID, SPOOL_VARIABLE
from openmeter_plugin.units import duration

if TYPE_CHECKING:
    from rich.console import Console

    from openmeter_plugin.books.models import Model

app = typer.Typer(
    help="Look at a spool and see to it; all but replay and drain only read, also beside a running server.",
    no_args_is_help=True,
)

Directory = Annotated[
    Path, typer.Argument(metavar="DIR", envvar=SPOOL_VARIABLE, help="The spool's directory.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_PAGE = 500


@app.command()
def status(directory: Directory = DEFAULT_SPOOL, json: Json = False) -> None:
    """Print the books: what was handed over, what became of it, what waits and since when."""
    with _sentences(directory):
        from openmeter_plugin.books.status import read_status

        found = read_status(directory)
        if json:
            _print_json(found)
            return
        from openmeter_plugin.cli.render import show_status

        show_status(_console(), found)


@app.command()
def verify(directory: Directory = DEFAULT_SPOOL, json: Json = False) -> None:
    """Read every record and check that books, ledger and segments agree; ends with 1 where they do not."""
    with _sentences(directory):
        from openmeter_plugin.maintenance.verify import verify as verified

        found = verified(directory)
        if json:
            _print_json(found)
        else:
            from openmeter_plugin.cli.render import show_verification

            show_verification(_console(), found)
    for difference in found.differences:
        sys.stderr.write(f"openmeter-plugin: {difference}\n")
    raise typer.Exit(0 if found.ok else 1)


@app.command("dead-letters")
def dead_letters(
    directory: Directory = DEFAULT_SPOOL,
    json: Json = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Print so many, the oldest.")] = None,
) -> None:
    """Print the events that the metering API will not take, with its answers."""
    with _sentences(directory):
        from openmeter_plugin.books.ledger import read_dead_letters
        from openmeter_plugin.books.models import DeadLetterEntry, DeadLetters

        letters: list[DeadLetterEntry] = []
        after: int | None = 0
        while after is not None and (limit is None or len(letters) < limit):
            page = read_dead_letters(directory, after=after, limit=min(_PAGE, limit or _PAGE))
            letters += page.dead_letters
            after = page.next
        if json:
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
        typer.Option("--id", max=LARGEST_ID, help="One of them, by its id; may be given several times."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Requests that were set aside, instead of dead letters.")
    ] = False,
    config: Annotated[
        Path, typer.Option(help="With --quarantine: the settings under which events are made of them.")
    ] = Path("openmeter-plugin.yaml"),
) -> None:
    """Have dead letters, or what was set aside, sent again by the delivery that runs or comes next."""
    if bool(ids) == every:
        fail("replay needs --all, or --id once or more", os.EX_USAGE)
    wanted = None if every else ids
    with _sentences(directory):
        from openmeter_plugin.books.read_models import delivery_runs

        if quarantine:
            text = _replay_quarantine(directory, config, wanted)
        else:
            from openmeter_plugin.books.replay import replay_dead_letters

            text = f"{replay_dead_letters(directory, wanted)} dead letters will be sent again"
        sys.stdout.write(f"{text}\n")
        if not delivery_runs(directory):
            sys.stderr.write("openmeter-plugin: no delivery is running on this spool; drain would do it\n")


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
        f"{done.metered} requests became {done.events} events, which will be sent;"
        f" {skipped} were skipped, {_quarantined(directory)} stay in quarantine"
    )


def _quarantined(directory: Path) -> int:
    from openmeter_plugin.books.read_models import reading

    with reading(directory) as db:
        (number,) = db.execute("SELECT count(*) FROM quarantine").fetchone()
    return int(number)


@app.command()
def export(
    directory: Directory = DEFAULT_SPOOL,
    dead: Annotated[bool, typer.Option("--dead-letters", help="Events that were refused.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Requests that were set aside: no events yet.")
    ] = False,
    waiting: Annotated[bool, typer.Option("--waiting", help="Events that are not delivered yet.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every event that is there: waiting, retained, refused.")
    ] = False,
) -> None:
    """Write CloudEvents to standard output, one JSON document a line."""
    if dead + quarantine + waiting + every != 1:
        fail("export needs one of --dead-letters, --quarantine, --waiting and --all", os.EX_USAGE)
    with _sentences(directory):
        from openmeter_plugin.maintenance import export as exports

        source = (
            exports.dead_letters
            if dead
            else exports.quarantine
            if quarantine
            else exports.waiting
            if waiting
            else exports.everything
        )
        for event in source(directory):
            sys.stdout.buffer.write(event + b"\n")
        sys.stdout.buffer.flush()


@app.command()
def drain(
    directory: Directory = DEFAULT_SPOOL,
    timeout: Annotated[str | None, typer.Option(help="Give up after this time, such as 10m.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Send to this address instead of where the spool says.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, in the place of the one beside the spool.")
    ] = None,
) -> None:
    """Deliver a spool whose gateway is gone; ends with 0 only if nothing is left waiting."""
    seconds = None if timeout is None else quantity(duration, timeout, "--timeout").total_seconds()
    if endpoint is not None:
        from openmeter_plugin.config.instance_config import usable_endpoint

        endpoint = quantity(usable_endpoint, endpoint, "--endpoint")
    if token_file is not None:
        _check_token(token_file)
    with _sentences(directory):
        from openmeter_plugin.cli.drain import drain as drained
        from openmeter_plugin.delivery.options import DeliveryOptions

        # Nothing is removed by the way: whoever looks into an orphaned volume may want it all.
        options = DeliveryOptions(directory, token_file=token_file)
        options = replace(options, retention=replace(options.retention, age=timedelta.max, size=sys.maxsize))
        if endpoint is not None:
            options = replace(options, endpoint=endpoint)
        found = drained(options, _console(stderr=True), seconds)
    total = found.total
    left = total.backlog + total.not_accounted.requests
    _console().print(
        f"{total.books.delivered} events delivered, {total.backlog} left waiting,"
        f" {found.dead_letters} dead letters, {found.quarantined} requests in quarantine",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(1 if left else 0)


@contextmanager
def _sentences(directory: Path) -> Iterator[None]:
    """Turn what goes wrong with a spool into a sentence on standard error and status 1."""
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


def _check_token(file: Path) -> None:
    """End where the file holds no token: who drains a spool stands beside it, and need not wait for that."""
    from openmeter_plugin.spool.destination import is_header_value

    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--token-file: {file}: {getattr(error, 'strerror', None) or 'is no text'}")
    if not token or not is_header_value(token):
        fail(f"--token-file: {file} holds no token that can be sent in a header")


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_json(model: Model) -> None:
    sys.stdout.write(model.model_dump_json(indent=2) + "\n")
