"""Client that POSTs one batch of CloudEvents and classifies the answer.

    UndeliveredError      nothing is known to be delivered; the batch is retried without limit
      UnauthorizedError   401, 403: the same, but an operator has to act
    RejectedError         400, 413, 422: an event in the batch is invalid

Both dialects of the metering API accept the same body (OpenMeter v1 answers 204, v3 and Konnect 202, and
self-hosted versions have answered 200), so any 2xx counts as delivered.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

import httpx

from openmeter_plugin import __version__
from openmeter_plugin.spool.destination import Destination, is_header_value

CONTENT_TYPE: Final = "application/cloudevents-batch+json"
"""OpenMeter compares it exactly: with a charset parameter it refuses the batch."""

_REJECTED: Final = frozenset({400, 413, 422})
_MAX_ANSWER_CHARS: Final = 2000  # characters of an answer in logs and dead letters
_REDACTED: Final = "[the token]"
_MAX_LOCATION: Final = 200  # characters of a redirect's target in messages
_MAX_ANSWER_BYTES: Final = 1024 * 1024  # bytes read of an answer
_TOTAL_TIMEOUT_FACTOR: Final = 3
"""Limit of a whole POST, in multiples of the configured timeout of each step: connect, send, each read."""

_MAX_RETRY_AFTER: Final = 3600.0  # seconds


class DeliveryError(Exception):
    """The batch was not delivered; `status` is the HTTP status, or None if there was no answer."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class UndeliveredError(DeliveryError):
    """The batch must be retried, not before `retry_after` seconds if the server named a time."""

    def __init__(self, reason: str, status: int | None = None, retry_after: float = 0.0) -> None:
        super().__init__(reason, status)
        self.retry_after = retry_after


class UnauthorizedError(UndeliveredError):
    """The server refused the token; the batch is retried until an operator has fixed it."""


class RejectedError(DeliveryError):
    """The server refuses this batch as it is; the message is the server's answer."""


class EventsClient:
    """HTTP client of one destination's events endpoint; the constructor raises ValueError or OSError."""

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        headers = {"content-type": CONTENT_TYPE, "user-agent": f"kong-openmeter/{__version__}"}
        if destination.token:
            if not is_header_value(destination.token):
                raise ValueError("the token is not printable ASCII, so it cannot be sent in a header")
            headers["authorization"] = f"Bearer {destination.token}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(destination.timeout),
            limits=httpx.Limits(keepalive_expiry=destination.keepalive),
            verify=destination.ssl_verify,
        )
        try:
            self._request = self._http.build_request("POST", destination.endpoint)
        except httpx.InvalidURL as error:
            raise ValueError(str(error)) from None
        self._headers = [header for header in self._request.headers.raw if header[0] != b"Content-Length"]

    async def send(self, events: Sequence[bytes], on_sent: Callable[[], None] | None = None) -> None:
        """POST the events, each a JSON object or several separated by commas; raises DeliveryError.

        `on_sent` is called once the body is written and only the answer is missing.
        """
        try:
            # The HTTP library's timeout is per read: a server that trickles could block us for ever.
            async with asyncio.timeout(self.destination.timeout * _TOTAL_TIMEOUT_FACTOR):
                response, answer = await self._post(b"[" + b",".join(events) + b"]", on_sent)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:  # TimeoutError is an OSError
            raise UndeliveredError(
                f"{type(error).__name__}: {str(error) or _default_message(error)}"
            ) from None
        if not response.is_success:
            raise _failure(response, self._redacted(answer))

    async def _post(self, content: bytes, on_sent: Callable[[], None] | None) -> tuple[httpx.Response, bytes]:
        async def body() -> AsyncIterator[bytes]:
            yield content
            if on_sent is not None:
                on_sent()

        # The constant parts are built once. With a content-length, the body is not sent in chunks.
        request = httpx.Request(
            "POST",
            self._request.url,
            headers=[*self._headers, (b"content-length", b"%d" % len(content))],
            content=body(),
            extensions=self._request.extensions,
        )
        answer = b""
        response = await self._http.send(request, stream=True)
        try:
            # The body of a successful answer is not used, so it need not be decompressed.
            async for chunk in response.aiter_raw() if response.is_success else response.aiter_bytes():
                answer += chunk
                if len(answer) > _MAX_ANSWER_BYTES:
                    break
        except httpx.DecodingError:
            pass  # the status is enough
        finally:
            await response.aclose()
        return response, answer

    def _redacted(self, answer: bytes) -> str:
        """Return the answer's text without our token: some servers echo the request's headers."""
        text = answer.decode("utf-8", "replace")
        token = self.destination.token
        return (text.replace(token, _REDACTED) if token else text)[:_MAX_ANSWER_CHARS]

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def _default_message(error: Exception) -> str:
    """Return a message for an error that has none."""
    is_timeout = isinstance(error, TimeoutError | httpx.TimeoutException)
    return "the metering API did not answer in time" if is_timeout else "the connection was closed"


def _failure(response: httpx.Response, answer: str) -> DeliveryError:
    status = response.status_code
    if status in _REJECTED:
        return RejectedError(answer, status)
    if status in (401, 403):
        return UnauthorizedError(f"HTTP {status}: {answer}", status)
    if response.has_redirect_location:
        # Not followed: only the configuration decides where events and the token go.
        location = response.headers["location"].partition("?")[0][:_MAX_LOCATION]
        answer = f"it redirects to {location}; ingest_endpoint must be the address that accepts the events"
    return UndeliveredError(f"HTTP {status}: {answer}", status, _retry_after(response))


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds of Retry-After, in either of its forms (RFC 9110, 10.2.3); 0 without a valid one."""
    value = response.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _MAX_RETRY_AFTER)
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # OverflowError for a year out of range
        return 0.0
    return min(max(0.0, moment.timestamp() - time.time()), _MAX_RETRY_AFTER)
