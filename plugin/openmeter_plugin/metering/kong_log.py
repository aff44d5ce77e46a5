"""Kong's log of one request, decoded: what the billing rules read of it, each member of its type or None.

The log is what `kong.log.serialize` returns (recordings in tests/data/kong-wire). Any member may be missing,
and log plugins can replace any by a value of another type. Nearly every log decodes directly into `KongLog`;
in one that does not, a member of the wrong type is repaired or counts as missing. So the rules read types,
never JSON. What is not named here is skipped and never becomes a Python object: the log also holds API keys,
cookies and query strings.

What the log lacks, the plugin server can ask Kong for by PDK queries. Each costs the gateway a round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from openmeter_plugin.metering.lenient_json import (
    MAX_COUNT,
    MAX_TEXT,
    MAX_TIMESTAMP,
    count,
    encode_json,
    identifier,
    json_object,
    parse_log,
    text,
    usable_time,
)

_Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)] | None
_Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)] | None
NO_VALUE: Final = Raw(b"null")
"""The undecoded member that a log lacks."""

_Time = Annotated[int, Meta(ge=1, le=MAX_TIMESTAMP)] | None


class Request(Struct, gc=False):
    """The request. `headers` and `querystring` are undecoded, because few configurations read them."""

    id: _Text = None
    method: _Text = None
    size: _Count = None
    headers: Raw = NO_VALUE
    querystring: Raw = NO_VALUE


class Response(Struct, gc=False):
    """The response."""

    status: _Count = None
    size: _Count = None
    headers: Raw = NO_VALUE


class Latencies(Struct, gc=False):
    """Milliseconds; `proxy` is -1 if Kong itself answered: no upstream, no latency."""

    request: _Count = None
    proxy: int | None = None


class Entity(Struct, gc=False):
    """A route or a service."""

    id: _Text = None
    name: _Text = None


class Consumer(Struct, gc=False):
    """A consumer. Its texts may be longer than MAX_TEXT: an event cuts them, but a subject is never cut."""

    id: _Text = None
    username: _Text = None
    custom_id: _Text = None
    tags: Any = None


class KongLog(Struct, gc=False):
    """The log. Of `authenticated_entity` only its truth matters.

    `openmeter_gate` is the reason for which the gate stopped the request; it is set in Kong's access phase.
    """

    started_at: _Time = None
    request: Request | None = None
    response: Response | None = None
    latencies: Latencies | None = None
    route: Entity | None = None
    service: Entity | None = None
    consumer: Consumer | None = None
    authenticated_entity: Any = None
    source: _Text = None
    upstream_status: Any = None
    workspace_name: _Text = None
    ai: Raw = NO_VALUE
    openmeter_gate: Any = None


_decode: Final = msgspec.json.Decoder(KongLog).decode
_S = TypeVar("_S", bound=Struct)


def decode_log(raw: bytes) -> KongLog | None:
    """Return a serialized log, or None if it is not a JSON object. Never raises."""
    try:
        return _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return log_of(parse_log(raw))


def log_of(value: object) -> KongLog | None:
    """Return the log for a JSON value; None if it is not an object."""
    return _struct(KongLog, value)


def members(raw: Raw) -> Mapping[str, Any]:
    """Decode an undecoded member of a log; empty if it is not an object."""
    return json_object(parse_log(bytes(raw)))


def _struct(kind: type[_S], value: object) -> _S | None:
    if type(value) is not dict:
        return None
    repairs = _REPAIRS[kind]
    return kind(**{name: repairs[name](value[name]) for name in repairs.keys() & value.keys()})


def _whole_text(value: object) -> str | None:
    return value if type(value) is str and value else None


def _raw(value: object) -> Raw:
    return Raw(encode_json(value))


def _any(value: object) -> object:
    return value


_REPAIRS: Final[Mapping[type[Struct], Mapping[str, Callable[[object], object]]]] = {
    Request: {"id": identifier, "method": text, "size": count, "headers": _raw, "querystring": _raw},
    Response: {"status": count, "size": count, "headers": _raw},
    Latencies: {"request": count, "proxy": count},
    Entity: {"id": text, "name": text},
    Consumer: {"id": _whole_text, "username": _whole_text, "custom_id": _whole_text, "tags": _any},
    KongLog: {
        "started_at": usable_time,
        "request": lambda value: _struct(Request, value),
        "response": lambda value: _struct(Response, value),
        "latencies": lambda value: _struct(Latencies, value),
        "route": lambda value: _struct(Entity, value),
        "service": lambda value: _struct(Entity, value),
        "consumer": lambda value: _struct(Consumer, value),
        "authenticated_entity": _any,
        "source": text,
        "upstream_status": _any,
        "workspace_name": text,
        "ai": _raw,
        "openmeter_gate": _any,
    },
}
"""For each member, the value to use for one of any type: as it is, shortened, converted, or None."""


# PDK queries


class NotQueried(Enum):
    """The type of NOT_QUERIED, the placeholder for the result of a query that was not made yet."""

    NOT_QUERIED = "not_queried"


NOT_QUERIED: Final = NotQueried.NOT_QUERIED


class PdkQuery(Enum):
    """A query that must be made before the decision; the values are fields of `QueryResults`."""

    APPLICATION = "application"
    CAPTURES = "captures"


@dataclass(frozen=True, slots=True)
class QueryResults:
    """Kong's answers so far, as the PDK returns them, of any JSON type; None if Kong has no such value.

    `application` is `kong.ctx.shared.kaa_application_context`; `captures` is what
    `kong.request.get_uri_captures` returns, `{"named": {name: text}}`.
    """

    application: object = NOT_QUERIED
    captures: object = NOT_QUERIED

    def with_result(self, query: PdkQuery, result: object) -> QueryResults:
        """Return these results and one more."""
        return replace(self, **{query.value: result})

    def completed(self) -> QueryResults:
        """Return these results, with None for each query that was not made."""
        return QueryResults(
            None if self.application is NOT_QUERIED else self.application,
            None if self.captures is NOT_QUERIED else self.captures,
        )


NO_RESULTS: Final = QueryResults()
