"""What is answered to http-log: Kong forgets a batch that has its 2xx, and posts any other again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Final

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from openmeter_plugin.log import RateLimit, get_logger

_RETRY_AFTER: Final = "2"
_MOST_DISCARDED: Final = 64 * 1024 * 1024
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
                refused_before=self._limit.held_back(),
                consequence="Kong posts the batch again until its max_retry_time",
            )
        discarded = 0
        patience = 0.0 if refusal.status == 408 else _DISCARD_SECONDS
        with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
            async with asyncio.timeout(patience):
                async for chunk in request.stream():
                    discarded += len(chunk)
                    if discarded > _MOST_DISCARDED:
                        break
        headers = {**refusal.headers, "connection": "close"}
        return _answer(refusal.status, {"message": refusal.message}, headers)


def _answer(status: int, content: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")
