"""The HTTP API: books, dead letters, quarantine, metrics, replay, redelivery, health probes, and its server.

The handlers are plain functions, so they run in threads: the API shares the event loop of the delivery
process, and reading the books must not block it.
"""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from openmeter_plugin import __version__
from openmeter_plugin.api.access import Access, AccessMiddleware
from openmeter_plugin.api.gate import GateClient, add_gate_routes
from openmeter_plugin.api.health import HealthMonitor
from openmeter_plugin.api.metrics import Metrics
from openmeter_plugin.api.problems import CONTENT_TYPE, Problem, add_problem_handlers
from openmeter_plugin.books import ledger, quarantine, refusals, status
from openmeter_plugin.books.database import MAX_ROW_ID
from openmeter_plugin.books.models import (
    DeadLetter,
    DeadLetterGroups,
    DeadLetters,
    Ledger,
    Quarantine,
    QuarantineGroups,
    RedeliveryStatus,
    Replays,
    ReplayStatus,
    SpoolStatus,
)
from openmeter_plugin.books.read_models import timestamp
from openmeter_plugin.books.replay import Selection, request_redelivery, start_replay
from openmeter_plugin.log import get_logger
from openmeter_plugin.process.api_page import HEADERS, api_page
from openmeter_plugin.process.web_server import EmbeddedServer, forward_log, limited_protocol

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": what, "content": {CONTENT_TYPE: {}}}
    for code, what in (
        (401, "The token is missing or wrong"),
        (421, "The host name is none of this machine"),
        (422, "A parameter or the body is invalid"),
        (503, "The books are unavailable"),
    )
}


_T = TypeVar("_T")
_NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "There is none with this id", "content": {CONTENT_TYPE: {}}}
}
_SCHEME = "The content of --api-token-file or OPENMETER_PLUGIN_ADMIN_TOKEN: Authorization: Bearer <token>."


class RedeliverRequest(BaseModel):
    """A span of event time, from `from` (inclusive) to `to` (exclusive)."""

    model_config = ConfigDict(extra="forbid")

    since: Annotated[AwareDatetime, Field(alias="from")]
    until: Annotated[AwareDatetime, Field(alias="to")]
    subject: str | None = None

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.since >= self.until:
            raise ValueError("from must be before to")
        return self


class ReplayRequest(BaseModel):
    """Which dead letters to replay: some by id, those of a group, or all; none with an id after `up_to`."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[Annotated[int, Field(le=MAX_ROW_ID)]], Field(max_length=50_000)] = []
    group: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    all: Literal[True] | None = None
    up_to: Annotated[int, Field(ge=0, le=MAX_ROW_ID)] = MAX_ROW_ID

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if (bool(self.ids), self.group is not None, self.all is not None).count(True) != 1:
            raise ValueError("give exactly one of ids, group and all: true")
        return self


class Health(BaseModel):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether the process is ready, and the problems if it is not."""

    ready: bool
    problems: list[str]


def create_app(monitor: HealthMonitor) -> FastAPI:
    """Return the API; `AccessMiddleware` checks every request before it."""
    app = FastAPI(
        title="openmeter-plugin",
        version=__version__,
        description="The books of a spool; replay of dead letters and redelivery of delivered events.",
        docs_url=None,  # its page loads scripts from a CDN
        redoc_url=None,
    )
    add_problem_handlers(app)
    # AccessMiddleware checks the token; this is for the OpenAPI document.
    scheme = HTTPBearer(auto_error=False, description=_SCHEME)
    private = APIRouter(dependencies=[Depends(scheme)], responses=_ERRORS)
    _add_books_routes(private, monitor)
    _add_dead_letter_routes(private, monitor)
    _add_replay_routes(private, monitor)
    add_gate_routes(private, GateClient(monitor.gate) if monitor.gate is not None else None)
    app.include_router(private)
    _add_probe_routes(app, monitor)

    @app.get("/docs", include_in_schema=False)
    def reference() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()), headers=HEADERS)

    return app


def _add_books_routes(router: APIRouter, monitor: HealthMonitor) -> None:
    metrics = Metrics(monitor)

    @router.get("/v1/spool")
    def spool() -> SpoolStatus:
        """Return the spool's status, as `openmeter-plugin spool status --output json` prints it."""
        return status.read_status(monitor.spool)

    @router.get("/v1/ledger")
    def read_ledger(
        since: Annotated[datetime | None, Query(alias="from", description="rounded down to the hour")] = None,
        until: Annotated[
            datetime | None, Query(alias="to", description="exclusive, rounded up to the hour")
        ] = None,
        subject: str | None = None,
        after: Annotated[str | None, Query(description="`next` of the previous page")] = None,
        limit: Annotated[int, Query(ge=1, le=50_000)] = 10_000,
    ) -> Ledger:
        """Return accepted, delivered and dead-lettered events by destination, hour, type and subject."""
        for name, moment in (("from", since), ("to", until)):
            if moment is not None and moment.tzinfo is None:
                raise HTTPException(422, f"{name}: needs a time zone, as in 2026-11-22T07:00:00Z")
        if since is not None and until is not None and since > until:
            raise HTTPException(422, "from must not be after to")
        try:
            return ledger.read_ledger(
                monitor.spool,
                ledger.hour_of(since) if since else ledger.FIRST_HOUR,
                ledger.hour_of(until, up=True) if until else ledger.LAST_HOUR,
                subject,
                after=after,
                limit=limit,
            )
        except (ValueError, OverflowError) as error:
            raise HTTPException(422, str(error)) from None

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def read_metrics(request: Request) -> Response:
        """Return the metrics for Prometheus."""
        content, content_type = metrics.scrape(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})


