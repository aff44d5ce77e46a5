"""CloudEvents 1.0 as OpenMeter's ingest endpoint parses them: three content types, one set of rules."""

import re
import time
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson

from syncd.sandbox.problems import ProblemError, bad_schema, konnect, malformed
from syncd.sandbox.values import epoch_seconds, parse_time

SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
EITHER = "application/json"

_LAST_SECOND = 2**32 - 1
"""2106-02-07T06:28:15Z: ClickHouse's DateTime counts what is later there."""


class Event(NamedTuple):
    """One valid event, in the columns of the events table. Both times are seconds since 1970."""

    source: str
    id: str
    type: str
    subject: str
    time: int
    data: str | None
    ingested_at: int


def split_body(content_type: str, body: bytes, *, exactly: bool) -> object:
    """Return the events of a request body, not yet validated: a list for a batch, else one event.

    v1 compares the content type `exactly`: a charset parameter is refused. Raises the 400 that OpenMeter
    answers for that, for malformed JSON and for an empty application/json array
    (openmeter/ingest/httpdriver/ingest.go).
    """
    kind = content_type.partition(";")[0].strip()
    if kind not in (SINGLE, BATCH, EITHER):
        raise malformed(f'request body has an error: header Content-Type has unexpected value "{kind}"')
    if exactly and content_type != kind:
        raise BadIngestError(f"invalid content type: {content_type}")
    try:
        document: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise malformed(f"request body has an error: failed to decode request body: {error}") from None
    if kind == BATCH and not isinstance(document, list):
        raise malformed("request body has an error: doesn't match schema: value must be an array")
    if kind == SINGLE and not isinstance(document, dict):
        raise malformed("request body has an error: doesn't match schema: value must be an object")
    if kind == EITHER and document == []:
        raise BadIngestError("invalid event: no events found")
    return document


class BadIngestError(ProblemError):
    """A request that fits the schema and that the ingest endpoint cannot read."""

    def __init__(self, detail: str) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, detail)

    def for_v3(self) -> ProblemError:
        """Return the same refusal as v3 answers it: without a reason."""
        return konnect(HTTPStatus.BAD_REQUEST, "Bad Request")


def read_events(body: object, *, only_known: bool) -> list[Event]:
    """Validate all events of a request. One bad event refuses the whole request, and names the first.

    The schema is checked before any event is taken (api/server.go, the OpenAPI middleware). v3 takes
    `only_known` attributes; v1 takes others and forgets them.
    """
    now = int(time.time())
    documents = body if isinstance(body, list) else [body]
    events: list[Event] = []
    for index, document in enumerate(documents):
        try:
            events.append(_read_event(document, now, only_known=only_known))
        except _BadEventError as error:
            place = f"/{index}" if isinstance(body, list) else ""
            raise bad_schema(place + error.pointer, error.reason, error.rule) from None
    for event in events:
        if not is_uri_reference(event.source):
            raise BadIngestError(f"invalid event: cannot parse uri ref: {event.source}")
    return events


def is_uri_reference(text: str) -> bool:
    """Return whether Go's url.Parse, with which OpenMeter checks an event's source, accepts a text."""
    if re.search(r"[\x00-\x1f\x7f]", text):
        return False
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text)
    rest = text[scheme.end() :] if scheme else text
    before_query = re.split(r"[?#]", rest, maxsplit=1)[0]
    if scheme is None and ":" in before_query.split("/", 1)[0]:
        return False  # "first path segment in URL cannot contain colon", such as host:port
    if scheme and rest and not rest.startswith("/"):
        return True  # opaque, such as urn:x
    if before_query.startswith("//"):
        authority = before_query[2:].split("/", 1)[0].rpartition("@")[2]
        if not re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\] ]*)(:\d*)?", authority):
            return False
    return re.search(r"%(?![0-9A-Fa-f]{2})", before_query) is None


_KNOWN = {"id", "source", "specversion", "type", "subject", "time", "data", "datacontenttype", "dataschema"}


class _BadEventError(Exception):
    def __init__(self, pointer: str, reason: str, rule: str) -> None:
        self.pointer = pointer
        self.reason = reason
        self.rule = rule


def _read_event(document: object, now: int, *, only_known: bool) -> Event:
    if not isinstance(document, dict):
        raise _BadEventError("", "value must be an object", "type")
    _refuse_missing_or_empty(document)
    if only_known and (unknown := sorted(document.keys() - _KNOWN)):
        raise _BadEventError(f"/{unknown[0]}", f'property "{unknown[0]}" is unsupported', "properties")
    if document.get("datacontenttype") not in (None, "application/json"):
        raise _BadEventError(
            "/datacontenttype", 'value is not one of the allowed values ["application/json"]', "enum"
        )
    data = document.get("data")
    if data is not None and not isinstance(data, dict):
        raise _BadEventError("/data", "value must be an object", "type")
    return Event(
        source=document["source"],
        id=document["id"],
        type=document["type"],
        subject=document["subject"],
        time=_read_time(document.get("time"), now),
        # A null that was sent is kept apart from no data: only the former has a content type.
        data=orjson.dumps(data).decode() if "data" in document else None,
        ingested_at=now,
    )


def _refuse_missing_or_empty(document: dict[str, Any]) -> None:
    for name in ("id", "source", "specversion", "type", "subject"):
        value = document.get(name)
        if name not in document:
            raise _BadEventError(f"/{name}", f'property "{name}" is missing', "required")
        if not isinstance(value, str):
            raise _BadEventError(f"/{name}", "value must be a string", "type")
        if not value:
            raise _BadEventError(f"/{name}", "minimum string length is 1", "min_length")


def _read_time(value: object, now: int) -> int:
    if value is None:
        return now
    if not isinstance(value, str):
        raise _BadEventError("/time", "value must be a string", "allOf")
    try:
        return min(epoch_seconds(parse_time(value)), _LAST_SECOND)
    except (ValueError, OverflowError) as error:
        raise _BadEventError("/time", str(error), "allOf") from None
