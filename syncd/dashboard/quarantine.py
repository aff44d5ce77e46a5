"""The pages of the quarantine: requests whose payer is unknown so far, by cause, with what to do."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from syncd.dashboard.pages import integer
from syncd.dashboard.queries import Queries
from syncd.dashboard.web import Visitor, Web
from syncd.gateways.models import QuarantinedRequest

_PER_PAGE: Final = 50


@dataclass(frozen=True, slots=True)
class Cause:
    """Why requests are in quarantine, in words, and the cure."""

    heading: str
    cure: str


_CAUSES: Final = {
    "no_consumer": Cause(
        "No consumer was authenticated",
        "Add an authentication plugin to the route, or bill such requests to one subject"
        " (subject.missing: fallback).",
    ),
    "anonymous_consumer": Cause(
        "The consumer is the anonymous one of an authentication plugin",
        "Decide who pays for such requests, or leave them out with filters.",
    ),
    "consumer_without_field": Cause(
        "The consumer lacks what its subject is made of",
        "Give the consumers in Kong the field that subject.field names, or name another.",
    ),
    "ambiguous_customer_tag": Cause(
        "The consumer has several customer tags", "Leave each consumer one tag customer:<key>."
    ),
    "consumer_required": Cause(
        "A subject of a header or query argument came without an authenticated consumer",
        "Add an authentication plugin to the route.",
    ),
    "no_application": Cause(
        "The request belongs to no application",
        "Register the client in the Dev Portal, or take the subject from elsewhere (subject).",
    ),
    "no_header": Cause(
        "The header with the subject was missing",
        "Have clients send it, or take the subject from elsewhere (subject). Headers are not kept, so a"
        " replay needs another source.",
    ),
    "no_query_argument": Cause(
        "The query argument with the subject was missing",
        "Have clients send it, or take the subject from elsewhere (subject). Arguments are not kept, so a"
        " replay needs another source.",
    ),
}
_INVALID: Final = "The plugin's configuration is invalid"
_INVALID_CURE: Final = "Fix the setting in Kong. The requests are kept until they are replayed."


def cause_of(reason: str) -> Cause:
    """Return the cause for a reason of the plugin: a known one, or a fault of the configuration."""
    return _CAUSES.get(reason) or Cause(f"{_INVALID}: {reason}", _INVALID_CURE)


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request in quarantine, as far as a person recognizes it."""

    id: int
    at: datetime | None
    consumer: str
    route: str
    service: str
    status: str
    document: str


def request_view(request: QuarantinedRequest) -> RequestView:
    """Return the view of a request."""
    log = request.log
    return RequestView(
        request.id,
        _started(log.get("started_at")),
        _first(log, ("consumer", "username"), ("consumer", "custom_id"), ("consumer", "id")),
        _first(log, ("route", "name"), ("route", "id")),
        _first(log, ("service", "name"), ("service", "id")),
        _first(log, ("response", "status")),
        _document(request),
    )


def _document(request: QuarantinedRequest) -> str:
    kept = {"log": request.log, "application": request.application, "attributes": request.attributes}
    shown = {name: value for name, value in kept.items() if value}
    return orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode()


def _first(log: dict[str, Any], *places: tuple[str, str]) -> str:
    for table, name in places:
        entry = log.get(table)
        value = entry.get(name) if isinstance(entry, dict) else None
        if value not in (None, ""):
            return str(value)
    return ""


def _started(milliseconds: object) -> datetime | None:
    if not isinstance(milliseconds, int | float):
        return None
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return None


class QuarantinePages:
    """Renders the pages."""

    def __init__(self, web: Web, queries: Queries) -> None:
        self._web = web
        self._queries = queries

    def show(self, _request: Request, visitor: Visitor) -> Response:
        """Show the quarantine of all gateways by cause."""
        gateways = self._queries.of_gateways("quarantine", lambda api: api.quarantine_groups())
        return self._web.render(visitor, "quarantine.html", gateways=gateways, cause_of=cause_of)

    def of_gateway(self, request: Request, visitor: Visitor) -> Response:
        """Show the requests in the quarantine of one gateway for one reason."""
        name, after = request.path_params["name"], integer(request.query_params.get("after"), 0)
        reason = request.query_params.get("reason", "")[:2000]
        answer = self._queries.of_gateway(
            name, f"quarantine {reason} {after}", lambda api: api.quarantine(reason, after, _PER_PAGE)
        )
        if answer is None:
            return self._web.no_such_gateway()
        return self._web.render(
            visitor,
            "quarantine_list.html",
            name=name,
            reason=reason,
            cause=cause_of(reason),
            after=after,
            answer=answer,
            rows=[request_view(one) for one in answer.value.requests] if answer.value else [],
        )
