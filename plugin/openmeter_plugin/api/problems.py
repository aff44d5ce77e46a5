"""Error responses as application/problem+json (RFC 9457), each with a human-readable sentence."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from http import HTTPStatus

import orjson
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from openmeter_plugin.books.read_models import SpoolError

CONTENT_TYPE = "application/problem+json"


class Problem(BaseModel):
    """An error response."""

    title: str
    status: int
    detail: str


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error response."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return Response(orjson.dumps(body.model_dump()), status, dict(headers or {}), CONTENT_TYPE)


def add_problem_handlers(app: FastAPI) -> None:
    """Register handlers that turn exceptions into problem documents."""

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, _describe(error))

    @app.exception_handler(SpoolError)
    async def unreadable(_: Request, error: SpoolError) -> Response:
        return problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    @app.exception_handler(sqlite3.Error)
    async def unwritable(_: Request, error: sqlite3.Error) -> Response:
        return problem(HTTPStatus.SERVICE_UNAVAILABLE, f"the books are unavailable: {error}")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        detail = f"internal error in the API ({type(error).__name__}); delivery continues"
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail)


def _describe(error: RequestValidationError) -> str:
    """Return the invalid fields and the reasons, without their values."""
    return "; ".join(_describe_field(found["loc"][1:], found["msg"]) for found in error.errors())


def _describe_field(location: Sequence[str | int], message: str) -> str:
    place, reason = ".".join(map(str, location)), message.removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
