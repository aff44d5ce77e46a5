"""`syncd audit`: compares what the gateways delivered with what the meters count."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from openmeter_plugin.units import plural
from syncd.cli.options import (
    APPLIED,
    DRIFT,
    ERROR,
    ConfigOption,
    FromOption,
    Output,
    OutputOption,
    ToOption,
    complain,
    config_path,
    console,
    finish,
    print_json,
)
from syncd.core.errors import ConfigError, SyncdError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from syncd.audit.redelivery import Redelivery
    from syncd.audit.run import Audit, AuditRun
    from syncd.config.settings import Config

_DEFAULT_PERIOD = timedelta(days=1)


def audit(
    context: typer.Context,
    config: ConfigOption = None,
    since: FromOption = None,
    until: ToOption = None,
    redeliver: Annotated[
        bool, typer.Option("--redeliver", help="Ask the gateways to redeliver missing events.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --redeliver: only show what would be requested.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="With --redeliver: wait until it is done, then compare again.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Maximum time to --wait, in seconds.")] = 300,
    force: Annotated[
        bool, typer.Option("--force", help="Redeliver even if events may be counted twice.")
    ] = False,
    settle: Annotated[
        float, typer.Option(min=0, help="How long to keep checking while events are missing, in seconds.")
    ] = 30,
    output: OutputOption = Output.TEXT,
) -> None:
    """Compare the gateways' ledgers with the meters by hour. Exit status: 0 equal, 2 different, 1 error.

    Without --to, the range ends with the current hour; without --from, it starts a day earlier.
    """
    from syncd.audit.run import to_json
    from syncd.cli.audit_report import show_audit
    from syncd.config import settings

    if (dry_run or wait or force) and not redeliver:
        raise typer.BadParameter("--dry-run, --wait and --force need --redeliver")
    loaded = settings.load(config_path(context, config))
    with ExitStack() as stack:
        run = _run(stack, loaded, since, until, settle)
        found = run.audit()
        if output is Output.TEXT:
            show_audit(console(), found, redelivers=redeliver and not dry_run)
        asked: Sequence[Redelivery] = ()
        no_effect: int | None = None
        problems: list[str] = []
        if redeliver:
            options = _Options(
                force,
                dry_run,
                timeout if wait else None,
                quiet=output is Output.JSON,
                memory=loaded.metering.dedupe_expiration,
            )
            found, asked, no_effect = _redeliver(run, found, options, problems)
    if output is Output.JSON:
        print_json(to_json(found, asked, no_effect=no_effect))
    problems += [found.incomparable_reason] if found.incomparable_reason is not None else []
    for problem in problems:
        complain(problem)
    finish(ERROR if problems else APPLIED if found.is_equal else DRIFT)


def _run(
    stack: ExitStack, config: Config, since: datetime | None, until: datetime | None, settle: float
) -> AuditRun:
    from syncd.audit.compare import HOUR, whole_hours
    from syncd.audit.run import AuditRun, HourlyMeters, Reader
    from syncd.runs import factory

    if not config.gateways:
        raise ConfigError(
            "gateways: none is listed, but syncd audit compares their ledgers with the meters. List each"
            ' gateway with name, url and token of its plugin\'s API (docs/syncd.md, "Audit")'
        )
    begin, end = whole_hours(since, until, datetime.now(UTC), _DEFAULT_PERIOD)
    if begin >= end:
        raise SyncdError(
            f"there is no complete hour from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} (UTC) to compare:"
            " --from must be before --to, and the current hour is not complete"
        )
    gateways = [stack.enter_context(closing(gateway)) for gateway in factory.gateways_of(config)]
    meters = HourlyMeters(stack.enter_context(closing(factory.target_of(config))))
    reader = Reader(gateways, meters, config.metering.url)
    on_part = _progress(stack, (end - begin) // HOUR)
    return AuditRun(reader, begin, end, settle, on_part=on_part, on_wait=_report_waiting)


def _progress(stack: ExitStack, total: int) -> Callable[[int], object]:
    """Return a function that counts compared hours; shows a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    bar = stack.enter_context(
        Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    )
    task = bar.add_task("hours", total=total)
    return lambda hours: bar.advance(task, hours)


def _report_waiting(missing: int) -> None:
    complain(
        f"{plural(missing, 'event is', 'events are')} missing or still in transit; checking again (--settle)"
    )


@dataclass(frozen=True, slots=True)
class _Options:
    """Options of a redelivery; `wait` is in seconds, None means not to wait.

    `memory` is how long the deduplication of the metering API remembers ids.
    """

    force: bool
    dry: bool
    wait: float | None
    quiet: bool
    memory: timedelta


def _redeliver(
    run: AuditRun, found: Audit, options: _Options, problems: list[str]
) -> tuple[Audit, Sequence[Redelivery], int | None]:
    """Show and request the redeliveries, optionally wait and compare again; failures join `problems`.

    Returns the audit, the redeliveries, and how many events are still missing after them if it waited.
    """
    from syncd.audit import redelivery
    from syncd.cli.audit_report import show_audit, show_planned, show_redeliveries

    differences = found.comparison.differences
    since = redelivery.remembered_since(datetime.now(UTC), options.memory)
    if not options.force and (missing := redelivery.forgotten(differences, since)):
        problems.append(
            f"{plural(missing, 'missing event')} from before {since:%Y-%m-%d %H:%M} (UTC): not redelivered,"
            " because the deduplication of the metering API has forgotten those hours"
            " (metering.dedupe_expiration), so their other events would be counted twice. Send the missing"
            ' ones alone (docs/audit.md, "Hours that a deduplication has forgotten"), or pass --force'
        )
        differences = tuple(one for one in differences if one.line.hour >= since)
    planned = redelivery.plan_redeliveries(differences)
    if planned and not options.quiet:
        show_planned(console(), planned)
    if options.dry or not planned:
        return found, planned, None
    if not options.force and (why_not := redelivery.double_billing_risk(found.comparison)):
        problems.append(f"nothing was redelivered: {why_not}")
        return found, planned, None
    no_effect: int | None = None
    asked = redelivery.request(planned, run.reader.gateways)
    if options.wait is not None:
        asked = redelivery.wait(asked, run.reader.gateways, options.wait)
        found = run.again()
        no_effect = redelivery.without_effect(asked, found.comparison.differences)
    if not options.quiet:
        show_redeliveries(console(), asked)
        if options.wait is not None:
            show_audit(console(), found, redelivers=True, no_effect=no_effect or 0)
    problems += [one.error for one in asked if one.error is not None]
    return found, asked, no_effect
