"""Output of the spool commands for people: tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openmeter_plugin.books.models import (
    BooksNumbers,
    DeadLetterEntry,
    DestinationStatus,
    OldestWaiting,
    SpoolStatus,
    SpoolTotal,
    Verification,
)
from openmeter_plugin.books.refusals import refusal_of
from openmeter_plugin.foreign import printable
from openmeter_plugin.units import plural

_MAX_COLUMNS: Final = 5
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")

Part = DestinationStatus | SpoolTotal


def _not_accounted(part: Part) -> str:
    requests = part.not_accounted.requests
    return plural(requests, "request") if requests else "-"


def _segments(part: Part) -> str:
    unreadable = f" ({part.unreadable} unreadable)" if part.unreadable else ""
    return f"{part.segments}{unreadable}"


def _pruned(part: Part) -> str:
    pruned = part.pruned
    if pruned is None:
        return "-"
    return f"{plural(pruned.lines, 'line')} with {plural(pruned.events, 'event')}, up to {pruned.up_to}"


_ROWS: Final[list[tuple[str, Callable[[Part], str]]]] = [
    ("requests", lambda part: str(part.books.requests)),
    ("  metered", lambda part: str(part.books.metered)),
    ("  skipped", lambda part: _with_reasons(part.books.skipped)),
    ("  quarantined", lambda part: str(part.books.quarantined)),
    ("  resent by Kong", lambda part: str(part.books.resent)),
    ("events", lambda part: str(part.books.events)),
    ("  delivered", lambda part: str(part.books.delivered)),
    ("  dead-lettered", lambda part: str(part.books.dead_lettered)),
    ("  waiting", lambda part: str(part.books.waiting)),
    ("not accounted for yet", _not_accounted),
    ("oldest waiting", lambda part: _oldest(part.oldest_waiting)),
    ("requests lost", lambda part: _with_reasons(part.books.lost)),
    ("events lost", lambda part: _with_reasons(part.books.lost_events)),
    ("AI usage unknown", lambda part: _with_reasons(part.books.ai_usage_gaps)),
    ("damaged", lambda part: _damaged(part.books)),
    ("redelivered", lambda part: str(part.books.redelivered)),
    ("on disk", lambda part: f"{human_size(part.bytes)} in {_segments(part)}"),
    ("pruned from the ledger", _pruned),
]


def show_status(console: Console, status: SpoolStatus) -> None:
    """Print the books of each destination and their total."""
    if console.is_terminal and len(status.destinations) <= _MAX_COLUMNS:
        console.print(_table(status))
        for destination in status.destinations:
            line(console, f"{destination.id}: {destination.endpoint or 'no endpoint'}")
    else:
        for destination in status.destinations:
            _show_part(console, f"destination {destination.id} {destination.endpoint or '-'}", destination)
        _show_part(console, "total", status.total)
    line(
        console,
        f"delivery {'running' if status.delivery_running else 'not running'};"
        f" {plural(status.dead_letters, 'dead letter')} and"
        f" {plural(status.quarantined, 'request')} in quarantine to replay",
    )


def _table(status: SpoolStatus) -> Table:
    table = Table()
    table.add_column("")
    parts: list[Part] = [*status.destinations, status.total]
    for name in [*(destination.id for destination in status.destinations), "total"]:
        table.add_column(name, justify="right", overflow="fold")
    for label, value in _ROWS:
        table.add_row(label, *(value(part) for part in parts), end_section=label == "  waiting")
    return table


def _show_part(console: Console, title: str, part: Part) -> None:
    books = part.books
    for text in (title, f"  {_requests_line(books)}", f"  {_events_line(books)}"):
        line(console, text)
    not_accounted = part.not_accounted
    if not_accounted.requests or not_accounted.lost:
        line(
            console,
            f"  not accounted for yet: {plural(not_accounted.requests, 'request')} with"
            f" {plural(not_accounted.events, 'event')}, {not_accounted.lost} lost",
        )
    line(console, f"  oldest waiting {_oldest(part.oldest_waiting)}")
    line(
        console,
        f"  lost {_with_reasons(books.lost)}, damaged {_damaged(books)}, redelivered {books.redelivered}",
    )
    if books.ai_usage_gaps:
        line(console, f"  AI usage unknown {_with_reasons(books.ai_usage_gaps)}")
    if books.violations:
        line(console, "  these counts do not add up: run `openmeter-plugin spool verify` and report a bug")
    unreadable = f" ({part.unreadable} unreadable)" if part.unreadable else ""
    line(console, f"  on disk {human_size(part.bytes)} in {plural(part.segments, 'segment')}{unreadable}")
    if part.pruned is not None:
        line(console, f"  pruned from the ledger: {_pruned(part)}")


def _requests_line(books: BooksNumbers) -> str:
    return (
        f"requests {books.requests} = metered {books.metered} + skipped {_with_reasons(books.skipped)}"
        f" + quarantined {books.quarantined} + resent {books.resent}"
    )


def _events_line(books: BooksNumbers) -> str:
    return (
        f"events {books.events} = delivered {books.delivered} + dead-lettered {books.dead_lettered}"
        f" + waiting {books.waiting}"
        + (f" + lost {_with_reasons(books.lost_events)}" if any(books.lost_events.values()) else "")
    )


def show_verification(console: Console, found: Verification) -> None:
    """Print what was verified; the caller prints the differences on standard error."""
    line(
        console,
        f"{plural(found.segments, 'segment')}, {human_size(found.bytes)}:"
        f" {plural(found.records, 'record')} with {plural(found.events, 'event')}, {found.waiting} waiting;"
        f" {human_size(found.damaged_bytes)} damaged",
    )
    if found.not_accounted.requests:
        requests = plural(found.not_accounted.requests, "request is", "requests are")
        line(console, f"{requests} not accounted for yet")
    pruned = plural(found.pruned_events, "event")
    after = f", and {pruned} in lines that were pruned" if found.pruned_events else ""
    line(console, f"{plural(found.ledger_lines, 'ledger line')}{after}")
    line(console, "the books agree" if found.ok else plural(len(found.differences), "difference"))


def show_dead_letter(console: Console, letter: DeadLetterEntry) -> None:
    """Print one dead letter as a line, with what its answer says; JSON has the whole answer."""
    status = "-" if letter.status is None else str(letter.status)
    replay = " (to be replayed)" if letter.to_be_replayed else ""
    shown = Text.assemble(
        _one_line(f"{letter.id} {letter.destination} {letter.type} {letter.subject} {letter.time} "),
        (f"{status}{replay}", "yellow" if letter.to_be_replayed else "red"),
        _one_line(f" {refusal_of(letter.answer).text}"),
    )
    console.print(shown, soft_wrap=True)


def line(console: Console, text: str) -> None:
    """Print a line as it is, without markup, line breaks and anything that steers the terminal."""
    console.print(_one_line(text), markup=False, highlight=False, soft_wrap=True)


def _one_line(text: str) -> str:
    return printable(text).replace("\n", " ")


def human_size(size: int) -> str:
    """Return a size in binary units."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{size} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def human_age(seconds: float) -> str:
    """Return a time span in its two largest units."""
    whole = int(seconds)
    for unit, name, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // below} {lower}"
    return f"{whole} s"


def _oldest(oldest: OldestWaiting | None) -> str:
    return "-" if oldest is None else f"{oldest.time} ({human_age(oldest.age_seconds)})"


def _damaged(books: BooksNumbers) -> str:
    size = human_size(books.damaged_bytes)
    return f"{size} and {plural(books.unreadable_segments, 'file')}" if books.unreadable_segments else size


def _with_reasons(values: Mapping[str, int]) -> str:
    total = sum(values.values())
    if not total:
        return "0"
    return f"{total} ({', '.join(f'{reason} {count}' for reason, count in values.items())})"
