"""`syncd close`: one report of a month, closed or with the objections to closing it."""

from __future__ import annotations

import sys
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from openmeter_plugin.units import number, plural
from syncd.cli.options import (
    APPLIED,
    DRIFT,
    ConfigOption,
    complain,
    config_path,
    console,
    finish,
    print_json,
)
from syncd.cli.render import line, steps
from syncd.close.report import NEVER_ACCEPTED, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from syncd.close.closing import Result
    from syncd.close.report import LateUsage
    from syncd.close.store import ClosedMonth

_MAX_LATE = 50
"""Subjects with late usage that are printed."""


class CloseOutput(StrEnum):
    """What `close` prints."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"
    HTML = "html"


def close(
    context: typer.Context,
    month: Annotated[
        str | None, typer.Argument(metavar="MONTH", help="The month, such as 2026-10, in UTC.")
    ] = None,
    config: ConfigOption = None,
    accept: Annotated[
        list[Kind] | None,
        typer.Option("--accept", metavar="KIND", help="Close despite objections of this kind; repeatable."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="With --accept: why. Part of the report.")] = "",
    by: Annotated[str | None, typer.Option("--by", metavar="NAME", help="Who closes the month.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Close a closed month again; its earlier reports are kept.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; do not close anything.")] = False,
    settle: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="How long to keep checking while events are missing."),
    ] = 30,
    output: Annotated[CloseOutput, typer.Option("--output", "-o", help="What to print.")] = CloseOutput.TEXT,
) -> None:
    """Close a month: audit, unbilled usage, late events, dead letters and quarantine in one report.

    A closed month is compared with the meters instead; without MONTH, all closed months are.
    Exit status: 0 closed, 2 there are objections or late events, 1 error.
    """
    from syncd.close.closing import Closing, Decision, opened
    from syncd.close.report import Month
    from syncd.config import settings

    kinds = frozenset(accept or ())
    if kinds and not (reason.strip() and by):
        raise typer.BadParameter("needs --reason and --by: the report says who accepted what, and why")
    if forbidden := kinds & NEVER_ACCEPTED:
        raise typer.BadParameter(f"{min(forbidden)} cannot be accepted: the figures are not final")
    if month is None and (kinds or again or output in (CloseOutput.CSV, CloseOutput.HTML)):
        raise typer.BadParameter("needs a month, such as 2026-10")
    try:
        wanted = Month.parse(month) if month is not None else None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    loaded = settings.load(config_path(context, config))
    with opened(loaded, create=not dry_run and wanted is not None) as (months, noted), steps() as progress:
        progress.begin("reading gateways, meters and customers")
        closing = Closing(loaded, months, noted, settle, on_wait=_report_waiting)
        decision = Decision(kinds, reason.strip(), by)
        found = closing.close(wanted, decision, again=again, keep=not dry_run) if wanted else closing.check()
    if isinstance(found, list):
        _show_months(found, as_json=output is CloseOutput.JSON)
        finish(DRIFT if any(one.late for one in found) else APPLIED)
    _show(found, output, dry_run=dry_run)
    finish(APPLIED if found.is_closed else DRIFT)


def _report_waiting(missing: int) -> None:
    complain(
        f"{plural(missing, 'event is', 'events are')} missing or still in transit; checking again (--settle)"
    )


def _show(result: Result, output: CloseOutput, *, dry_run: bool) -> None:
    from syncd.close import documents

    match output:
        case CloseOutput.JSON:
            sys.stdout.write(documents.as_json(result.report))
        case CloseOutput.CSV:
            sys.stdout.write(documents.as_csv(result.report))
        case CloseOutput.HTML:
            from syncd.dashboard.close import as_html

            sys.stdout.write(as_html(result.report))
        case CloseOutput.TEXT:
            _show_text(console(), result, dry_run=dry_run)
    if output is not CloseOutput.TEXT and not result.is_closed:
        complain(_verdict(result, dry_run=dry_run))


def _show_text(out: Console, result: Result, *, dry_run: bool) -> None:
    from syncd.close import documents
    from syncd.usage.estimates import NOTE, money

    report = result.report
    content = report.content
    if (totals := content["totals"]) is not None:
        customers = plural(len(content["customers"]), "customer")
        requests, tokens = plural(totals["requests"], "request"), plural(totals["tokens"], "token")
        line(out, f"{content['month']} (UTC): {requests}, {tokens}, {customers} with usage.")
        for key in documents.counted(content):
            line(out, f"Meter {key}: {number(content['meters'][key]['total'])}.")
        if (estimate := content.get("estimate")) and estimate["total"] is not None:
            worth = (money(Decimal(estimate[name]), estimate["currency"]) for name in ("total", "unbilled"))
            line(out, "Estimate: {}, of which {} unbilled. {}".format(*worth, NOTE))
        for sentence in documents.left_out(content):
            line(out, sentence)
        for kind in (content["audit"] or {}).get("types", ()):
            line(out, f"Audit: {documents.audit_text(kind)}.")
    open_first = sorted(report.against, key=lambda one: one["accepted"] is not None)
    for one in open_first:
        accepted = one["accepted"]
        decided = f" Accepted by {accepted['by']}: {accepted['reason']}." if accepted else ""
        line(out, f"{'-' if accepted else '!'} {one['kind']}: {one['text']}.{decided}")
        if not accepted:
            line(out, f"    {one['cure']}")
    for late in result.late[:_MAX_LATE]:
        whose = late.customer or "no customer"
        line(out, f"! {late.subject or '(no subject)'} ({whose}): {_signed(late)}")
    if (more := len(result.late) - _MAX_LATE) > 0:
        line(out, f"  and {plural(more, 'more subject')}; `syncd close --output json` lists all")
    line(out, f"{_verdict(result, dry_run=dry_run)}.")
    if report.closed:
        line(out, f"SHA-256: {report.sha256}")


def _verdict(result: Result, *, dry_run: bool) -> str:
    month, kept = result.report.month, result.kept
    if result.late:
        return (
            f"{month} was closed on {_day(kept)}, and the meters count differently now, for"
            f" {plural(len(result.late), 'subject')}. Bill or credit the difference, then close it again"
            " (--again)"
        )
    if kept is not None:
        revision = f", revision {kept.revision}" if kept.revision > 1 else ""
        return f"{month} has been closed since {_day(kept)}{revision}"
    if result.report.closed:
        return f"{month} can be closed" if dry_run else f"{month} is closed"
    several = [one for one in result.report.against if one["accepted"] is None]
    return f"{month} is not closed: {plural(len(several), 'objection')}"


def _show_months(months: Sequence[ClosedMonth], *, as_json: bool) -> None:
    if as_json:
        print_json({"months": [one.to_json() for one in months]})
        return
    for one in months:
        late = f"! changed since: {', '.join(map(_late_of, one.late))}" if one.late else "unchanged since"
        revision = f", revision {one.revision}" if one.revision > 1 else ""
        line(console(), f"{one.month}  closed {_day(one)}{revision}  {one.sha256[:12]}  {late}")
    if not months:
        line(console(), "No month is closed.")


def _late_of(late: LateUsage) -> str:
    return f"{late.subject or '(no subject)'} {_signed(late)}"


def _signed(late: LateUsage) -> str:
    parts = ((late.requests, "request"), (late.tokens, "token"))
    return ", ".join(
        f"{amount:+,} {what}{'' if abs(amount) == 1 else 's'}" for amount, what in parts if amount
    )


def _day(kept: ClosedMonth | None) -> str:
    return f"{kept.closed_at:%Y-%m-%d}" if kept else ""