def _add_dead_letter_routes(router: APIRouter, monitor: HealthMonitor) -> None:
    @router.get("/v1/dead-letters")
    def read_dead_letters(
        after: Annotated[int, Query(ge=0, le=MAX_ROW_ID, description="`next` of the previous page")] = 0,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
        group: Annotated[str | None, Query(description="`id` of a group; only its dead letters")] = None,
    ) -> DeadLetters:
        """Return the dead letters, oldest first."""
        return refusals.read_dead_letters(monitor.spool, after=after, limit=limit, group=group)

    @router.get("/v1/dead-letters/groups")
    def read_groups() -> DeadLetterGroups:
        """Return the dead letters by the metering API's answer, the largest groups first."""
        return refusals.read_groups(monitor.spool)

    @router.get("/v1/dead-letters/{number}", responses=_NOT_FOUND)
    def read_dead_letter(number: Annotated[int, PathParameter(le=MAX_ROW_ID)]) -> DeadLetter:
        """Return a dead letter with its event."""
        return _found(refusals.read_dead_letter(monitor.spool, number), "dead letter")

    @router.get("/v1/quarantine")
    def read_quarantine(
        after: Annotated[int, Query(ge=0, le=MAX_ROW_ID, description="`next` of the previous page")] = 0,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
        reason: Annotated[str | None, Query(description="only requests with this reason")] = None,
    ) -> Quarantine:
        """Return the requests in quarantine, oldest first, without headers and query arguments."""
        return quarantine.read_quarantine(monitor.spool, after=after, limit=limit, reason=reason)

    @router.get("/v1/quarantine/groups")
    def read_quarantine_groups() -> QuarantineGroups:
        """Return the requests in quarantine by reason, the largest groups first."""
        return quarantine.read_groups(monitor.spool)


def _add_replay_routes(router: APIRouter, monitor: HealthMonitor) -> None:
    @router.post(
        "/v1/redeliver", status_code=202, responses={202: {"description": "The redelivery has begun"}}
    )
    def redeliver(body: RedeliverRequest, response: Response) -> RedeliveryStatus:
        """Redeliver retained events of a span of event time; the metering API deduplicates them."""
        try:
            number = request_redelivery(monitor.spool, body.since, body.until, body.subject)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        response.headers["location"] = f"/v1/redeliver/{number}"
        return _found(ledger.read_redelivery(monitor.spool, number), "redelivery")

    @router.get("/v1/redeliver/{number}", responses=_NOT_FOUND)
    def redelivery(number: Annotated[int, PathParameter(le=MAX_ROW_ID)]) -> RedeliveryStatus:
        """Return the progress of a redelivery."""
        return _found(ledger.read_redelivery(monitor.spool, number), "redelivery")

    @router.post(
        "/v1/dead-letters/replay", status_code=202, responses={202: {"description": "The replay has begun"}}
    )
    def replay(body: ReplayRequest, response: Response) -> ReplayStatus:
        """Replay dead letters; an event that is refused again stays a dead letter.

        What waits for a replay already is not marked again, so a repeated request sends nothing twice.
        """
        started = start_replay(monitor.spool, Selection(body.ids or None, body.group, body.up_to))
        if started.id is None:
            now = timestamp(time.time())
            return ReplayStatus(id=None, marked=0, delivered=0, refused=0, waiting=0, asked_at=now)
        response.headers["location"] = f"/v1/replays/{started.id}"
        return _found(refusals.read_replay(monitor.spool, started.id), "replay")

    @router.get("/v1/replays")
    def replays(limit: Annotated[int, Query(ge=1, le=1_000)] = 20) -> Replays:
        """Return the latest replays and what became of their dead letters, latest first."""
        return refusals.read_replays(monitor.spool, limit=limit)

    @router.get("/v1/replays/{number}", responses=_NOT_FOUND)
    def read_replay(number: Annotated[int, PathParameter(le=MAX_ROW_ID)]) -> ReplayStatus:
        """Return what became of a replay's dead letters."""
        return _found(refusals.read_replay(monitor.spool, number), "replay")


def _found(found: _T | None, what: str) -> _T:
    """Return what was found; answers 404 for None."""
    if found is None:
        raise HTTPException(404, f"there is no {what} with this id")
    return found


def _add_probe_routes(app: FastAPI, monitor: HealthMonitor) -> None:
    @app.get("/healthz")
    async def healthz() -> Health:
        """Return 200 if the process is alive and its event loop runs."""
        return Health()

    @app.get("/readyz", responses={503: {"model": Readiness}})
    def readyz(response: Response) -> Readiness:
        """Return whether this process holds the lock, the books are usable and all processes are alive."""
        problems = monitor.problems()
        response.status_code = 503 if problems else 200
        return Readiness(ready=not problems, problems=problems)


_MAX_CONNECTIONS: Final = 64
_ACCEPTED_AT_ONCE: Final = 16
"""asyncio accepts `backlog` connections in one turn, and closes one over the limit three turns later:
with 64 at once, a burst took 256 descriptors."""
_READ_TIMEOUT: Final = 10.0  # seconds for a request's head
_KEEP_ALIVE: Final = 30  # seconds
_RETRY_SECONDS: Final = 5.0


async def serve_api(listener: socket.socket, monitor: HealthMonitor, access: Access) -> None:
    """Serve until cancelled. After an exception it starts again, so that the delivery is not affected."""
    forward_log("api_server")
    while True:
        server = EmbeddedServer(
            AccessMiddleware(create_app(monitor), access),
            http=limited_protocol(_READ_TIMEOUT, _MAX_CONNECTIONS),
            interface="asgi3",
            backlog=_ACCEPTED_AT_ONCE,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        try:
            await server.serve([socket.socket(fileno=socket.dup(listener.fileno()))])
        except Exception:
            get_logger().exception("api_failed")
        await asyncio.sleep(_RETRY_SECONDS)
