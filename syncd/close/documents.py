"""A report as CSV and JSON. Pure; `syncd.dashboard.close` writes it as HTML.

Neither holds the time at which it was made: equal reports make equal files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from openmeter_plugin.units import number, plural
from syncd.close.report import Content, Report
from syncd.core.text_csv import Cell, document
from syncd.usage.estimates import NOTE

_HEADS = (
    "section",
    "customer_key",
    "customer_id",
    "customer_name",
    "subject",
    "gateway",
    "requests",
    "tokens",
    "details",
)
_Row = tuple[Cell, ...]


def as_json(report: Report) -> str:
    """Return the report with its digest; `jq -cjS .report FILE | sha256sum` computes it again."""
    return json.dumps({"sha256": report.sha256, "report": report.content}, indent=2) + "\n"


def as_csv(report: Report) -> str:
    """Return the report as one table: a line for each subject, gateway and objection, and the totals."""
    meters, currency = counted(report.content), currency_of(report.content)
    heads = (*_HEADS, *meters, *(("estimate", "currency") if currency else ()))
    rows = _rows(report, meters, currency)
    return document(heads, ((*row, *[""] * (len(heads) - len(row))) for row in rows))


def counted(content: Content) -> list[str]:
    """Return the other meters that the report has figures of."""
    return [key for key, meter in content.get("meters", {}).items() if meter["total"] is not None]


def left_out(content: Content) -> Iterator[str]:
    """Yield sentences on what the report leaves out of other meters and the estimate."""
    for key, meter in content.get("meters", {}).items():
        if meter["total"] is None:
            yield f"Meter {key} is left out: {meter['problem']}."
    estimate = content.get("estimate") or {"unpriced": {}, "gaps": ()}
    for key, value in estimate["unpriced"].items():
        yield f"No price fits {number(value)} of {key}; the estimate leaves that out."
    for gap in estimate["gaps"]:
        yield f"The estimate is incomplete: {gap}."


def currency_of(content: Content) -> str | None:
    """Return the currency of the estimate, None if there is none."""
    estimate = content.get("estimate")
    return estimate["currency"] if estimate else None


def _more(one: Content, meters: list[str], currency: str | None, estimate: str | None = None) -> _Row:
    """Return the last cells of a line: other meters, then the estimate."""
    values = [one.get("meters", {}).get(key, 0) for key in meters]
    if not currency:
        return tuple(values)
    return (*values, *((estimate, currency) if estimate is not None else ("", "")))


def _rows(report: Report, meters: list[str], currency: str | None) -> Iterator[_Row]:
    content = report.content
    state = "closed" if report.closed else "not closed"
    yield _row("report", details=f"{content['month']}: {state}; SHA-256 {report.sha256}")
    if (totals := content["totals"]) is not None:
        sums = {"meters": {key: content["meters"][key]["total"] for key in meters}}
        worth = content["estimate"]["total"] if currency else None
        yield (
            *_row("total", requests=totals["requests"], tokens=totals["tokens"]),
            *_more(sums, meters, currency, worth),
        )
    yield from _usage_rows(content, meters, currency)
    for month, late in content["late"].items():
        for one in late:
            yield _row(
                "late",
                subject=one["subject"],
                requests=one["requests"],
                tokens=one["tokens"],
                details=f"for {month}, after it was closed",
            )
    for gateway in content["gateways"]:
        yield _row("gateway", gateway=gateway["name"], details=gateway_text(gateway))
    for kind in (content["audit"] or {}).get("types", ()):
        yield _row("audit", details=audit_text(kind))
    for sentence in left_out(content):
        yield _row("note", details=sentence)
    if currency:
        yield _row("note", details=NOTE)
    for one in content["against"]:
        yield _row("against", details=f"{one['kind']}: {one['text']}{_accepted(one)}")


def _usage_rows(content: Content, meters: list[str], currency: str | None) -> Iterator[_Row]:
    for customer in content["customers"]:
        # Of the customer, in the first of its lines: the column adds up.
        worth = customer.get("estimate")
        for one in customer["subjects"]:
            yield (
                "customer",
                customer["key"],
                customer["id"],
                customer["name"],
                *(one["key"], "", one["requests"], one["tokens"], one["name"]),
                *_more(one, meters, currency, worth),
            )
            worth = None
    for section in ("unbilled", "ignored"):
        for one in content[section]:
            row = _row(
                section,
                subject=one["key"],
                requests=one["requests"],
                tokens=one["tokens"],
                details=one.get("reason"),
            )
            yield (*row, *_more(one, meters, currency, one.get("estimate")))


def _row(
    section: str,
    *,
    subject: Cell = "",
    gateway: Cell = "",
    requests: Cell = "",
    tokens: Cell = "",
    details: Cell = "",
) -> _Row:
    return (section, "", "", "", subject, gateway, requests, tokens, details)


def gateway_text(gateway: Content) -> str:
    """Return what a gateway holds of the month, or may."""
    return (
        f"{plural(gateway['dead_letters'], 'dead letter')}, {number(gateway['quarantined'])} in quarantine,"
        f" {plural(gateway['requests_lost'], 'request')} lost since its spool was created"
    )


def audit_text(kind: Content) -> str:
    """Return the comparison of one type of event."""
    if not kind["exact"]:
        return f"{kind['type']}: {kind['delivered']:,} delivered, compared only roughly with {kind['meter']}"
    return (
        f"{kind['type']}: {kind['delivered']:,} delivered, {kind['dead_lettered']:,} refused,"
        f" {kind['counted']:,} counted by {kind['meter']}"
    )


def _accepted(against: Content) -> str:
    accepted = against["accepted"]
    if accepted is None:
        return ""
    return f" (accepted: {accepted['reason']}{', by ' + accepted['by'] if accepted['by'] else ''})"
