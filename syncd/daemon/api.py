"""The daemon's HTTP API: ask for a run, look at it, see how the daemon is."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Self

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Response, status
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from syncd import __version__
from syncd.config.settings import Config
from syncd.core.errors import QueueFullError
from syncd.daemon.access import AccessMiddleware
from syncd.daemon.metrics import CONTENT_TYPE, Metrics
from syncd.dashboard.app import create_dashboard
from syncd.planning.scope import Scope
from syncd.runs.history import History
from syncd.runs.queue import RunQueue
from syncd.runs.reconciler import RunOptions
from syncd.runs.run import RunState


class SyncRequest(BaseModel):
    """The body of POST /v1/syncs; `source` and `principal` restrict the run, which then removes nothing.

    `reviewed` is the id of a dry run: what that one has planned is applied, or the run refuses. All but
    `force` then comes from there.
    """

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False
    source: Annotated[str, Field(min_length=1)] | None = None
    principal: Annotated[str, Field(min_length=1)] | None = None
    allow_empty: bool = False
    allow_move: bool = False
    allow_retire: bool = False
    adopt: bool = False
    force: bool = False
    reviewed: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.reviewed is not None and self.model_fields_set - {"reviewed", "force"}:
            raise ValueError("with reviewed only force may be given: the dry run has the rest")
        return self

    def options(self) -> RunOptions:
        """Return the request in syncd's words."""
        return RunOptions(
            dry_run=self.dry_run,
            force=self.force,
            allow_empty=self.allow_empty,
            allow_move=self.allow_move,
            allow_retire=self.allow_retire,
            adopt=self.adopt,
            scope=Scope(self.source, self.principal),
        )


@dataclass(frozen=True, slots=True)
class Daemon:
    """What API and dashboard show; `config`, `token` and `schedule` are asked for anew each time."""

    runs: RunQueue
    history: History
    metrics: Metrics
    config: Callable[[], Config]
    token: Callable[[], str | None]
    schedule: Callable[[], dict[str, object]]


def create_app(daemon: Daemon) -> FastAPI:
    """Return API and dashboard; with a token, the API (not /healthz, /readyz) needs it as a bearer token."""
    # Without FastAPI's own pages: they load scripts from elsewhere, which would run beside the dashboard.
    app = FastAPI(title="kong-openmeter syncd", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(
        AccessMiddleware,
        has_token=lambda: daemon.token() is not None,
        public_url=lambda: daemon.config().daemon.public_url,
    )

    def authorized(authorization: Annotated[str, Header()] = "") -> None:
        token = daemon.token()
        if token is None:
            return
        scheme, _, given = authorization.partition(" ")
        # Compared in constant time: the time of an answer must not tell how much of a guess was right.
        fits = hmac.compare_digest(given.strip().encode(), token.encode())
        if scheme.lower() != "bearer" or not fits:
            raise HTTPException(
                status.HTTP_401_UNAUTHORIZED,
                "send the token of daemon.token as Authorization: Bearer",
                {"WWW-Authenticate": "Bearer"},
            )

    app.include_router(_health(daemon))
    app.include_router(_v1(daemon), dependencies=[Depends(authorized)])
    if daemon.config().daemon.dashboard:
        _offer_dashboard(app, daemon)
    return app


def _offer_dashboard(app: FastAPI, daemon: Daemon) -> None:
    def to_dashboard() -> RedirectResponse:
        return RedirectResponse("/dashboard/")

    for path in ("/", "/dashboard"):
        app.get(path, include_in_schema=False)(to_dashboard)
    app.mount(
        "/dashboard",
        create_dashboard(daemon.runs, daemon.history, daemon.config, daemon.token, daemon.schedule),
    )


def _health(daemon: Daemon) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    def healthz() -> dict[str, str]:
        """Tell that the daemon lives."""
        return {"status": "ok"}

    @router.get("/readyz")
    def readyz() -> JSONResponse:
        """Tell whether the last real run went to its end; 503 before the first has, or after a failed one."""
        last = daemon.runs.last_real()
        if last is None:
            return JSONResponse({"status": "no run has ended yet"}, 503)
        if last.state is RunState.FAILED:
            return JSONResponse({"status": "the last run failed; see /v1/status"}, 503)
        return JSONResponse({"status": "ok"})

    return router


def _asked_for(request: SyncRequest, runs: RunQueue) -> RunOptions:
    """Return what is asked for; raises HTTPException where the dry run that it names cannot be applied."""
    if request.reviewed is None:
        return request.options()
    shown = runs.get(request.reviewed)
    if shown is None or shown.plan is None or not shown.dry_run or shown.state is not RunState.SUCCEEDED:
        said = "reviewed is no dry run that went to its end, or it is forgotten. Ask for a new one"
        raise HTTPException(status.HTTP_409_CONFLICT, said)
    return replace(shown.options, dry_run=False, force=request.force, reviewed=shown.plan)


def _v1(daemon: Daemon) -> APIRouter:
    router = APIRouter()
    runs = daemon.runs

    @router.get("/metrics", tags=["health"])
    def metrics() -> Response:
        """Return the metrics for Prometheus."""
        return Response(daemon.metrics.exposition(), media_type=CONTENT_TYPE)

    @router.get("/v1/status")
    def daemon_status() -> dict[str, object]:
        """Tell what is going on, how the last run ended, and when the next one is due."""
        return {**runs.status(), **daemon.schedule(), "version": __version__}

    @router.get("/v1/plan")
    def plan() -> JSONResponse:
        """Return the plan of the latest run that had one; ask for a dry run to have a fresh one."""
        run = runs.last_planned()
        if run is None or run.plan is None:
            raise HTTPException(status.HTTP_404_NOT_FOUND, "no run has made a plan yet")
        return JSONResponse({"run": run.summary(), "plan": run.plan.to_json()})

    @router.post("/v1/syncs", status_code=status.HTTP_202_ACCEPTED)
    def request_sync(request: SyncRequest | None = None) -> JSONResponse:
        """Ask for a run; while one is going, one more waits, and serves all who ask for the same."""
        options = _asked_for(request or SyncRequest(), runs)
        try:
            run = runs.request("manual", options)
        except QueueFullError as error:
            raise HTTPException(status.HTTP_429_TOO_MANY_REQUESTS, str(error)) from None
        return JSONResponse(run.summary(), 202, {"Location": f"/v1/syncs/{run.id}"})

    @router.get("/v1/syncs/{run_id}")
    def sync(run_id: str) -> JSONResponse:
        """Return one run with its plan and outcomes, from the history where it is an old one."""
        run = runs.get(run_id)
        document = run.to_json() if run else daemon.history.run(run_id)
        if document is None:
            raise HTTPException(status.HTTP_404_NOT_FOUND, "no such run, or forgotten (daemon.keep_runs)")
        return JSONResponse(document)

    return router
