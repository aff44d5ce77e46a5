"""Assembles the sandbox: the database, the routes and the middleware around them."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from syncd import __version__
from syncd.sandbox.api import control, customers, entitlements, events, meters, subjects, v3
from syncd.sandbox.faults import Faults
from syncd.sandbox.middleware import SandboxMiddleware
from syncd.sandbox.problems import ProblemError, bad_schema, konnect, malformed
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
    for module in (
        events,
        entitlements,
        customers,
        meters,
        v3,
        control,
        *([subjects] if settings.subjects else []),
    ):
        app.include_router(module.router)
    app.add_exception_handler(ProblemError, _answer_problem)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(HTTPException, _answer_http_error)
    return SandboxMiddleware(app, app.state.faults, app.state.requests, settings.token)


_V3 = "/api/v3/"
_UNKNOWN = {404: "The requested route was not found", 405: "The requested method is not allowed"}

# The names that v3's validator (kin-openapi) has for the rules that pydantic names.
_RULES = {
    "missing": ("required", 'property "{name}" is missing'),
    "extra_forbidden": ("properties", 'property "{name}" is unsupported'),
    "string_too_short": ("min_length", "minimum string length is {min_length}"),
    "string_too_long": ("max_length", "maximum string length is {max_length}"),
    "string_pattern_mismatch": ("pattern", "string doesn't match the regular expression"),
    "too_long": ("maxProperties", "there must be at most {max_length} properties"),
    "null": ("nullable", "Value is not nullable"),
    "literal_error": ("allOf", 'doesn\'t match all schemas from "allOf"'),
}


async def _answer_problem(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProblemError):
        raise error
    return (error.for_v3() if request.url.path.startswith(_V3) else error).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    # Unknown paths and methods: v1 sends no detail for these.
    if not isinstance(error, HTTPException):
        raise error
    if request.url.path.startswith(_V3):
        return konnect(error.status_code, _UNKNOWN.get(error.status_code, "")).response()
    return ProblemError(error.status_code, "", headers=error.headers).response()


async def _answer_invalid_request(request: Request, error: Exception) -> Response:
    # FastAPI would answer 422; OpenMeter's validator answers 400. v1 names the first error, v3 all of them.
    if not isinstance(error, RequestValidationError):
        raise error
    if request.url.path.startswith(_V3):
        return _v3_refusal([_v3_parameter(each) for each in error.errors()]).response()
    first = error.errors()[0]
    place, *rest = (str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    if place != "body":
        # A value that cannot be read gets as far as the handler, which gives its answer an instance.
        unreadable = first["type"].endswith("_parsing") or first["type"] == "value_error"
        detail = f'parameter "{".".join(rest)}" in {place} has an error: {reason}'
        return malformed(detail, has_instance=unreadable).response()
    return bad_schema("/" + "/".join(rest), reason).response()


def _v3_parameter(error: Mapping[str, Any]) -> dict[str, str]:
    place, *rest = (str(part) for part in error["loc"])
    given, context = error["type"], error.get("ctx", {})
    if place == "query":
        field = ".".join(rest).replace("[", ".").replace("]", "")
        if given.endswith("_parsing"):
            return {"field": field, "rule": "format", "reason": error["msg"], "source": "query"}
        return {"field": field.partition(".")[0], "reason": error["msg"], "source": "query"}
    if given == "json_invalid" or not rest:
        return {"field": "", "reason": f"request body has an error: {error['msg']}", "source": ""}
    rule, reason = _RULES.get(given, ("type", error["msg"]))
    if given == "extra_forbidden":
        field = ".".join(rest[:-1])
    else:
        # Parts of an address or a period are schemas of their own, of which only the whole is named.
        field = rest[0] if rest[0] in _PARTS else ".".join(rest)
    if rest[0] in _WHOLE or (rest[0] in _PARTS and len(rest) > 1):
        rule, reason = _RULES["literal_error"]
    return {"field": field, "rule": rule, "reason": reason.format(name=rest[-1], **context), "source": ""}


_PARTS = {"billing_address", "customer", "feature"}
_WHOLE = {"billing_address", "from", "to", "granularity", "aggregation"}


def _v3_refusal(parameters: list[dict[str, str]]) -> ProblemError:
    shown = [
        f"{each['field']} [{each['rule']}]: {each['reason']}"
        if "rule" in each
        else f"{each['field']}: {each['reason']}"
        for each in parameters
    ]
    return konnect(HTTPStatus.BAD_REQUEST, f"Bad Request: {', '.join(shown)}", invalid_parameters=parameters)
