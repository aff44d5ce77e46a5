"""CloudEvents 1.0 as OpenMeter's ingest endpoint parses them: three content types, one set of rules."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from syncd.sandbox.problems import ProblemError, bad_schema
from syncd.sandbox.values import epoch_seconds, parse_time

SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
EITHER = "application/json"


class Event(NamedTuple):
    """One valid event, in the columns of the events table. Both times are seconds since 1970."""

    source: str
    id: str
    type: str
    subject: str
    time: int
    data: str | None
    ingested_at: int


def split_body(content_type: str, body: bytes) -> list[object]:
    """Extract the events from a request body, without validating them.

    The content type is compared exactly: a charset parameter is refused. Raises the 400 that OpenMeter
    answers for that, for malformed JSON and for an empty application/json array
    (openmeter/ingest/httpdriver/ingest.go).
    """
    if content_type not in (SINGLE, BATCH, EITHER):
        raise ProblemError(400, f"invalid content type: {content_type}")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProblemError(400, f"invalid event: {error}") from None
    if content_type == BATCH and not isinstance(document, list):
        raise bad_schema("/", "value must be an array")
    if content_type == EITHER and document == []:
        raise ProblemError(400, "invalid event: no events found")
    if content_type == SINGLE or not isinstance(document, list):
        return [document]
    return document


def read_events(
    documents: list[object], poison: Mapping[str, int]
) -> tuple[list[Event], ProblemError | None]:
    """Validate events in order; return those before the first invalid one, and the error for that one.

    `poison` maps event ids to the status with which a test wants them refused.
    """
    now = int(time.time())
    events: list[Event] = []
    for index, document in enumerate(documents):
        try:
            event = _read_event(document, now)
        except _BadEventError as error:
            return events, bad_schema(f"/{index}{error.pointer}", error.reason)
        if event.id in poison:
            return events, ProblemError(poison[event.id], f"event {event.id} is refused: injected by a test")
        events.append(event)
    return events, None


class _BadEventError(Exception):
    def __init__(self, pointer: str, reason: str) -> None:
        self.pointer = pointer
        self.reason = reason


def _read_event(document: object, now: int) -> Event:
    if not isinstance(document, dict):
        raise _BadEventError("", "value must be an object")
    _refuse_missing_or_empty(document)
    if document["specversion"] != "1.0":
        raise _BadEventError("/specversion", 'the only known version is "1.0"')
    if document.get("datacontenttype") not in (None, "application/json"):
        raise _BadEventError(
            "/datacontenttype", 'value is not one of the allowed values ["application/json"]'
        )
    data = document.get("data")
    if data is not None and not isinstance(data, dict):
        raise _BadEventError("/data", "value must be an object")
    return Event(
        source=document["source"],
        id=document["id"],
        type=document["type"],
        subject=document["subject"],
        time=_read_time(document.get("time"), now),
        data=None if data is None else orjson.dumps(data).decode(),
        ingested_at=now,
    )


def _refuse_missing_or_empty(document: dict[str, Any]) -> None:
    for name in ("id", "source", "specversion", "type", "subject"):
        value = document.get(name)
        if not isinstance(value, str):
            reason = "value must be a string" if name in document else f'property "{name}" is missing'
            raise _BadEventError(f"/{name}", reason)
        if not value:
            raise _BadEventError(f"/{name}", "minimum string length is 1")


def _read_time(value: object, now: int) -> int:
    if value is None:
        return now
    if not isinstance(value, str):
        raise _BadEventError("/time", "value must be a string")
    try:
        return epoch_seconds(parse_time(value))
    except (ValueError, OverflowError) as error:
        raise _BadEventError("/time", str(error)) from None
