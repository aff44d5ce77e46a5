"""Error answers in OpenMeter's wording: RFC 7807, `application/problem+json`.

OpenMeter starts the detail with the kind of error, such as "conflict error: " (pkg/models/errors.go).
"""

from collections.abc import Mapping
from http import HTTPStatus
from itertools import count
from typing import Any

import orjson
from starlette.responses import Response

NAMESPACE = "default"
"""The namespace that OpenMeter's messages name; a self-hosted server has only this one."""

_request_numbers = count(1)


class ProblemError(Exception):
    """An answer other than 2xx, with its status, detail and additional headers."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers

    def response(self) -> Response:
        """Return the problem document: type, title, status, instance and, unless empty, detail."""
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
    """Return a 400."""
    return ProblemError(HTTPStatus.BAD_REQUEST, f"validation error: {detail}")


def bad_schema(pointer: str, reason: str) -> ProblemError:
    """Return the 400 of OpenMeter's OpenAPI validator; `pointer` is a JSON pointer into the body."""
    detail = f'request body has an error: doesn\'t match schema: Error at "{pointer}": {reason}'
    return ProblemError(HTTPStatus.BAD_REQUEST, detail)


def not_found(detail: str) -> ProblemError:
    """Return a 404."""
    return ProblemError(HTTPStatus.NOT_FOUND, f"not found error: {detail}")


def conflict(detail: str) -> ProblemError:
    """Return a 409."""
    return ProblemError(HTTPStatus.CONFLICT, f"conflict error: {detail}")


def precondition_failed(detail: str) -> ProblemError:
    """Return a 412."""
    return ProblemError(HTTPStatus.PRECONDITION_FAILED, f"precondition failed error: {detail}")
