"""Error answers in OpenMeter's wording: RFC 7807, `application/problem+json`.

OpenMeter starts the detail with the kind of error, such as "conflict error: " (pkg/models/errors.go). Its v3
API answers in two more ways: its router and its schema check with types of Kong's and `invalid_parameters`,
its rules about labels and dimensions with `extensions.validationErrors` and no detail.
"""

from collections.abc import Mapping
from http import HTTPStatus
from itertools import count
from types import MappingProxyType
from typing import Any

import orjson
from starlette.responses import Response

NAMESPACE = "default"
"""The namespace that OpenMeter's messages name; a self-hosted server has only this one."""

_request_numbers = count(1)


class ProblemError(Exception):
    """An answer other than 2xx, with its status, detail and additional headers."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        type_: str = "about:blank",
        members: Mapping[str, Any] = MappingProxyType({}),
        has_instance: bool = True,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers
        self.type = type_
        self.members = members
        self.has_instance = has_instance

    def for_v3(self) -> "ProblemError":
        """Return the same refusal as v3 answers it: most are alike."""
        return self

    def response(self) -> Response:
        """Return the problem document, with instance and detail where OpenMeter has them."""
        problem: dict[str, Any] = {
            "type": self.type,
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
        }
        if self.has_instance:
            problem["instance"] = f"urn:request:sandbox-{next(_request_numbers):06d}"
        if self.detail:
            problem["detail"] = self.detail
        problem |= self.members
        return Response(
            orjson.dumps(problem), self.status, headers=self.headers, media_type="application/problem+json"
        )


def invalid(detail: str) -> ProblemError:
    """Return a 400."""
    return ProblemError(HTTPStatus.BAD_REQUEST, f"validation error: {detail}")


class SchemaError(ProblemError):
    """A request that breaks the schema: each API says so in its own way, see `for_v3`."""

    def __init__(
        self, detail: str, *, field: str, reason: str, rule: str | None, source: str, has_instance: bool
    ) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, detail, has_instance=has_instance)
        self._parameter = {"field": field, "reason": reason, "source": source}
        self._rule = rule

    def for_v3(self) -> ProblemError:
        """Return the same refusal in the words of v3."""
        return bad_parameter(**self._parameter, rule=self._rule)


def malformed(detail: str, *, field: str = "", source: str = "", has_instance: bool = False) -> SchemaError:
    """Return the 400 of the OpenAPI validator for a request that cannot be read."""
    return SchemaError(
        detail, field=field, reason=detail, rule=None, source=source, has_instance=has_instance
    )


def bad_schema(pointer: str, reason: str, rule: str | None = None) -> SchemaError:
    """Return the 400 of the OpenAPI validator for a body; `pointer` is a JSON pointer into it.

    For v3, `rule` is the rule that is broken; that a property is not known there is the fault of its parent.
    """
    field = pointer.strip("/").replace("/", ".")
    if rule == "properties":
        field = field.rpartition(".")[0]
    return SchemaError(
        f'request body has an error: doesn\'t match schema: Error at "{pointer}": {reason}',
        field=field,
        reason=reason,
        rule=rule,
        source="",
        has_instance=False,
    )


def konnect(status: int, detail: str, **members: Any) -> ProblemError:
    """Return an error of the v3 router or its schema check, whose types are Kong's."""
    kind = HTTPStatus(status).phrase.lower().replace(" ", "-")
    return ProblemError(status, detail, type_=f"https://kongapi.info/konnect/{kind}", members=members)


def bad_parameter(field: str, reason: str, *, rule: str | None = None, source: str = "") -> ProblemError:
    """Return the 400 of v3 for one property of a body, or one parameter of a query."""
    parameter = {"field": field, "reason": reason, "source": source} | ({"rule": rule} if rule else {})
    shown = f"{field} [{rule}]" if rule else field
    return konnect(HTTPStatus.BAD_REQUEST, f"Bad Request: {shown}: {reason}", invalid_parameters=[parameter])


def no_such_entity() -> ProblemError:
    """Return the 404 of v3's router for an id that is no ULID."""
    return konnect(HTTPStatus.NOT_FOUND, "The requested entity was not found")


def broken_rule(code: str, field: str, message: str, **more: Any) -> ProblemError:
    """Return the 400 of v3 for labels and dimensions: without a detail."""
    error = {"code": code, "field": field, "message": message, "severity": "critical", **more}
    return ProblemError(HTTPStatus.BAD_REQUEST, "", members={"extensions": {"validationErrors": [error]}})


class GroupByError(ProblemError):
    """A query by a dimension that the meter does not have."""

    def __init__(self, name: str) -> None:
        super().__init__(HTTPStatus.BAD_REQUEST, f"validation error: invalid group by: {name}")
        self._name = name

    def for_v3(self) -> ProblemError:
        """Return the same refusal in the words of v3."""
        return broken_rule(
            "invalid_group_by", "$.group_by_dimensions", "invalid group by dimension", value=self._name
        )


def not_found(detail: str) -> ProblemError:
    """Return a 404."""
    return ProblemError(HTTPStatus.NOT_FOUND, f"not found error: {detail}")


def conflict(detail: str) -> ProblemError:
    """Return a 409."""
    return ProblemError(HTTPStatus.CONFLICT, f"conflict error: {detail}")


def precondition_failed(detail: str) -> ProblemError:
    """Return a 412."""
    return ProblemError(HTTPStatus.PRECONDITION_FAILED, f"precondition failed error: {detail}")
