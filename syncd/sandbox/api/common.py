"""Helpers shared by the routes: dependencies, JSON answers, and times in query strings."""

from collections import Counter
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from pydantic import AfterValidator
from starlette.responses import Response

from syncd.sandbox.faults import Faults
from syncd.sandbox.settings import Settings
from syncd.sandbox.store.database import Database
from syncd.sandbox.values import epoch_seconds, parse_time


def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _faults(request: Request) -> Faults:
    faults: Faults = request.app.state.faults
    return faults


def _requests(request: Request) -> Counter[str]:
    requests: Counter[str] = request.app.state.requests
    return requests


def _rejected(request: Request) -> Counter[str]:
    rejected: Counter[str] = request.app.state.rejected
    return rejected


def _checked(text: str) -> str:
    parse_time(text)
    return text


Db = Annotated[Database, Depends(_database)]
Options = Annotated[Settings, Depends(_settings)]
FaultsInForce = Annotated[Faults, Depends(_faults)]
RequestCounts = Annotated[Counter[str], Depends(_requests)]
RejectedCounts = Annotated[Counter[str], Depends(_rejected)]
Moment = Annotated[str, AfterValidator(_checked)]
"""An RFC 3339 timestamp, kept as it was written because the answers repeat it."""


def seconds(moment: Moment | None) -> int | None:
    """Return a validated timestamp in seconds since 1970."""
    return None if moment is None else epoch_seconds(parse_time(moment))


def answer(document: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(orjson.dumps(document), status, media_type="application/json")


def no_content() -> Response:
    """Answer 204."""
    return Response(status_code=204)
