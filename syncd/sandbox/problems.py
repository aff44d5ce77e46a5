"""Errors as OpenMeter words them: RFC 7807, `application/problem+json`.

OpenMeter begins the detail with the kind of error, such as "conflict error: " (pkg/models/errors.go).
"""

from collections.abc import Mapping
from http import HTTPStatus
from itertools import count
from typing import Any

import orjson
from starlette.responses import Response

NAMESPACE = "default"
"""OpenMeter's messages name the namespace; a self-hosted one has only this."""

_request_numbers = count(1)


class ProblemError(Exception):
    """An answer other than 2xx: its status, its detail and any headers of its own."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers

    def response(self) -> Response:
        """Give the problem document: type, title, status, instance and, unless it is empty, detail."""
        problem: dict[str, Any] = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "instance": f"urn:request:sandbox-{next(_request_numbers):06d}",
        }
        if self.detail:
            problem["detail"] = self.detail
        return Response(
            orjson.dumps(problem), self.status, headers=self.headers, media_type="application/problem+json"
        )


def invalid(detail: str) -> ProblemError:
    """Make a 400."""
    return ProblemError(HTTPStatus.BAD_REQUEST, f"validation error: {detail}")


def bad_schema(pointer: str, reason: str) -> ProblemError:
    """Make the 400 of OpenMeter's OpenAPI validator; `pointer` is a JSON pointer into the body."""
    detail = f'request body has an error: doesn\'t match schema: Error at "{pointer}": {reason}'
    return ProblemError(HTTPStatus.BAD_REQUEST, detail)


def not_found(detail: str) -> ProblemError:
    """Make a 404."""
    return ProblemError(HTTPStatus.NOT_FOUND, f"not found error: {detail}")


def conflict(detail: str) -> ProblemError:
    """Make a 409."""
    return ProblemError(HTTPStatus.CONFLICT, f"conflict error: {detail}")


def precondition_failed(detail: str) -> ProblemError:
    """Make a 412."""
    return ProblemError(HTTPStatus.PRECONDITION_FAILED, f"precondition failed error: {detail}")
