"""Assembles the sandbox: the database, the routes and the middleware around them."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from syncd import __version__
from syncd.sandbox.api import control, customers, events, meters, subjects, v3
from syncd.sandbox.faults import Faults
from syncd.sandbox.middleware import SandboxMiddleware
from syncd.sandbox.problems import ProblemError, bad_schema
from syncd.sandbox.settings import Settings
from syncd.sandbox.store import meters as meter_store
from syncd.sandbox.store.database import Database

TITLE = "kong-openmeter sandbox (a development tool, not OpenMeter)"


def create_app(settings: Settings) -> SandboxMiddleware:
    """Open the database and build the application, which closes the database when its server stops.

    Raises sqlite3.Error if the file is not a database of this sandbox.
    """
    database = Database(settings.db)
    if database.is_new:
        with database.writing() as connection:
            meter_store.create_standard_meters(connection)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        database.close()

    app = FastAPI(title=TITLE, version=__version__, lifespan=lifespan, redirect_slashes=False)
    app.state.database = database
    app.state.settings = settings
    app.state.faults = Faults()
    app.state.requests = Counter[str]()
    app.state.rejected = Counter[str]()
    for module in (events, customers, meters, v3, control, *([subjects] if settings.subjects else [])):
        app.include_router(module.router)
    app.add_exception_handler(ProblemError, _answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(HTTPException, _answer_http_error)
    return SandboxMiddleware(app, app.state.faults, app.state.requests, settings.token)


async def _answer_problem(_request: Request, error: Exception) -> Response:
    if not isinstance(error, ProblemError):
        raise error
    return error.response()


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    # Unknown paths and methods: OpenMeter sends no detail for these.
    if not isinstance(error, HTTPException):
        raise error
    return ProblemError(error.status_code, "", headers=error.headers).response()


async def _answer_invalid_request(_request: Request, error: Exception) -> Response:
    # FastAPI would answer 422; OpenMeter's validator answers 400 and names the first error.
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    place, *rest = (str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    if place == "body":
        return bad_schema("/" + "/".join(rest), reason).response()
    detail = f'parameter "{".".join(rest)}" in {place} has an error: {reason}'
    return ProblemError(HTTPStatus.BAD_REQUEST, detail).response()
