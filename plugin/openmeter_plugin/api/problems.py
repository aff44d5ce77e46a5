"""Errors as application/problem+json (RFC 9457), each with a sentence for people."""

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
    """What went wrong."""

    title: str
    status: int
    detail: str


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error's answer."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return Response(orjson.dumps(body.model_dump()), status, dict(headers or {}), CONTENT_TYPE)


def add_problem_handlers(app: FastAPI) -> None:
    """Have the app answer errors as problems."""

    @app.exception_handler(StarletteHTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, _sentence(error))

    @app.exception_handler(SpoolError)
    async def unreadable(_: Request, error: SpoolError) -> Response:
        return problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    @app.exception_handler(sqlite3.Error)
    async def unwritable(_: Request, error: sqlite3.Error) -> Response:
        return problem(HTTPStatus.SERVICE_UNAVAILABLE, f"the books cannot be used: {error}")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        detail = f"{type(error).__name__} in the API; the delivery goes on"
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail)


def _sentence(error: RequestValidationError) -> str:
    """Return places and reasons, without what was sent."""
    return "; ".join(_one(found["loc"][1:], found["msg"]) for found in error.errors())


def _one(location: Sequence[str | int], message: str) -> str:
    place, reason = ".".join(map(str, location)), message.removeprefix("Value error, ")
    return f"{place}: {reason}" if place else reason
