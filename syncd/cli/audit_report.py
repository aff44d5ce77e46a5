"""Output of an audit for people: tables and sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from rich.console import Console

from openmeter_plugin.units import plural
from syncd.audit.compare import Comparison, Difference, Totals, Yardstick, spans
from syncd.audit.redelivery import Redelivery, RedeliveryState
from syncd.audit.run import Audit
from syncd.cli.render import counts, line, show_rows

_EXPLANATIONS = {
    "missing": "Missing: the metering API accepted these events but does not count them.",
    "refused": (
        "Refused: dead letters. `openmeter-plugin spool dead-letters` on the gateway shows the metering API's"
        " answers. Fix the cause, then run `openmeter-plugin spool replay`."
    ),
    "lost": (
        "Lost on the gateway: it accepted these events, but their bytes on its disk were damaged or removed"
        " before they were delivered. `openmeter-plugin spool status` there shows why; a segment that was set"
        ' aside can come back: docs/runbook.md, "Usage is lost".'
    ),
    "surplus": (
        "Counted more than were sent: counted twice (`syncd doctor --probe` checks whether the metering API"
        " deduplicates), or sent by a gateway that is not listed, or by another sender."
    ),
    "unlisted": (
        "Counted but never sent by the listed gateways: by a gateway that is not listed, or whose spool was"
        " replaced, or by another sender of such events."
    ),
}
_REDELIVER = " `syncd audit --redeliver --wait` asks the gateways to redeliver them, and compares again."


def show_audit(console: Console, audit: Audit, *, redelivers: bool = False, no_effect: int = 0) -> None:
    """Print the differences, what was not compared, and the totals.

    With `redelivers`, missing events are redelivered anyway, or were; `no_effect` of them are missing still.
    """
    comparison = audit.comparison
    rows = [
        (
            (_hour(one.line.hour), ""),
            (one.line.type, ""),
            (one.line.subject or "(no subject)", ""),
            (f"{one.delivered:,} delivered", ""),
            (f"{one.counted:,} counted", ""),
            (_difference(one), "bold red"),
            (", ".join(name for name, _ in one.gateways), ""),
        )
        for one in comparison.differences
    ]
    header = ("hour (UTC)", "type", "subject", "sent", "metering API", "difference", "gateways")
    show_rows(console, header, rows)
    for text in (*_left_out(comparison), *_elsewhere(audit), *_not_compared(comparison), *_lost(audit)):
        line(console, text)
    for kind in _kinds(comparison.differences):
        line(console, _EXPLANATIONS[kind] + (_REDELIVER if kind == "missing" and not redelivers else ""))
    if no_effect:
        line(console, _no_effect(no_effect))
    for used in audit.yardsticks:
        line(console, _total(used, comparison.totals.get(used.type, Totals())))
    span = f"{_hour(comparison.since)} to {_hour(comparison.until)} (UTC)"
    hours = f"{comparison.hours_compared} of {plural(comparison.hours, 'hour')} compared"
    result = "equal" if audit.is_equal else _totals(comparison)
    line(console, f"Audit {span}, {hours}: {audit.incomparable_reason or result}.")


def show_planned(console: Console, planned: Sequence[Redelivery]) -> None:
    """Print the redeliveries to request."""
    rows = [
        (
            (one.gateway, ""),
            (one.subject if one.subject is not None else "all subjects", ""),
            (_span(one), ""),
            (f"{one.missing:,} missing", ""),
        )
        for one in planned
    ]
    show_rows(console, ("gateway", "subject", "hours (UTC)", "missing"), rows)
    line(console, f"To redeliver: {plural(len(planned), 'span')}, with all events that are retained of them.")


def show_redeliveries(console: Console, asked: Sequence[Redelivery]) -> None:
    """Print the result of the redeliveries."""
    styles = {RedeliveryState.DONE: "green", RedeliveryState.FAILED: "bold red"}
    rows = [
        (
            (one.gateway, ""),
            (one.subject if one.subject is not None else "all subjects", ""),
            (_span(one), ""),
            (str(one.state), styles.get(one.state, "yellow")),
            (_redelivery_result(one), ""),
        )
        for one in asked
    ]
    show_rows(console, ("gateway", "subject", "hours (UTC)", "state", ""), rows)
    waiting = sum(one.state is RedeliveryState.WAITING for one in asked)
    gone = sum(one.gone for one in asked)
    sent = plural(sum(one.sent for one in asked), "event")
    line(console, f"Redelivered: {sent} in {plural(len(asked), 'span')}.")
    if waiting:
        line(
            console,
            f"{waiting} {'is' if waiting == 1 else 'are'} still in progress. Run the audit again later to"
            " count what is sent until then.",
        )
    if gone:
        line(
            console,
            f"{plural(gone, 'event is', 'events are')} no longer retained on the gateway (--retention of the"
            " plugin): what is missing of that cannot be redelivered.",
        )


def _no_effect(missing: int) -> str:
    """Tell what a redelivery cannot bring back, and why the next one cannot either, or must not."""
    return (
        f"Without effect: {plural(missing, 'redelivered event is', 'redelivered events are')} still not"
        " counted. If its sink is running and a longer --settle does not help, the deduplication of the"
        " metering API remembers their ids, although the events are lost, and drops them. Do not redeliver"
        " once it has forgotten them (in OpenMeter after the `expiration` of the sink's `dedupe`): that would"
        " count the other events of the span twice. An operator of OpenMeter can delete the ids of the lost"
        " events, and no others, from its Redis (`<namespace>-<source>-<id>`). Redeliver then: docs/audit.md,"
        ' "Events that a deduplication remembers".'
    )


def _redelivery_result(one: Redelivery) -> str:
    if one.error is not None and one.state is RedeliveryState.FAILED:
        return one.error
    text = f"{one.sent:,} sent"
    return f"{text}, {one.gone:,} no longer retained" if one.gone else text


def _difference(one: Difference) -> str:
    surplus = one.surplus if not one.is_unlisted else 0
    unlisted = one.surplus if one.is_unlisted else 0
    return counts(
        {
            "missing": one.missing,
            "refused": one.refused,
            "lost on the gateway": one.lost,
            "more than were sent": surplus,
            "never sent": unlisted,
        }
    )


def _kinds(differences: Iterable[Difference]) -> list[str]:
    found = set()
    for one in differences:
        found |= {"missing"} if one.missing else set()
        found |= {"refused"} if one.refused else set()
        found |= {"lost"} if one.lost else set()
        if one.surplus:
            found.add("unlisted" if one.is_unlisted else "surplus")
    return [kind for kind in _EXPLANATIONS if kind in found]


def _total(used: Yardstick, totals: Totals) -> str:
    if not used.exact:
        return (
            f"{used.type}: {totals.delivered:,} delivered, compared only roughly: meter {used.meter} does not"
            " count events, so missing ones are noticed only if a subject has no usage at all in an hour."
            " `syncd meters apply` creates the meter for an exact comparison."
        )
    return f"{used.type}: {totals.delivered:,} delivered, {totals.counted:,} counted by meter {used.meter}."


def _totals(comparison: Comparison) -> str:
    sums = {
        "missing": sum(one.missing for one in comparison.differences),
        "refused": sum(one.refused for one in comparison.differences),
        "lost on the gateway": sum(one.lost for one in comparison.differences),
        "too many": sum(one.surplus for one in comparison.differences),
    }
    return counts(sums)


def _left_out(comparison: Comparison) -> list[str]:
    by_reason: defaultdict[str, list[datetime]] = defaultdict(list)
    for hour, reasons in comparison.left_out.items():
        for why in reasons:
            by_reason[why].append(hour)
    return [
        f"Left out: {', '.join(_hours(since, until) for since, until in spans(hours))}: {why}."
        for why, hours in sorted(by_reason.items())
    ]


def _elsewhere(audit: Audit) -> list[str]:
    return [
        f"Left out: {plural(one.events, 'event')} of {one.gateway} for"
        f" {one.endpoint or 'an unknown endpoint'} (destination {one.destination}), which is not at"
        " metering.url."
        for one in audit.other_destinations
    ]


def _lost(audit: Audit) -> list[str]:
    """Say what no audit finds: requests that became no event are in no ledger, and at no known hour."""
    return [
        f"In no ledger: {plural(sum(lost.values()), 'request')} that {gateway} has lost since its spool was"
        f" created ({', '.join(f'{cause} {count}' for cause, count in sorted(lost.items()))})."
        for gateway, lost in sorted(audit.lost.items())
    ]


def _not_compared(comparison: Comparison) -> list[str]:
    return [
        f"Not compared: {plural(number, f'{kind} event')}: no meter counts that, or only later ones."
        for kind, number in sorted(comparison.not_compared.items())
    ]


def _hour(hour: datetime) -> str:
    return hour.strftime("%Y-%m-%d %H:00")


def _hours(since: datetime, until: datetime) -> str:
    return _hour(since) if until - since == timedelta(hours=1) else f"{_hour(since)} to {_hour(until)}"


def _span(one: Redelivery) -> str:
    return f"{_hour(one.since)} to {_hour(one.until)}"
