"""The daemon's HTTP API: ask for a run, look at it, see how the daemon is."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, status
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from syncd import __version__
from syncd.runs import Runs


class SyncRequest(BaseModel):
    """The body of POST /v1/syncs."""

    model_config = ConfigDict(extra="forbid")

    dry_run: bool = False


def create_app(runs: Runs, *, token: str | None, next_run: Callable[[], str | None]) -> FastAPI:
    """Return the API over these runs; with a token, all but /healthz needs it as a bearer token."""
    app = FastAPI(title="kong-openmeter syncd", version=__version__)

    def authorized(authorization: Annotated[str, Header()] = "") -> None:
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

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """Tell that the daemon lives."""
        return {"status": "ok"}

    @app.get("/v1/status", dependencies=[Depends(authorized)])
    def daemon_status() -> dict[str, object]:
        """Tell what is going on, how the last run ended, and when the next one is due."""
        return {**runs.status(), "next_run": next_run(), "version": __version__}

    @app.post("/v1/syncs", status_code=status.HTTP_202_ACCEPTED, dependencies=[Depends(authorized)])
    def request_sync(request: SyncRequest | None = None) -> JSONResponse:
        """Ask for a run; while one is going, one more waits, and serves all who ask meanwhile."""
        run = runs.request("manual", dry_run=request.dry_run if request else False)
        return JSONResponse(run.summary(), 202, {"Location": f"/v1/syncs/{run.id}"})

    @app.get("/v1/syncs/{run_id}", dependencies=[Depends(authorized)])
    def sync(run_id: str) -> JSONResponse:
        """Return one run with its plan and outcomes."""
        run = runs.get(run_id)
        if run is None:
            raise HTTPException(status.HTTP_404_NOT_FOUND, "no such run, or forgotten: the last 50 are kept")
        return JSONResponse(run.to_json())

    return app
