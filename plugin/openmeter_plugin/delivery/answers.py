"""What the metering API's answer means for a batch, without I/O.

    UndeliveredError      nothing is known to be delivered; the batch is retried without limit
      UnauthorizedError   401, 403: the same, but an operator has to act
    RejectedError         400, 413, 422: an event in the batch is invalid, or the batch is too large

Only the API itself may refuse events: by an error document as OpenMeter and Konnect send it. The same status
from anything in between (a load balancer's page, "plain HTTP request was sent to HTTPS port") is an outage.
"""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from openmeter_plugin.foreign import foreign_text

MAX_TEXT: Final = 2000  # characters of an answer in a dead letter

_REFUSALS: Final = frozenset({400, 413, 422})
_TOO_LARGE: Final = 413
_REQUEST_TIMEOUT: Final = 408
_MAX_LOCATION: Final = 200  # characters of a redirect's target in messages
_MAX_RETRY_AFTER: Final = 3600.0  # seconds
_NAMED_V1: Final = re.compile(r'Error at "/(\d{1,7})[/"]')
_NAMED_V3: Final = re.compile(r"(\d{1,7})(?:\.|$)")


class DeliveryError(Exception):
    """The batch was not delivered; `status` is the HTTP status, or None if there was no answer."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class UndeliveredError(DeliveryError):
    """The batch must be retried, not before `retry_after` seconds if the server named a time.

    `endpoint_fails` says whether any other queue would fare the same at this endpoint.
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        retry_after: float = 0.0,
        *,
        endpoint_fails: bool = False,
    ) -> None:
        super().__init__(reason, status)
        self.retry_after = retry_after
        self.endpoint_fails = endpoint_fails


class UnauthorizedError(UndeliveredError):
    """The server refused the token; the batch is retried until an operator has fixed it."""


class RejectedError(DeliveryError):
    """The server refuses this batch as it is; the message is the server's answer.

    `named` are the positions of the events that it complains about, none if it does not say. With
    `only_too_large`, it is not the metering API that refuses: smaller batches may pass, but no event is
    condemned by it.
    """

    def __init__(
        self, answer: str, status: int, named: Sequence[int] = (), *, only_too_large: bool = False
    ) -> None:
        super().__init__(answer, status)
        self.status: int = status
        self.named = named
        self.only_too_large = only_too_large


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer; the names of the headers are in lower case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes = b""

    def header(self, name: str) -> str:
        """Return a header, empty if there is none."""
        return self.headers.get(name.encode(), b"").decode("latin-1").strip()

    @property
    def media_type(self) -> str:
        """Return the type of the body in lower case, without parameters."""
        return self.header("content-type").partition(";")[0].strip().lower()


def failure_of(answer: Answer, secrets: Sequence[str]) -> DeliveryError | None:
    """Return the error that the answer means, None if the events are delivered."""
    status = answer.status
    text = foreign_text(answer.body.decode("utf-8", "replace"), secrets, MAX_TEXT)
    if 200 <= status < 300:
        if answer.media_type != "text/html":
            return None
        return UndeliveredError(
            f"HTTP {status} with a page, which the metering API never sends: {text}",
            status,
            endpoint_fails=True,
        )
    if status in (401, 403):
        return UnauthorizedError(f"HTTP {status}: {text}", status)
    if status in _REFUSALS:
        problem = _problem(answer)
        if problem is not None:
            # Without the request's id, which would make each answer another one.
            kept = {name: value for name, value in problem.items() if name != "instance"}
            text = foreign_text(orjson.dumps(kept).decode(), secrets, MAX_TEXT)
            return RejectedError(text, status, _named(problem))
        if status == _TOO_LARGE:
            return RejectedError(text, status, only_too_large=True)
        return UndeliveredError(
            f"HTTP {status} that is not the metering API's"
            f" ({foreign_text(answer.media_type, limit=60) or 'no content type'}); is ingest_endpoint right,"
            f" and what is in between? {text}",
            status,
            endpoint_fails=True,
        )
    if 300 <= status < 400 and (location := answer.header("location")):
        # Not followed: only the configuration decides where events and the token go.
        text = f"it redirects to {_address(location, secrets)}; ingest_endpoint must be the address itself"
    endpoint_fails = status >= 500 or status == _REQUEST_TIMEOUT
    return UndeliveredError(
        f"HTTP {status}: {text}",
        status,
        _retry_after(answer.header("retry-after")),
        endpoint_fails=endpoint_fails,
    )


def _problem(answer: Answer) -> dict[str, Any] | None:
    """Return the metering API's error document, None if the answer is not one.

    OpenMeter v1 and v3, and Konnect, send `application/problem+json` (RFC 9457). As `application/json`, it
    must have the members that both have in common.
    """
    if not answer.media_type.endswith("json"):
        return None
    try:
        document = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return None
    if answer.media_type == "application/problem+json":
        return document
    same_status = document.get("status") == answer.status
    return document if same_status and isinstance(document.get("title"), str) else None


def _named(problem: Mapping[str, Any]) -> list[int]:
    """Return the positions in the batch that the error document names, without repeats.

    v1 says `Error at "/1/subject"` in `detail`, v3 has `"field": "1.subject"` in `invalid_parameters`. Both
    stop at the first invalid event, and name none for a `source` that is no URI reference.
    """
    found: dict[int, None] = {}
    detail = problem.get("detail")
    if isinstance(detail, str):
        found |= {int(number): None for number in _NAMED_V1.findall(detail)}
    parameters = problem.get("invalid_parameters")
    for parameter in parameters if isinstance(parameters, list) else ():
        field = parameter.get("field") if isinstance(parameter, dict) else None
        if isinstance(field, str) and (match := _NAMED_V3.match(field)):
            found[int(match[1])] = None
    return list(found)


def _address(location: str, secrets: Sequence[str]) -> str:
    """Return where a redirect leads, without query, fragment and credentials."""
    address = re.split(r"[?#]", location, maxsplit=1)[0]
    return foreign_text(re.sub(r"//[^/]*@", "//", address), secrets, _MAX_LOCATION)


def _retry_after(value: str) -> float:
    """Return the seconds of Retry-After, in either of its forms (RFC 9110, 10.2.3); 0 without a valid one."""
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _MAX_RETRY_AFTER)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):  # OverflowError for a year out of range
        return 0.0
    return min(max(0.0, moment - time.time()), _MAX_RETRY_AFTER)
