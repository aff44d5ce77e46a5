"""The HTTP API: the books for programs, and what can be asked of the delivery.

The handlers are plain functions, so they run in threads: reading the books must not hold up the delivery,
on whose event loop the API is served.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.security import HTTPBearer
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

from openmeter_plugin import __version__
from openmeter_plugin.api.health import HealthMonitor
from openmeter_plugin.api.metrics import Metrics
from openmeter_plugin.api.problems import CONTENT_TYPE, Problem, add_problem_handlers
from openmeter_plugin.books import ledger, status
from openmeter_plugin.books.models import DeadLetters, Ledger, RedeliveryStatus, SpoolStatus
from openmeter_plugin.books.replay import replay_dead_letters, request_redelivery
from openmeter_plugin.defaults import LARGEST_ID

_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": what, "content": {CONTENT_TYPE: {}}}
    for code, what in ((401, "The token is missing or wrong"), (503, "The books cannot be used"))
}


class RedeliverRequest(BaseModel):
    """A span of event time, `from` included and `to` not."""

    model_config = ConfigDict(extra="forbid")

    since: Annotated[AwareDatetime, Field(alias="from")]
    until: Annotated[AwareDatetime, Field(alias="to")]
    subject: str | None = None

    @model_validator(mode="after")
    def _is_a_span(self) -> Self:
        if self.since >= self.until:
            raise ValueError("from must be before to")
        return self


class ReplayRequest(BaseModel):
    """Which dead letters to send again: some by their ids, or all."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[Annotated[int, Field(le=LARGEST_ID)]], Field(max_length=50_000)] = []
    all: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if bool(self.ids) == bool(self.all):
            raise ValueError("give either ids or all: true")
        return self


class ReplayAccepted(BaseModel):
    """How many dead letters will be sent again."""

    marked: int


class Health(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """Whether the process can do its work, and what keeps it from it."""

    ready: bool
    problems: list[str]


def create_app(watch: HealthMonitor) -> FastAPI:
    """Return the API over a delivery; `access.Gate` stands before it."""
    app = FastAPI(
        title="openmeter-plugin",
        version=__version__,
        description="The books of a spool, and sending again what the metering API may have lost.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    add_problem_handlers(app)
    # Checked before, by the gate; here so that the description says so.
    private = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))], responses=_ERRORS)
    _offer_books(private, watch)
    _offer_sending_again(private, watch)
    app.include_router(private)
    _offer_probes(app, watch)
    return app


def _offer_books(router: APIRouter, watch: HealthMonitor) -> None:
    metrics = Metrics(watch)

    @router.get("/v1/spool")
    def spool() -> SpoolStatus:
        """Tell how the spool is: what `openmeter-plugin spool status --json` prints."""
        return status.read_status(watch.spool)

    @router.get("/v1/ledger")
    def read_ledger(
        since: Annotated[datetime | None, Query(alias="from", description="the hour it lies in")] = None,
        until: Annotated[datetime | None, Query(alias="to", description="up to here, whole hours")] = None,
        subject: str | None = None,
        after: Annotated[str | None, Query(description="`next` of the page before")] = None,
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
                watch.spool,
                ledger.hour_of(since) if since else ledger.FIRST_HOUR,
                ledger.hour_of(until, up=True) if until else ledger.LAST_HOUR,
                subject,
                after=after,
                limit=limit,
            )
        except (ValueError, OverflowError) as error:
            raise HTTPException(422, str(error)) from None

    @router.get("/v1/dead-letters")
    def read_dead_letters(
        after: Annotated[int, Query(ge=0, le=LARGEST_ID, description="`next` of the page before")] = 0,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    ) -> DeadLetters:
        """Return the events that the metering API will not take, oldest first."""
        return ledger.read_dead_letters(watch.spool, after=after, limit=limit)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def read_metrics(request: Request) -> Response:
        """Return the metrics for Prometheus."""
        content, content_type = metrics.scrape(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})


def _offer_sending_again(router: APIRouter, watch: HealthMonitor) -> None:
    @router.post("/v1/redeliver", status_code=202)
    def redeliver(wanted: RedeliverRequest, response: Response) -> RedeliveryStatus:
        """Have retained events of a span of event time sent again; the metering API counts each once."""
        try:
            number = request_redelivery(watch.spool, wanted.since, wanted.until, wanted.subject)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        response.headers["location"] = f"/v1/redeliver/{number}"
        return _redelivery(watch, number)

    @router.get("/v1/redeliver/{number}")
    def redelivery(number: Annotated[int, PathParameter(le=LARGEST_ID)]) -> RedeliveryStatus:
        """Tell how far a redelivery is."""
        return _redelivery(watch, number)

    @router.post("/v1/dead-letters/replay", status_code=202)
    def replay(wanted: ReplayRequest) -> ReplayAccepted:
        """Have dead letters sent again; what is refused again stays one."""
        return ReplayAccepted(marked=replay_dead_letters(watch.spool, wanted.ids or None))


def _redelivery(watch: HealthMonitor, number: int) -> RedeliveryStatus:
    found = ledger.read_redelivery(watch.spool, number)
    if found is None:
        raise HTTPException(404, "there is no redelivery with this id")
    return found


def _offer_probes(app: FastAPI, watch: HealthMonitor) -> None:
    @app.get("/healthz")
    async def healthz() -> Health:
        """Tell that the process lives and its event loop turns."""
        return Health()

    @app.get("/readyz", responses={503: {"model": Readiness}})
    def readyz(response: Response) -> Readiness:
        """Tell whether the lock is held, the books can be used, and the processes give signs of life."""
        problems = watch.problems()
        response.status_code = 503 if problems else 200
        return Readiness(ready=not problems, problems=problems)
