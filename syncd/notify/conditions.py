"""What a person has to know, as conditions that begin and end, and which of them are new. Pure.

A condition is sent when it is first seen, and again after it had ended. One with a figure that grows is sent
again each time that the figure has doubled. What cannot be read is neither new nor over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from openmeter_plugin.units import number, plural
from syncd.config.sections import NotifyConfig, Topic
from syncd.core.changes import Change, ChangeKind, Status
from syncd.gateways.models import Readiness, Spool
from syncd.metering.usage import whole
from syncd.runs.run import Run, RunState
from syncd.usage.estimates import money
from syncd.usage.figures import Amount
from syncd.usage.report import Report

_MAX_LINES = 10
_LARGEST = 2**62
"""A figure that a database can hold; more is as bad."""
_TITLES: Mapping[Topic, str] = {
    "failed-runs": "the last run failed",
    "blocked": "changes are blocked",
    "unbilled": "usage is unbilled",
    "dead-letters": "the metering API refused events",
    "gateways": "gateways need attention",
}
_PAGES: Mapping[Topic, str] = {
    "failed-runs": "/dashboard/runs",
    "blocked": "/dashboard/",
    "unbilled": "/dashboard/unbilled",
    "dead-letters": "/dashboard/dead-letters",
    "gateways": "/dashboard/gateways",
}

Key = tuple[Topic, str]
"""A topic, and what within it: a gateway, a blocked change."""


@dataclass(frozen=True, slots=True)
class Condition:
    """Something that holds now. `figure` grows if the condition gets worse, and stays 1 otherwise."""

    topic: Topic
    key: str
    text: str
    figure: int = 1


@dataclass(slots=True)
class Observed:
    """The conditions that hold, and the (topic, key) or whole topics of which it is known what holds."""

    conditions: list[Condition] = field(default_factory=list)
    known: set[Key | Topic] = field(default_factory=set)

    def knows(self, key: Key) -> bool:
        """Return whether it is known if this condition holds."""
        return key in self.known or key[0] in self.known


@dataclass(frozen=True, slots=True)
class Message:
    """A message about conditions of one topic."""

    title: str
    body: str
    conditions: tuple[Condition, ...]


def of_runs(observed: Observed, last: Run | None, planned: Run | None, settings: NotifyConfig) -> None:
    """Add what the last real run and the latest run with a plan of all principals show."""
    if last is not None:
        observed.known.add("failed-runs")
        if last.state is RunState.FAILED:
            observed.conditions.append(Condition("failed-runs", "runs", last.error or "no reason is known"))
    if planned is None or planned.plan is None:
        return
    observed.known.add("blocked")
    failed = [outcome.change for outcome in planned.outcomes if outcome.status is Status.BLOCKED]
    blocked = {_key_of(change): change for change in (*planned.plan.of(ChangeKind.BLOCKED), *failed)}
    observed.conditions += [
        Condition("blocked", key, _blocked_text(change))
        for key, change in blocked.items()
        if not change.settled
    ]
    if planned.unbilled is None:
        return
    observed.known.add("unbilled")
    kinds = {fate: _figure(planned.unbilled.events(fate)) for fate in ("blocked", "unknown")}
    events = _figure(sum(kinds.values()))
    if events >= settings.unbilled_events:
        subjects = planned.unbilled.count("blocked") + planned.unbilled.count("unknown")
        text = (
            f"{plural(events, 'event')} of {plural(subjects, 'subject')} without a customer:"
            f" {kinds['blocked']:,} blocked, {kinds['unknown']:,} of subjects that no source names"
        )
        observed.conditions.append(Condition("unbilled", "unbilled", text, events))


def _figure(count: float) -> int:
    return int(min(count, _LARGEST))


def _key_of(change: Change) -> str:
    """Return what identifies a blocked change from run to run; its reason may contain figures."""
    cause = change.cause.heading if change.cause else ""
    parts = [change.customer_key, sorted(change.subject_keys), cause]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _blocked_text(change: Change) -> str:
    names = ", ".join((change.names or change.subject_keys)[:3])
    of = f" ({names})" if names else ""
    return f"{change.customer_key or 'no customer'}{of}: {change.reason}"


def of_gateway(observed: Observed, name: str, readiness: Readiness, spool: Spool, lag: timedelta) -> None:
    """Add what a gateway's state shows."""
    observed.known |= {("dead-letters", name), ("gateways", name)}
    if spool.dead_letters:
        text = f"{name}: {plural(spool.dead_letters, 'dead letter')}"
        observed.conditions.append(Condition("dead-letters", name, text, _figure(spool.dead_letters)))
    problems = list(readiness.problems)
    if readiness.ready and not spool.delivery_running:
        problems.append("no delivery process is running on its spool")
    oldest = spool.total.oldest_waiting
    if oldest is not None and oldest.age_seconds > lag.total_seconds():
        minutes = int(oldest.age_seconds // 60)
        problems.append(
            f"{plural(spool.total.backlog, 'event')} waiting, the oldest for {plural(minutes, 'minute')}"
        )
    if problems:
        observed.conditions.append(Condition("gateways", name, f"{name}: {'; '.join(problems)}"))


def of_silent_gateway(
    observed: Observed, name: str, problem: str, silent_for: timedelta, lag: timedelta
) -> None:
    """Add that a gateway does not answer, if that has lasted: one time-out is nothing to wake people for."""
    if silent_for >= lag:
        observed.known.add(("gateways", name))
        observed.conditions.append(Condition("gateways", name, problem))


def messages(
    observed: Observed, sent: Mapping[Key, int], settings: NotifyConfig, owner: str, url: str | None
) -> list[Message]:
    """Return the messages about what is new; `sent` has the figures of what was sent and still holds."""
    found = []
    for topic in settings.topics:
        new = [one for one in observed.conditions if one.topic == topic and _is_new(one, sent)]
        if new:
            lines = [one.text for one in new[:_MAX_LINES]]
            if len(new) > len(lines):
                lines.append(f"and {len(new) - len(lines):,} more")
            if url:
                lines.append(f"{url}{_PAGES[topic]}")
            found.append(Message(f"syncd {owner}: {_TITLES[topic]}", "\n".join(lines), tuple(new)))
    return found


def _is_new(condition: Condition, sent: Mapping[Key, int]) -> bool:
    figure = sent.get((condition.topic, condition.key))
    return figure is None or (condition.figure > 1 and condition.figure >= 2 * figure)


def over(observed: Observed, sent: Iterable[Key]) -> list[Key]:
    """Return what was sent and no longer holds."""
    holding = {(one.topic, one.key) for one in observed.conditions}
    return [key for key in sent if key not in holding and observed.knows(key)]


def fallen(observed: Observed, sent: Mapping[Key, int]) -> list[Condition]:
    """Return the conditions whose figure fell since it was sent: from now on it doubles from there."""
    return [one for one in observed.conditions if one.figure < sent.get((one.topic, one.key), 0)]


def summary(
    runs: Iterable[Mapping[str, object]],
    observed: Observed,
    owner: str,
    until: datetime,
    url: str | None,
    usage: Report | None = None,
) -> Message:
    """Return the summary of a week from the summaries of its runs, its usage, and what holds at its end."""
    finished = [run for run in runs if run["state"] not in ("queued", "running") and not run["dry_run"]]
    failed = sum(run["state"] == "failed" for run in finished)
    done = sum(_done(run) for run in finished)
    lines = [
        f"The seven days to {until:%Y-%m-%d}:",
        f"- {plural(len(finished), 'run')}, {failed:,} failed; {plural(done, 'change')} made",
        *_usage(usage),
        f"- {_billed(observed)}",
        f"- blocked: {_count(observed, 'blocked')}",
        f"- dead letters: {_texts(observed, 'dead-letters')}",
        f"- gateways: {_texts(observed, 'gateways')}",
    ]
    if url:
        lines.append(f"{url}/dashboard/")
    return Message(f"syncd {owner}: weekly summary", "\n".join(lines), ())


def _done(run: Mapping[str, object]) -> int:
    outcomes = run.get("outcomes")
    found = outcomes.get("done", 0) if isinstance(outcomes, Mapping) else 0
    return found if isinstance(found, int) else 0


def _usage(report: Report | None) -> list[str]:
    """Return a line for each meter and the estimate; nothing if no usage is kept."""
    if report is None or not report.meters:
        return []
    compared = report.is_compared
    found = [
        f"- {one.words}: {number(whole(now))}{_change(Amount(now, before), compared)}"
        for one in report.meters
        for now, before in [(sum(one.by_day), sum(one.before))]
    ]
    if (worth := report.estimates) is not None:
        amount = Amount(float(worth.total), float(worth.total_before))
        found.append(f"- estimate: {money(worth.total, worth.currency)}{_change(amount, compared)}")
    if report.refreshed_at is None:
        found.append("- usage has not been read completely yet")
    elif report.refreshed_at < report.days.end:
        found.append(f"- usage as the metering API had it at {report.refreshed_at:%Y-%m-%d %H:%M} UTC")
    return found


def _change(amount: Amount, compared: bool) -> str:
    if not compared:
        return ""
    if amount.change is None:
        return " (none the week before)" if amount.now else ""
    return f" ({100 * amount.change:+.1f} % against the week before)"


def _billed(observed: Observed) -> str:
    if "unbilled" not in observed.known:
        return "unbilled usage is unknown"
    texts = [one.text for one in observed.conditions if one.topic == "unbilled"]
    return f"unbilled: {texts[0]}" if texts else "all usage of the last 31 days has a customer"


def _count(observed: Observed, topic: Topic) -> str:
    if topic not in observed.known:
        return "unknown"
    return plural(sum(one.topic == topic for one in observed.conditions), "change")


def _texts(observed: Observed, topic: Topic) -> str:
    return "; ".join(one.text for one in observed.conditions if one.topic == topic) or "nothing"
