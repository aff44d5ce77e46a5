"""What is shown: one function for each page, all of them read only."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from syncd.core.changes import ChangeKind
from syncd.core.model import ObservedCustomer
from syncd.core.ownership import is_managed, owner_of
from syncd.dashboard import customers, diffs, views
from syncd.dashboard.queries import Queries, RunDetail
from syncd.dashboard.text import moment
from syncd.dashboard.web import Visitor, Web

_RUNS: Final = 50
_LAST_RUNS: Final = 6
_CHANGES: Final = 100
_SUBJECTS: Final = 100


class Pages:
    """The pages over what `Queries` know."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    def overview(self, _request: Request, visitor: Visitor) -> Response:
        """Show how everything is."""
        now = datetime.now(UTC)
        drift, unbilled = self._queries.standing()
        status = self._queries.runs.status()
        schedule = self._web.schedule()
        return self._web.render(
            visitor,
            "overview.html",
            health=self._queries.health(),
            drift=drift,
            unbilled=unbilled,
            runs=self._queries.run_lines(_LAST_RUNS, now)[:_LAST_RUNS],
            last_success=moment(status["last_success"]),
            next_run=moment(schedule.get("next_run")),
            sources=self._queries.source_names(),
            config=self._queries.config(),
        )

    def runs(self, request: Request, visitor: Visitor) -> Response:
        """Show the runs, the latest first."""
        number = _number(request)
        found = self._queries.run_lines(_RUNS + 1, datetime.now(UTC), (number - 1) * _RUNS)
        return self._web.render(
            visitor, "runs.html", runs=found[:_RUNS], number=number, more=len(found) > _RUNS
        )

    def run(self, request: Request, visitor: Visitor) -> Response:
        """Show one run, its plan as a diff, and what became of it."""
        now = datetime.now(UTC)
        detail = self._queries.run(request.path_params["run_id"], now)
        if detail is None:
            return self._web.error(
                404, "No such run", "It is not known, or was forgotten (setting daemon.keep_runs)."
            )
        live = request.query_params.get("live") != "off"
        return self._web.render(
            visitor,
            "run.html",
            line=detail.line,
            plan=detail.plan,
            done=detail.done_so_far,
            offer=views.offer(detail.line, detail.plan),
            live=live,
            refresh=_refresh(detail, now) if live and not detail.line.is_finished else None,
            shown=_changes(detail, request),
        )

    def customers(self, request: Request, visitor: Visitor) -> Response:
        """Show customers with their subjects and what they used."""
        spans = customers.spans(datetime.now(UTC))
        span = next((s for s in spans if s.name == request.query_params.get("span")), spans[0])
        wanted = request.query_params.get("by")
        field = next((field for field in customers.FIELDS if field == wanted), customers.FIELDS[0])
        text = request.query_params.get("q", "").strip()[:200]
        number = _number(request)
        answer = self._queries.customers(field, text, number, span)
        page = answer.value
        more = bool(page and len(page.customers) == customers.PAGE_SIZE)
        pages = None
        if page and page.total is not None:
            pages = views.page_of(page.total, number, customers.PAGE_SIZE)
            more = number < pages.last
        owner_id = self._queries.config().owner_id
        return self._web.render(
            visitor,
            "customers.html",
            answer=answer,
            rows=[_row(customer, page, owner_id) for customer in page.customers] if page else [],
            pages=pages,
            number=number,
            more=more,
            spans=spans,
            span=span,
            field=field,
            fields=customers.FIELDS,
            text=text,
        )

    def unbilled(self, request: Request, visitor: Visitor) -> Response:
        """Show usage that nobody pays for, with the reason for each subject."""
        _, found = self._queries.standing()
        pages = views.page_of(len(found.subjects) if found else 0, _number(request), _SUBJECTS)
        shown = pages.cut(found.subjects) if found else ()
        return self._web.render(visitor, "unbilled.html", unbilled=found, subjects=shown, pages=pages)

    def gateways(self, _request: Request, visitor: Visitor) -> Response:
        """Show how each gateway's plugin is: its books and what waits."""
        return self._web.render(visitor, "gateways.html", gateways=self._queries.gateways())

    def dead_letters(self, request: Request, visitor: Visitor) -> Response:
        """Show the events of one gateway that the metering API will not take, with its answers."""
        name = request.path_params["name"]
        after = _whole(request.query_params.get("after"), 0)
        answer = self._queries.dead_letters(name, after)
        if answer is None:
            return self._web.error(404, "No such gateway", "No gateway of the configuration has this name.")
        return self._web.render(visitor, "dead_letters.html", name=name, after=after, answer=answer)


def _refresh(detail: RunDetail, now: datetime) -> int:
    """Return after how many seconds a page reads itself again: most runs are short."""
    asked = detail.line.requested_at or now
    return 1 if (now - asked).total_seconds() < 10 else 5


def _changes(detail: RunDetail, request: Request) -> dict[str, object]:
    """Return the wanted part of the plan: of one kind, or all, a page of it."""
    plan = detail.plan
    if plan is None:
        return {"kinds": [], "kind": None, "changes": [], "pages": views.page_of(0, 1, _CHANGES)}
    wanted = request.query_params.get("kind")
    kind = next((kind for kind in ChangeKind if kind == wanted), None)
    found = plan.of(kind) if kind else plan.changes
    pages = views.page_of(len(found), _number(request), _CHANGES)
    return {
        "kinds": diffs.kinds(plan),
        "kind": kind,
        "changes": diffs.change_views(pages.cut(found), detail.results),
        "pages": pages,
    }


def _row(customer: customers.Listed, page: customers.Page, owner_id: str) -> dict[str, object]:
    """Return a customer as a row: its subjects, those with usage but not attached (its id or key) too."""
    requests, tokens = page.requests.get(customer.id, {}), page.tokens.get(customer.id, {})
    keys = list(dict.fromkeys([*customer.subject_keys, *sorted(requests.keys() | tokens.keys())]))
    ours = is_managed(customer.metadata, owner_id)
    seen = ObservedCustomer(customer.id, customer.key, customer.name, (), customer.metadata)
    return {
        "customer": customer,
        "owner": "syncd" if ours else owner_of(seen),
        "ours": ours,
        "requests": sum(requests.values()),
        "tokens": sum(tokens.values()),
        "subjects": [
            (key, requests.get(key, 0), tokens.get(key, 0)) for key in keys[: customers.MOST_SUBJECTS]
        ],
        "count": len(keys),
    }


def _number(request: Request) -> int:
    """Return the page that is asked for."""
    return max(1, _whole(request.query_params.get("page"), 1))


def _whole(text: str | None, otherwise: int) -> int:
    if not text or not text.isascii() or not text.isdecimal() or len(text) > 18:
        return otherwise
    return int(text)
