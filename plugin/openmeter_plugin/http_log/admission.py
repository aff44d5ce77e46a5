"""Admission of posts: which ones are refused, and the answers to http-log.

`Admission` decides from a post's head alone. Kong forgets a batch when it gets a 2xx, and posts it again
otherwise.
"""

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
from openmeter_plugin.process.sockets import host_of

_RETRY_AFTER: Final = "2"
_MAX_DISCARDED: Final = 64 * 1024 * 1024
_DISCARD_SECONDS: Final = 2.0


class RefusalError(Exception):
    """The post is refused."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def busy(message: str) -> RefusalError:
    """Return a refusal that asks Kong to post again soon."""
    return RefusalError(503, message, {"retry-after": _RETRY_AFTER})


def accepted(requests: int, bad_records: int) -> Response:
    """Return the answer to a post whose records are all on disk."""
    return _answer(200, {"requests": requests, "bad_records": bad_records})


class Admission:
    """Checks a post against the shared secrets and the limits.

    `hosts` are the values of its Host header that are accepted, None for any.
    """

    def __init__(self, settings: HttpLogSettings, hosts: frozenset[str] | None = None) -> None:
        self._hosts = hosts
        self._secrets = [secret.get_secret_value().encode() for secret in settings.secret]
        self._header_name = settings.header
        self._header = settings.header.encode()
        self._max_body = settings.max_body

    def check(self, request: Request) -> None:
        """Raise RefusalError for a post that its head disqualifies."""
        if self._hosts is not None and host_of(request.headers.get("host", "")) not in self._hosts:
            raise RefusalError(
                421, "without a shared secret, http_endpoint must name localhost or the IP address"
            )
        # Browsers add these to what a web page sends; Kong never does.
        if any(name == "origin" or name.startswith("sec-fetch-") for name in request.headers):
            raise RefusalError(403, "posts of web pages are refused")
        if self._secrets and not self._has_secret(request):
            raise RefusalError(401, f"the header {self._header_name} does not hold the shared secret")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusalError(415, "the content type must be application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusalError(415, "the body must not be compressed")
        length = request.headers.get("content-length", "")
        if length.isdecimal():
            self.check_size(int(length))

    def check_size(self, size: int) -> None:
        """Raise RefusalError if a body of `size` bytes is too large."""
        if size > self._max_body:
            limit = self._max_body.human_readable()
            raise RefusalError(
                413, f"the body is larger than http_log.max_body ({limit}); lower queue.max_batch_size"
            )

    def _has_secret(self, request: Request) -> bool:
        given = [value for name, value in request.headers.raw if name == self._header]
        if len(given) != 1:
            return False
        # Compare with every secret, so that the response time does not reveal which one matched.
        matches = False
        for secret in self._secrets:
            matches |= hmac.compare_digest(given[0], secret)
        return matches


class Refusals:
    """Answers refused posts, and logs refusals at a limited rate."""

    def __init__(self) -> None:
        self._limit = RateLimit()

    async def answer(self, request: Request, refusal: RefusalError) -> Response:
        """Return the answer, if possible after the whole body has arrived: Kong does not read it earlier."""
        if self._limit.passes():
            get_logger().warning(
                "http_log_refused",
                status=refusal.status,
                reason=refusal.message,
                suppressed=self._limit.suppressed(),
                consequence="Kong posts the batch again until its max_retry_time",
            )
        discarded = 0
        timeout = 0.0 if refusal.status == 408 else _DISCARD_SECONDS
        with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
            async with asyncio.timeout(timeout):
                async for chunk in request.stream():
                    discarded += len(chunk)
                    if discarded > _MAX_DISCARDED:
                        break
        headers = {**refusal.headers, "connection": "close"}
        return _answer(refusal.status, {"message": refusal.message}, headers)


def _answer(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")
