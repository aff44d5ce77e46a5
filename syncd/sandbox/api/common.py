"""Helpers shared by the routes: dependencies, JSON answers, and times in query strings."""

import re
from collections import Counter
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from pydantic import AfterValidator
from starlette.responses import Response

from syncd.sandbox.faults import Faults
from syncd.sandbox.problems import bad_parameter, no_such_entity
from syncd.sandbox.settings import Settings
from syncd.sandbox.store.database import Database
from syncd.sandbox.values import epoch_seconds, parse_time

_FILTER = re.compile(r"filter\[(\w+)\](?:\[(\w+)\])?")
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


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


PLACEHOLDER = "\ue000"
"""Stands for an encoded slash in a path until the path is matched; see middleware.py."""


def _with_slashes(text: str) -> str:
    return text.replace(PLACEHOLDER, "/")


def is_ulid(text: str) -> bool:
    """Return whether a text has the form of an id."""
    return _ULID.fullmatch(text) is not None


def _a_ulid(text: str) -> str:
    if not is_ulid(text):
        raise no_such_entity()
    return text


IdOrKey = Annotated[str, AfterValidator(_with_slashes)]
"""A part of a path that may hold encoded slashes."""

Ulid = Annotated[str, AfterValidator(_a_ulid)]
"""An id in a path of v3, whose router answers 404 to anything else."""


def v3_filters(request: Request, known: set[str]) -> dict[tuple[str, str], str]:
    """Return the filters of a query string by field and operator; the default operator is `eq`."""
    found: dict[tuple[str, str], str] = {}
    for name, value in request.query_params.multi_items():
        match = _FILTER.fullmatch(name)
        if match is None:
            continue
        field, operator = match[1], match[2] or "eq"
        if field not in known:
            raise bad_parameter("filter", f"unknown filter field(s): {field}", rule="format", source="query")
        if operator not in ("eq", "oeq", "contains", "gte", "lt"):
            raise bad_parameter(
                "filter", f"filter[{field}][{operator}]: unsupported operator", rule="format", source="query"
            )
        found[field, operator] = value
    return found


def answer(document: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(orjson.dumps(document), status, media_type="application/json")


def no_content() -> Response:
    """Answer 204."""
    return Response(status_code=204)
