"""The overview: whether everybody is billed, everything is in sync and everything runs, then the figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from openmeter_plugin.units import plural
from syncd.dashboard.health import GatewayState
from syncd.dashboard.queries import Health, Queries
from syncd.dashboard.text import ago, moment
from syncd.dashboard.unbilled_view import UnbilledView
from syncd.dashboard.views import Drift, Level
from syncd.dashboard.web import Visitor, Web, url
from syncd.runs.options import TABLE
from syncd.runs.run import Run, RunState

_LATEST_RUNS: Final = 6
_SEVERITY: Final[tuple[Level, ...]] = ("none", "ok", "busy", "warning", "problem")
_OPEN: Final = frozenset({"blocked", "unknown"})


@dataclass(frozen=True, slots=True)
class Fact:
    """One reason for an answer; `link` leads to what can be done about it."""

    level: Level
    text: str
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A question that people open the overview with, and its answer."""

    question: str
    facts: tuple[Fact, ...]
    yes: str
    """What holds if there is nothing to say."""
    known: bool = True

    @property
    def level(self) -> Level:
        """Return the level of the worst fact."""
        levels: list[Level] = [fact.level for fact in self.facts]
        default: Level = "ok" if self.known else "none"
        return max([default, *levels], key=_SEVERITY.index)

    @property
    def answer(self) -> str:
        """Return the answer in a word."""
        if self.level in ("warning", "problem"):
            return "No"
        return "Yes" if self.known else "Unknown"


def billed(unbilled: UnbilledView | None, health: Sequence[Health]) -> Verdict:
    """Return whether all usage is billed: it has a customer, and the gateways keep nothing back."""
    facts = _without_customer(unbilled) if unbilled else ()
    facts += tuple(fact for item in health if item.kind == "gateway" for fact in _kept_back(item))
    if unbilled is None:
        facts += (Fact("none", "No plan since the daemon started, or the meters could not be read."),)
    since = unbilled.looked_from.date().isoformat() if unbilled and unbilled.looked_from else None
    yes = f"All usage since {since} has a customer." if since else "All usage has a customer."
    return Verdict("Is everybody billed?", facts, yes, known=unbilled is not None)


def _without_customer(unbilled: UnbilledView) -> tuple[Fact, ...]:
    kinds: tuple[tuple[frozenset[str], Level, str], ...] = (
        (_OPEN, "warning", "{} of {} without a customer"),
        (frozenset({"planned"}), "busy", "{} of {}: the next run gives them a customer"),
        (frozenset({"settled"}), "none", "{} of {}: unbilled by decision"),
    )
    facts = []
    for statuses, level, text in kinds:
        rows = [row for row in unbilled.subjects if row.status in statuses]
        if rows:
            events = sum(row.events for row in rows)
            said = text.format(plural(events, "event"), plural(len(rows), "subject"))
            facts.append(Fact(level, said, url("unbilled")))
    return tuple(facts)


def _kept_back(gateway: Health) -> list[Fact]:
    state = gateway.answer.value
    if not isinstance(state, GatewayState):
        return [Fact("warning", f"what {gateway.name} keeps back is unknown", url("gateways"))]
    spool = state.spool
    books = spool.total.books
    kept = (
        (spool.dead_letters, "dead letter", "dead-letters"),
        (spool.quarantined, "quarantined request", "quarantine"),
        (sum(books.lost.values()), "lost request", "gateways"),
        (sum(books.lost_events.values()), "lost event", "gateways"),
    )
    return [
        Fact("warning", f"{plural(number, what)} on {gateway.name}", url(page))
        for number, what, page in kept
        if number
    ]


def in_sync(drift: Drift | None, last: Run | None, now: datetime) -> Verdict:
    """Return whether the customers are as the sources call for."""
    facts: list[Fact] = []
    if last is not None and last.state is RunState.FAILED:
        facts.append(Fact("problem", "the last run failed", url("runs", last.id)))
    yes = ""
    if drift is None:
        facts.append(Fact("none", "No plan since the daemon started."))
    else:
        page, age = url("runs", drift.run_id), ago(drift.at, now)
        yes = f"The customers are as the sources call for, says the plan of {age}."
        if drift.applying:
            facts.append(Fact("busy", "a run is applying its plan", page))
        elif drift.to_do:
            facts.append(
                Fact("warning", f"{plural(drift.to_do, 'change')} to make, says the plan of {age}", page)
            )
        if drift.blocked:
            facts.append(Fact("warning", f"{plural(drift.blocked, 'change')} blocked", page))
    return Verdict("Is everything in sync?", tuple(facts), yes, known=drift is not None)


def works(health: Sequence[Health]) -> Verdict:
    """Return whether all systems answer and no gateway lags."""
    facts = [
        Fact(
            item.level,
            f"{item.kind} {item.name}: {item.text}",
            url("gateways") if item.kind == "gateway" else None,
        )
        for item in health
        if item.level == "problem"
    ]
    for item in health:
        state = item.answer.value
        if item.level == "warning" and isinstance(state, GatewayState) and state.lag:
            facts.append(Fact("warning", f"gateway {item.name}: {state.lag}", url("gateways")))
    return Verdict("Does everything run?", tuple(facts), f"{plural(len(health), 'system')} work.")


def _page_of(item: Health) -> str | None:
    return url("gateways") if item.kind == "gateway" else None


def down(health: Sequence[Health]) -> str:
    """Return the names of what does not work, empty if all does."""
    return ", ".join(
        item.kind if item.kind == "metering API" else f"{item.kind} {item.name}"
        for item in health
        if item.level == "problem"
    )


class OverviewPage:
    """Renders the page."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    def show(self, _request: Request, visitor: Visitor) -> Response:
        """Show the answers, the form for a resync, the health of all systems and the latest runs."""
        now = datetime.now(UTC)
        drift, unbilled = self._queries.drift_and_unbilled()
        health = self._queries.health()
        runs, schedule = self._queries.runs, self._web.schedule()
        return self._web.render(
            visitor,
            "overview.html",
            verdicts=[billed(unbilled, health), in_sync(drift, runs.last_real(), now), works(health)],
            down=down(health),
            health=health,
            runs=self._queries.run_lines(_LATEST_RUNS, now)[:_LATEST_RUNS],
            last_success=moment(runs.status()["last_success"]),
            schedule=schedule,
            next_run=moment(schedule.get("next_run")),
            upcoming=self._queries.config().schedule.upcoming(now),
            sources=self._queries.source_names(),
            allowances=[(name, entry.label) for name, entry in TABLE.items() if entry.label],
            config=self._queries.config(),
        )
