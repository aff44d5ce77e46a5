"""The daemon's HTTP API: request runs, follow them, and read status, plan and metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, status
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from openmeter_plugin.process.api_page import HEADERS, api_page
from syncd import __version__
from syncd.config.settings import Config
from syncd.core.errors import QueueFullError, StateError
from syncd.daemon.access import AccessMiddleware
from syncd.daemon.leadership import Leadership
from syncd.daemon.metrics import CONTENT_TYPE, Metrics
from syncd.dashboard.app import create_dashboard
from syncd.dashboard.session import IDLE, LoginLimit
from syncd.runs.history import History
from syncd.runs.options import TABLE, RunOptions, is_flag
from syncd.runs.queue import RunQueue, reviewed_in
from syncd.runs.run import RunState
from syncd.state.database import State
from syncd.usage.report import Reports

_Text = Annotated[str, Field(min_length=1)]


_SCHEME = (
    "The value of daemon.token: Authorization: Bearer <token>. Without a token only this machine can use the"
    " API."
)
_REFUSALS = {
    401: "The token is missing or wrong",
    403: "The request comes from a web page of another origin",
    404: "There is none",
    409: "The reviewed dry run has failed, or the daemon has forgotten it",
    411: "The body has no length",
    413: "The body is longer than 1 MiB",
    421: "The host name is none of this machine, and no token is set",
    422: "The body is invalid",
    429: "Too many wrong tokens, or too many runs are queued",
}


class Refusal(BaseModel):
    """Why a request was refused, and what to do."""

    detail: str


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"description": _REFUSALS[code], "model": Refusal} for code in codes}


class _SyncRequest(BaseModel):
    """The body of POST /v1/syncs. A run restricted by `source` or `principal` removes nothing.

    `reviewed` is the id of a dry run: the new run applies exactly that plan or fails. Only `force` may be
    given with it; all other options come from the dry run.
    """

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False
    reviewed: _Text | None = None

    @model_validator(mode="after")
    def _check_reviewed(self) -> Self:
        given = {name for name in self.model_fields_set if name not in TABLE or TABLE[name].reviewed}
        if self.reviewed is not None and given - {"reviewed"}:
            raise ValueError("with reviewed only force may be given: all other options come from the dry run")
        return self

    def options(self) -> RunOptions:
        """Return the options of the requested run."""
        return RunOptions(self.dry_run, **{name: getattr(self, name) for name in TABLE})


if TYPE_CHECKING:
    SyncRequest = _SyncRequest
else:
    _FIELDS = {name: (bool, False) if is_flag(name) else (_Text | None, None) for name in TABLE}
    SyncRequest = create_model("SyncRequest", __base__=_SyncRequest, __doc__=_SyncRequest.__doc__, **_FIELDS)


@dataclass(frozen=True, slots=True)
class Daemon:
    """What the API and the dashboard read; `config`, `token` and `schedule` are called for each request."""

    runs: RunQueue
    history: History
    metrics: Metrics
    config: Callable[[], Config]
    token: Callable[[], str | None]
    schedule: Callable[[], dict[str, object]]
    leadership: Leadership
    state: State
    reports: Reports
    session_idle: float = IDLE
    """Seconds without a request after which a session of the dashboard ends."""


def create_app(daemon: Daemon) -> FastAPI:
    """Return API and dashboard; with a token, all but the health probes and the login needs it."""
    app = FastAPI(
        title="kong-openmeter syncd",
        version=__version__,
        description="Runs of the daemon: request one, follow it, and read status, plan and metrics.",
        docs_url=None,  # FastAPI's pages load third-party scripts, which would run on the dashboard's origin
        redoc_url=None,
    )

    @app.exception_handler(StateError)
    def without_state(_request: Request, error: StateError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503)

    limit = LoginLimit()
    app.add_middleware(
        AccessMiddleware,
        token=daemon.token,
        public_url=lambda: daemon.config().daemon.public_url,
        limit=limit,
    )
    app.include_router(_health(daemon))

    @app.get("/docs", include_in_schema=False)
    def reference() -> HTMLResponse:
        return HTMLResponse(api_page(app.openapi()), headers=HEADERS)

    # AccessMiddleware checks the token; this is for the OpenAPI document.
    scheme = HTTPBearer(auto_error=False, description=_SCHEME)
    app.include_router(_v1(daemon), dependencies=[Depends(scheme)], responses=_refusals(401, 421, 429))
    if daemon.config().daemon.dashboard:
        _mount_dashboard(app, daemon, limit)
    return app


def _mount_dashboard(app: FastAPI, daemon: Daemon, limit: LoginLimit) -> None:
    def to_dashboard() -> RedirectResponse:
        return RedirectResponse("/dashboard/")

    for path in ("/", "/dashboard"):
        app.get(path, include_in_schema=False)(to_dashboard)
    app.mount(
        "/dashboard",
        create_dashboard(
            daemon.runs,
            daemon.history,
            daemon.config,
            daemon.token,
            daemon.schedule,
            limit,
            daemon.session_idle,
            daemon.state,
            daemon.reports,
        ),
    )


def _health(daemon: Daemon) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", summary="Liveness")
    def healthz() -> dict[str, str]:
        """Answer 200 while the process serves requests."""
        return {"status": "ok"}

    @router.get(
        "/readyz",
        summary="Readiness",
        responses={503: {"description": "No run has ended yet, or the last one failed"}},
    )
    def readyz() -> JSONResponse:
        """Answer 200 if the last real run did not fail, 503 if it did or if none has ended yet."""
        last = _last_state(daemon)
        if last is None:
            return JSONResponse({"status": "no run has finished yet"}, 503)
        if last is RunState.FAILED:
            return JSONResponse({"status": "the last run failed; see /v1/status"}, 503)
        return JSONResponse({"status": "ok"})

    return router


def _last_state(daemon: Daemon) -> RunState | None:
    """Return how the last real run ended; a daemon that does not lead finds it in the history."""
    if (run := daemon.runs.last_real()) is not None and daemon.leadership.leads():
        return run.state
    if daemon.leadership.requests is None:
        return None
    recorded = daemon.leadership.last_recorded()
    return RunState(recorded["state"]) if recorded else None


def _requested_options(request: SyncRequest, daemon: Daemon) -> RunOptions:
    """Return the options of the requested run; raises HTTPException if `reviewed` cannot be applied."""
    if request.reviewed is None:
        return request.options()
    force = request.options().force
    if daemon.leadership.requests is not None:  # the leader did it, so that only the history has its plan
        recorded = reviewed_in(daemon.history, request.reviewed)
        if recorded is not None:
            return replace(recorded, force=force)
    dry_run = daemon.runs.get(request.reviewed)
    if (
        dry_run is None
        or dry_run.plan is None
        or not dry_run.dry_run
        or dry_run.state is not RunState.SUCCEEDED
    ):
        detail = "reviewed is not a successful dry run, or the daemon has forgotten it. Request a new one"
        raise HTTPException(status.HTTP_409_CONFLICT, detail)
    return replace(dry_run.options, dry_run=False, force=force, reviewed=dry_run.plan)


def _v1(daemon: Daemon) -> APIRouter:
    router = APIRouter()
    runs = daemon.runs

    @router.get(
        "/metrics",
        tags=["health"],
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        leads = daemon.leadership.leads()
        return Response(daemon.metrics.exposition(leads=leads), media_type=CONTENT_TYPE)

    @router.get("/v1/status", summary="Status")
    def daemon_status() -> dict[str, object]:
        """Return the current run, the last run, and when the next one is due."""
        recorded = {} if daemon.leadership.leads() else daemon.leadership.recorded_status()
        return {**runs.status(), **daemon.schedule(), **recorded, "version": __version__}

    @router.get("/v1/plan", summary="Latest plan", responses=_refusals(404))
    def plan() -> JSONResponse:
        """Return the latest plan of any run; request a dry run for a fresh one."""
        run = runs.last_planned()
        if daemon.leadership.leads() and run is not None and run.plan is not None:
            return JSONResponse({"run": run.summary(), "plan": run.plan.to_json()})
        if (recorded := daemon.leadership.last_planned()) is not None:
            return JSONResponse({"run": recorded, "plan": recorded.pop("plan")})
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no run has made a plan yet")

    @router.post(
        "/v1/syncs",
        status_code=status.HTTP_202_ACCEPTED,
        summary="Request a run",
        responses={202: {"description": "The run is queued"}, **_refusals(403, 409, 411, 413, 422)},
    )
    def request_sync(request: SyncRequest | None = None) -> JSONResponse:
        """Queue a run. While a run is queued, further requests with the same options return that one."""
        options = _requested_options(request or SyncRequest(), daemon)
        try:
            run = runs.request("manual", options)
        except QueueFullError as error:
            raise HTTPException(status.HTTP_429_TOO_MANY_REQUESTS, str(error)) from None
        return JSONResponse(run.summary(), 202, {"Location": f"/v1/syncs/{run.id}"})

    @router.get("/v1/syncs/{run_id}", summary="One run", responses=_refusals(404))
    def sync(run_id: str) -> JSONResponse:
        """Return one run with its plan and outcomes; older runs are read from the history."""
        run = runs.get(run_id)
        document = run.to_json() if run else daemon.history.run(run_id)
        if document is None:
            raise HTTPException(status.HTTP_404_NOT_FOUND, "no such run, or deleted (daemon.keep_runs)")
        return JSONResponse(document)

    return router
