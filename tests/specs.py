"""Requests and answers held against the OpenAPI documents of the real APIs, where those are at hand.

They are not part of the repository: SPECS_DIR names their folder, by default ../shared/specs beside
it. Without them nothing is checked.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpcore
import httpx
import yaml
from openapi_schema_validator import OAS30Validator, oas30_format_checker
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

from syncd.http.client import ApiClient
from syncd.http.connection import Answer

SPECS_DIR = Path(os.environ.get("SPECS_DIR") or Path(__file__).parents[2] / "shared" / "specs")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_URI = "urn:spec"
_METHODS = {"get", "put", "post", "patch", "delete"}


class Spec:
    """One OpenAPI document; `base` is where its paths begin on the server under test.

    `answers=False` checks requests only: for an API that the server under test does not play.
    """

    def __init__(self, document: dict[str, Any], base: str, *, answers: bool) -> None:
        self._answers = answers
        self._document = document
        self._base = base
        self._registry: Registry[Any] = Registry().with_resource(
            _URI, Resource.from_contents(document, default_specification=DRAFT4)
        )
        self._templates = [
            (
                re.compile(
                    re.sub(r"\{\w+\}", "[^/]+", re.escape(path).replace(r"\{", "{").replace(r"\}", "}"))
                ),
                path,
            )
            for path in document["paths"]
        ]

    def check(self, response: httpx.Response) -> None:
        """Fail unless the request and, where it is 2xx, its answer are as the document says."""
        response.read()
        request = response.request
        parts = urlsplit(str(request.url))
        if not parts.path.startswith(self._base):
            return
        path = parts.path.removeprefix(self._base)
        body = json.loads(request.content) if request.content else None
        operation = self.check_request(request.method, path, parse_qsl(parts.query), body)
        if self._answers and response.is_success and response.content:
            where = f"the answer to {request.method} {path}"
            self.check_answer(operation, response.status_code, response.json(), where)

    def check_request(
        self, method: str, path: str, query: list[tuple[str, str]], body: Any
    ) -> dict[str, Any]:
        """Fail unless the request is as the document says; give its operation."""
        item: dict[str, Any] = next(
            (self._document["paths"][path_] for form, path_ in self._templates if form.fullmatch(path)), {}
        )
        operation: dict[str, Any] | None = item.get(method.lower())
        assert operation is not None, f"the specification has no {method} {path}"
        listed = [
            self._resolved(entry) for entry in [*item.get("parameters", []), *operation.get("parameters", [])]
        ]
        known = {entry["name"]: entry for entry in listed if entry["in"] == "query"}
        for name, value in _nested(query, known).items():
            assert name in known, f"{method} {path} has no parameter {name}"
            self._validate(_coerced(value), known[name]["schema"], f"{method} {path}?{name}")
        content = self._resolved(operation.get("requestBody", {})).get("content", {})
        if body is not None:
            assert content, f"{method} {path} takes no body"
            schema = content["application/json"]["schema"]
            self._validate(body, schema, f"the body of {method} {path}")
        return operation

    def check_answer(self, operation: dict[str, Any], status: int, body: Any, where: str) -> None:
        """Fail unless an answer is as the document says."""
        documented = operation["responses"].get(str(status))
        if documented is None and status == 200:
            # A real OpenMeter answers 200 to the creation of a v1 meter, against its specification.
            documented = operation["responses"].get("201")
        assert documented is not None, f"{where}: {status} is not in the specification"
        schema = self._resolved(documented)["content"]["application/json"]["schema"]
        self._validate(_without_nulls(body), schema, where)

    def _resolved(self, entry: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in entry:
            found: Any = self._document
            for part in entry["$ref"].removeprefix("#/").split("/"):
                found = found[part.replace("~1", "/")]
            entry = found
        return entry

    def _validate(self, value: Any, schema: dict[str, Any], where: str) -> None:
        # Not the validators that know reading from writing: Konnect requires what it says is write-only.
        validator = OAS30Validator(
            _absolute(schema), registry=self._registry, format_checker=oas30_format_checker
        )
        faults = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
        assert not faults, f"{where} breaks the specification: {faults}"


@cache
def spec(name: str, base: str = "", *, answers: bool = True) -> Spec | None:
    """Return a document by the name of its file, None where it is not at hand."""
    path = SPECS_DIR / f"{name}.yaml"
    if not path.exists():
        return None
    return Spec(yaml.load(path.read_bytes(), Loader=_LOADER), base, answers=answers)  # plain values only


def _without_nulls(body: Any) -> Any:
    """Leave out what a real OpenMeter answers against its specification: null metadata of meters."""
    if isinstance(body, list):
        return [_without_nulls(entry) for entry in body]
    if not isinstance(body, dict):
        return body
    return {
        name: value
        for name, value in body.items()
        if value is not None or name not in {"metadata", "annotations"}
    }


def _absolute(schema: dict[str, Any]) -> dict[str, Any]:
    """Let references of a schema that stands outside the document find it."""
    return json.loads(json.dumps(schema).replace('"$ref": "#/', f'"$ref": "{_URI}#/'))  # type: ignore[no-any-return]


def _nested(query: list[tuple[str, str]], known: dict[str, Any]) -> dict[str, Any]:
    """Give the parameters by name: lists as such, ``filter[key][eq]=x`` as an object of `filter`."""
    found: dict[str, Any] = {}
    for name, value in query:
        first, *inner = re.split(r"\]?\[", name.rstrip("]"))
        if name in known or not inner:
            is_list = known.get(name, {}).get("schema", {}).get("type") == "array"
            found[name] = [*found.get(name, []), value] if is_list else value
            continue
        place = found.setdefault(first, {})
        for part in inner[:-1]:
            place = place.setdefault(part, {})
        place[inner[-1]] = value
    return found


def _coerced(value: Any) -> Any:
    """Read numbers and truth values out of a query string, which has only text."""
    if isinstance(value, dict):
        return {name: _coerced(inner) for name, inner in value.items()}
    if isinstance(value, str) and (value.isdecimal() or value in {"true", "false"}):
        return json.loads(value)
    return value


def checked(client: ApiClient, found: Sequence[Spec]) -> None:
    """Hold every request of a client, and its answer, against the documents."""
    send = client._send

    def checking(
        method: str, url: httpcore.URL, content: bytes | None, content_type: str, what: str
    ) -> Answer:
        answer = send(method, url, content, content_type, what)
        headers = {"content-type": content_type}
        request = httpx.Request(method, bytes(url).decode(), content=content, headers=headers)
        for document in found:
            document.check(httpx.Response(answer.status, content=answer.content, request=request))
        return answer

    client._send = checking  # type: ignore[method-assign]
