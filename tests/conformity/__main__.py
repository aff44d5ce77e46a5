"""`make conformity URL=...`: syncd and the plugin against a server, scenario by scenario.

Works with any server that speaks openmeter-v1, openmeter-v3 or both. All that it creates is new, has the
run's prefix, and is deleted at the end, also after a failure or Ctrl-C. It never writes to what was there
before, and checks that at the end.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import httpx
from rich.console import Console
from rich.table import Table

from syncd.config.settings import Dialect
from tests.conformity.scenarios import SCENARIOS, title
from tests.conformity.server import Server, Unusable, reached
from tests.conformity.stage import Differs, NotOffered, Stage

Verdict = Literal["ok", "differs", "not offered"]
_STYLES = {"ok": "green", "differs": "red bold", "not offered": "yellow"}
_DIALECTS: dict[str, set[Dialect]] = {
    "v1": {"openmeter-v1"},
    "v3": {"openmeter-v3"},
    "both": {"openmeter-v1", "openmeter-v3"},
}
OK, DIFFERS, REFUSED = 0, 1, 2


@dataclass
class Report:
    """What a run came to: verdict and explanation by scenario and dialect, and what it left behind."""

    verdicts: dict[str, dict[Dialect, tuple[Verdict, str]]] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    stays: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """Return the exit status."""
        verdicts = (verdict for row in self.verdicts.values() for verdict, _ in row.values())
        return DIFFERS if "differs" in verdicts or self.left or self.touched else OK


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run the scenarios and print the table: 0 all ok, 1 something differs, 2 the run was refused."""
    options = _options().parse_args(arguments)
    console = console or Console()
    prefix = f"conf{secrets.token_hex(3)}"
    headers = {"Authorization": f"Bearer {options.token}"} if options.token else {}
    with httpx.Client(headers=headers, timeout=30) as http:
        try:
            server = reached(options.url, prefix, http, _DIALECTS[options.dialect])
        except Unusable as error:
            console.print(f"[red]{error}", highlight=False)
            return REFUSED
        server.foreign = server.picture()
        customers = sum(name.startswith("customer ") for name in server.foreign)
        if customers and not options.with_customers:
            console.print(
                f"{server.url} has {customers} customers of somebody else. The suite does not touch them, but"
                " creates and deletes customers, meters and events next to them: use a server for tests, or"
                " pass --with-customers (make conformity WITH_CUSTOMERS=yes).",
                highlight=False,
            )
            return REFUSED
        console.print(f"{server.url}, {' and '.join(server.dialects)}; prefix {prefix}", highlight=False)
        report = run(server, options, console)
    show(report, server, console)
    return report.status


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="make conformity", description=__doc__)
    options.add_argument("url", help="of the server, without a path: http://127.0.0.1:8888")
    options.add_argument("--dialect", choices=tuple(_DIALECTS), default="both")
    options.add_argument("--token", default=os.environ.get("TOKEN"), help="default: the variable TOKEN")
    options.add_argument(
        "--with-customers", action="store_true", help="run even if the server has other customers"
    )
    options.add_argument("--only", default="", metavar="WORDS", help="only scenarios with these words")
    options.add_argument(
        "--flush", type=float, default=6.0, help="seconds until the server's sink has stored what it got"
    )
    options.add_argument("--arrival", type=float, default=60.0, help="seconds that an event may take")
    return options


def run(server: Server, options: argparse.Namespace, console: Console) -> Report:
    """Run all scenarios, and clean up however that ends."""
    report = Report()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="conformity-") as folder:
            for scenario in SCENARIOS:
                name = title(scenario)
                if options.only not in name:
                    continue
                report.verdicts[name] = {}
                for dialect in server.dialects:
                    began = time.monotonic()
                    verdict, why = _verdict(scenario, server, dialect, Path(folder), options)
                    report.verdicts[name][dialect] = (verdict, why)
                    took = f"{time.monotonic() - began:.1f} s"
                    shown = f"{dialect}  {name}: [{_STYLES[verdict]}]{verdict}[/] {took}"
                    console.print(shown, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("interrupted; cleaning up")
        report.left.append("the run was interrupted")
    finally:
        _clean(server, report)
        signal.signal(signal.SIGTERM, before)
    return report


def _verdict(
    scenario: Callable[[Stage], None],
    server: Server,
    dialect: Dialect,
    folder: Path,
    options: argparse.Namespace,
) -> tuple[Verdict, str]:
    number = SCENARIOS.index(scenario)
    name = f"{server.prefix}-{dialect.removeprefix('openmeter-')}-{number:02}"
    flush, arrival = timedelta(seconds=options.flush), timedelta(seconds=options.arrival)
    try:
        scenario(Stage(server, dialect, name, folder / name, options.token, flush, arrival))
    except NotOffered as error:
        return "not offered", str(error)
    except Differs as error:
        return "differs", str(error)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "differs", f"{type(error).__name__} in {place.name}: {error}"
    return "ok", ""


def _clean(server: Server, report: Report) -> None:
    """Delete what the run created; a second Ctrl-C does not stop that, and each request has a time limit."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        report.left += server.clean()
        report.touched = server.touched()
        report.stays = server.stays()
    except (httpx.HTTPError, AssertionError, ValueError) as error:
        report.left.append(f"whatever begins with {server.prefix}: cleaning up failed: {error}")
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def show(report: Report, server: Server, console: Console) -> None:
    """Print the table, what differs, and what is left."""
    table = Table("scenario", *(dialect.removeprefix("openmeter-") for dialect in server.dialects))
    for name, row in report.verdicts.items():
        cells = [row.get(dialect, ("", ""))[0] for dialect in server.dialects]
        table.add_row(name, *(f"[{_STYLES[cell]}]{cell}[/]" if cell else "" for cell in cells))
    console.print(table)
    for name, row in report.verdicts.items():
        for dialect, (verdict, why) in row.items():
            if verdict != "ok":
                console.print(
                    f"{dialect}  {name}: {verdict}: {why}", markup=False, highlight=False, soft_wrap=True
                )
    for line in report.touched:
        console.print(f"CHANGED, and not of this run: {line}", markup=False, highlight=False, soft_wrap=True)
    for line in report.left:
        console.print(f"left behind: {line}", markup=False, highlight=False, soft_wrap=True)
    for line in report.stays:
        console.print(f"cannot be deleted: {line}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
