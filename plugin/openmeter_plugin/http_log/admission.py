"""What is answered to http-log: Kong forgets a batch that has its 2xx, and posts any other again."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Mapping
from typing import Any, Final

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from openmeter_plugin.http_log.config import HttpLogSettings
from openmeter_plugin.log import RateLimit, get_logger

_RETRY_AFTER: Final = "2"
_MAX_DISCARDED: Final = 64 * 1024 * 1024
_DISCARD_SECONDS: Final = 2.0


class RefusalError(Exception):
    """The post is not taken."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def busy(message: str) -> RefusalError:
    """Return the refusal of what may well be taken soon."""
    return RefusalError(503, message, {"retry-after": _RETRY_AFTER})


def accepted(requests: int, bad_records: int) -> Response:
    """Return the answer to a post that is on disk as a whole."""
    return _answer(200, {"requests": requests, "bad_records": bad_records})


class Refusals:
    """Answers what is refused and tells of it in the log, now and then."""

    def __init__(self) -> None:
        self._limit = RateLimit()

    async def answer(self, request: Request, refusal: RefusalError) -> Response:
        """Return the answer, where possible once the body is there: before that Kong does not read it."""
        if self._limit.passes():
            get_logger().warning(
                "http_log_refused",
                status=refusal.status,
                reason=refusal.message,
                refused_before=self._limit.suppressed(),
                consequence="Kong posts the batch again until its max_retry_time",
            )
        discarded = 0
        patience = 0.0 if refusal.status == 408 else _DISCARD_SECONDS
        with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
            async with asyncio.timeout(patience):
                async for chunk in request.stream():
                    discarded += len(chunk)
                    if discarded > _MAX_DISCARDED:
                        break
        headers = {**refusal.headers, "connection": "close"}
        return _answer(refusal.status, {"message": refusal.message}, headers)


def _answer(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


# MERGED: Which posts of http-log are let in: decided by their head alone.


class Admission:
    """Knows the shared secrets and the limits of a post."""

    def __init__(self, settings: HttpLogSettings) -> None:
        self._secrets = [secret.get_secret_value().encode() for secret in settings.secret]
        self._header_name = settings.header
        self._header = settings.header.encode()
        self._max_body = settings.max_body

    def check(self, request: Request) -> None:
        """Raise RefusalError for a post whose body need not be looked at."""
        if self._secrets and not self._knows_secret(request):
            raise RefusalError(401, f"the header {self._header_name} does not hold the shared secret")
        # Also keeps web pages out: a browser asks before it sends this type to another site.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusalError(415, "the content type must be application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusalError(415, "the body must not be compressed")
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            self.check_size(int(length))

    def check_size(self, size: int) -> None:
        """Raise RefusalError where a body of so many bytes is too large."""
        if size > self._max_body:
            limit = self._max_body.human_readable()
            raise RefusalError(
                413, f"the body is larger than http_log.max_body ({limit}); lower queue.max_batch_size"
            )

    def _knows_secret(self, request: Request) -> bool:
        given = [value for name, value in request.headers.raw if name == self._header]
        if len(given) != 1:
            return False
        # Each is compared, so that the time does not tell which one it was.
        known = False
        for secret in self._secrets:
            known |= hmac.compare_digest(given[0], secret)
        return known
