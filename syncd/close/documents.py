"""A report as CSV and JSON. Pure; `syncd.dashboard.close` writes it as HTML.

Neither holds the time at which it was made: equal reports make equal files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from openmeter_plugin.units import number, plural
from syncd.close.report import Content, Report
from syncd.core.text_csv import Cell, document

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
    return document(_HEADS, _rows(report))


def _rows(report: Report) -> Iterator[_Row]:
    content = report.content
    state = "closed" if report.closed else "not closed"
    yield _row("report", details=f"{content['month']}: {state}; SHA-256 {report.sha256}")
    if (totals := content["totals"]) is not None:
        yield _row("total", requests=totals["requests"], tokens=totals["tokens"])
    for customer in content["customers"]:
        for one in customer["subjects"]:
            yield (
                "customer",
                customer["key"],
                customer["id"],
                customer["name"],
                *(one["key"], "", one["requests"], one["tokens"], one["name"]),
            )
    for section in ("unbilled", "ignored"):
        for one in content[section]:
            yield _row(
                section,
                subject=one["key"],
                requests=one["requests"],
                tokens=one["tokens"],
                details=one.get("reason"),
            )
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
    for one in content["against"]:
        yield _row("against", details=f"{one['kind']}: {one['text']}{_accepted(one)}")


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
