"""One HTTP client for all APIs that syncd talks to: answers become decoded JSON or errors of `syncd.errors`.

Tried again (see `syncd.retry`): network errors, 429, 500, 502, 503 and 504.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from types import TracebackType
from typing import Self

import httpx

from syncd import __version__, calls
from syncd.errors import MalformedError, RefusedError, UnauthorizedError, UnreachableError
from syncd.retry import Retry

Params = Mapping[str, str | int | list[str]]

_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
_MAX_DETAIL = 300


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An API: what messages call it, where it is, and the header with its token.

    `token_setting` is the name of the setting that holds the token, for the message of a 401 or 403;
    `rights` says what the token must allow.
    """

    name: str
    url: str
    token_setting: str
    rights: str
    token_header: str = "Authorization"  # noqa: S105 - a header's name
    token: str | None = None
    timeout: float = 10.0

    def headers(self) -> dict[str, str]:
        """Return the headers of every request."""
        headers = {"User-Agent": f"kong-openmeter-syncd/{__version__}", "Accept": "application/json"}
        if self.token:
            bearer = self.token_header == "Authorization"  # noqa: S105 - a header's name
            headers[self.token_header] = f"Bearer {self.token}" if bearer else self.token
        return headers


class ApiClient:
    """Requests to one API; answers are decoded JSON. Safe to share between threads, as httpx.Client is."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._endpoint = endpoint
        self._retry = retry
        self._client = httpx.Client(
            base_url=endpoint.url, headers=endpoint.headers(), timeout=endpoint.timeout, verify=_tls()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str, params: Params | None = None) -> object:
        """Return what GET answers, decoded; raises the ApiError that fits."""
        return self.request("GET", path, params=params)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Params | None = None,
        body: object = None,
        repeat: bool = True,
    ) -> object:
        """Send one request and return the decoded answer, None for an empty one.

        `repeat=False` sends it once: for writes whose repetition could undo what someone did meanwhile.
        """

        def attempt() -> httpx.Response:
            return self._once(method, path, params, body)

        response = self._retry.run(attempt) if repeat else attempt()
        return self._decoded(response, method, path)

    def _once(self, method: str, path: str, params: Params | None, body: object) -> httpx.Response:
        unanswered = f"{self._endpoint.name} at {self._endpoint.url} did not answer {method} {path}"
        try:
            response = self._client.request(method, path, params=params, json=body)
        except httpx.TransportError as error:
            calls.count(self._endpoint.name, method, "none")
            raise UnreachableError(f"{unanswered}: {_describe(error)}") from None
        calls.count(self._endpoint.name, method, str(response.status_code))
        if response.status_code in _TRANSIENT_STATUS:
            problem = f"HTTP {response.status_code} {self._detail(response)}".strip()
            wait = _retry_after(response.headers.get("retry-after"))
            raise UnreachableError(f"{unanswered}: {problem}", retry_after=wait)
        return response

    def _decoded(self, response: httpx.Response, method: str, path: str) -> object:
        status = response.status_code
        where = f"{self._endpoint.name} at {self._endpoint.url}"
        if status in {401, 403}:
            raise UnauthorizedError(self._unauthorized(status, method, path))
        if 400 <= status < 500:
            detail = self._detail(response)
            message = f"{where} refused {method} {path}: HTTP {status} {detail}".rstrip()
            raise RefusedError(message, status=status, detail=detail)
        if not 200 <= status < 300:
            raise MalformedError(f"{where} answered {method} {path} with HTTP {status}: is its URL right?")
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise MalformedError(
                f"{where} answered {method} {path} with something that is not JSON: is its URL right?"
            ) from None

    def _unauthorized(self, status: int, method: str, path: str) -> str:
        endpoint = self._endpoint
        given = "the token of" if endpoint.token else "no token is set in"
        fault = "is missing, wrong or expired" if status == 401 else "lacks the rights"
        return (
            f"{endpoint.name} at {endpoint.url} answered {method} {path} with HTTP {status}: {given}"
            f" {endpoint.token_setting}; a token {fault}. It must allow to {endpoint.rights}"
        )

    def _detail(self, response: httpx.Response) -> str:
        """Return what the server said (problem+json or Kong's message), never with our token in it."""
        try:
            body = response.json()
        except ValueError:
            body = None
        detail = ""
        if isinstance(body, dict):
            said = body.get("detail") or body.get("message") or body.get("title")
            detail = str(said) if said else ""
        if self._endpoint.token:
            detail = detail.replace(self._endpoint.token, "***")
        return " ".join(detail.split())[:_MAX_DETAIL]


@cache
def _tls() -> ssl.SSLContext:
    """Return the TLS settings that all clients share: loading the certificates is slow."""
    return httpx.create_ssl_context()


def expect_object(value: object, api: str, what: str) -> dict[str, object]:
    """Return `value` if it is a JSON object; raises MalformedError."""
    if not isinstance(value, dict):
        raise MalformedError(f"{api}: {what} is not a JSON object")
    return value


def expect_list(value: object, api: str, what: str) -> list[object]:
    """Return `value` if it is a JSON array; raises MalformedError."""
    if not isinstance(value, list):
        raise MalformedError(f"{api}: {what} is not a JSON array")
    return value


def _describe(error: httpx.TransportError) -> str:
    kind = type(error).__name__
    return f"{kind}: {error}" if str(error) else kind


def _retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for (RFC 9110: seconds or a date)."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
