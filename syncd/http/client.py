"""One HTTP client for all APIs that syncd talks to.

Answers become decoded JSON or errors of `syncd.core.errors`.

Tried again (see `syncd.http.retry`): network errors, 429, 500, 502, 503 and 504.
"""

from __future__ import annotations

import json
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache
from typing import Self, cast

import httpx
import orjson

from syncd import __version__
from syncd.core.errors import MalformedError, RefusedError, UnauthorizedError, UnreachableError
from syncd.http import request_counter
from syncd.http.retry import Retry

# MERGED: What holds connections: closed at the end of a `with`.


class Closable(ABC):
    """A context manager that closes itself."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


# MERGED: JSON: quick where it is ordinary, and right where it is not, as in a name with half a surrogate
# pair.


def encoded(value: object) -> bytes:
    """Return the JSON of a value."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a number beyond 64 bits, or half a surrogate pair, that somebody else wrote
        return json.dumps(value).encode()


def parsed(content: bytes) -> object:
    """Return the value of some JSON; raises ValueError or RecursionError."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        # A name with half a surrogate pair is one consumer's problem, not that of the whole page.
        return json.loads(content)


Params = Mapping[str, str | int | list[str]]

_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
_MAX_DETAIL = 300


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An API: what messages call it, where it is, and the header with its token.

    `token_setting` is the name of the setting that holds the token, for the message of a 401 or 403;
    `rights` says what the token must allow. With `unix_socket`, a path, the requests go there.
    """

    name: str
    url: str
    token_setting: str
    rights: str
    token_header: str = "Authorization"  # noqa: S105 - a header's name
    token: str | None = None
    timeout: float = 10.0
    unix_socket: str | None = None

    @property
    def address(self) -> str:
        """Return where it is, for messages."""
        return f"unix:{self.unix_socket}" if self.unix_socket else self.url

    def headers(self) -> dict[str, str]:
        """Return the headers of every request."""
        headers = {"User-Agent": f"kong-openmeter-syncd/{__version__}", "Accept": "application/json"}
        if self.token:
            bearer = self.token_header == "Authorization"  # noqa: S105 - a header's name
            headers[self.token_header] = f"Bearer {self.token}" if bearer else self.token
        return headers


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: httpx.Headers
    content: bytes


class ApiClient(Closable):
    """Requests to one API; answers are decoded JSON. Safe to share between threads."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._endpoint = endpoint
        self._retry = retry
        self._client = self._opened()
        # Each request takes a client for itself: a pool of httpcore (1.0.9) that threads share may close
        # a connection on which one of them waits for its answer (encode/httpcore#1110).
        self._idle = deque([self._client])
        # Requests are made of these: to let httpx merge them anew costs a third of a request.
        self._base = endpoint.url.rstrip("/")
        self._headers = self._client.headers.raw
        self._json_headers = [*self._headers, (b"Content-Type", b"application/json")]
        self._extensions = {"timeout": self._client.timeout.as_dict()}

    def close(self) -> None:
        """Close the connections."""
        while self._idle:
            self._idle.pop().close()

    def _opened(self) -> httpx.Client:
        socket = self._endpoint.unix_socket
        return httpx.Client(
            base_url=self._endpoint.url,
            headers=self._endpoint.headers(),
            timeout=self._endpoint.timeout,
            verify=_tls() if httpx.URL(self._endpoint.url).scheme == "https" else _no_tls(),
            transport=httpx.HTTPTransport(uds=socket) if socket else None,
        )

    @contextmanager
    def _taken(self) -> Iterator[httpx.Client]:
        """Have a client that no other thread uses meanwhile; as many are opened as requests are under way."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = self._opened()
        try:
            yield client
        finally:
            self._idle.append(client)

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
        expected: frozenset[int] = frozenset(),
    ) -> object:
        """Send one request and return the decoded answer, None for an empty one.

        `repeat=False` sends it once: for writes whose repetition could undo what someone did meanwhile.
        `expected` are statuses whose body is the answer too, besides 2xx.
        """

        def attempt() -> _Answer:
            return self._once(method, path, params, body, expected)

        answer = self._retry.run(attempt) if repeat else attempt()
        return self._decoded(answer, method, path, expected)

    def _once(
        self, method: str, path: str, params: Params | None, body: object, expected: frozenset[int]
    ) -> _Answer:
        unanswered = f"{self._endpoint.name} at {self._endpoint.address} did not answer {method} {path}"
        try:
            answer = self._send(method, path, params, body)
        except httpx.RequestError as error:
            request_counter.count(self._endpoint.name, method, "none")
            raise UnreachableError(f"{unanswered}: {_describe(error)}") from None
        request_counter.count(self._endpoint.name, method, str(answer.status))
        if answer.status in _TRANSIENT_STATUS and answer.status not in expected:
            problem = f"HTTP {answer.status} {self._detail(answer)}".strip()
            wait = _retry_after(answer.headers.get("retry-after"))
            raise UnreachableError(f"{unanswered}: {problem}", retry_after=wait)
        return answer

    def _send(self, method: str, path: str, params: Params | None, body: object) -> _Answer:
        request = httpx.Request(
            method,
            _url(self._base + path),
            params=params,
            headers=self._headers if body is None else self._json_headers,
            content=None if body is None else encoded(body),
            extensions=self._extensions,
        )
        # httpx's own reading keeps the content in a cycle of objects, so that pages pile up in memory.
        with self._taken() as client, closing(client.send(request, stream=True)) as response:
            content = b"".join(response.iter_bytes())
        return _Answer(response.status_code, response.headers, content)

    def _decoded(self, answer: _Answer, method: str, path: str, expected: frozenset[int]) -> object:
        status = answer.status
        if status in expected:
            return self._json(answer, method, path)
        if 200 <= status < 300:
            return self._json(answer, method, path) if answer.content else None
        if status in {401, 403}:
            raise UnauthorizedError(self._unauthorized(status, method, path))
        where = f"{self._endpoint.name} at {self._endpoint.address}"
        if 400 <= status < 500:
            detail = self._detail(answer)
            message = f"{where} refused {method} {path}: HTTP {status} {detail}".rstrip()
            raise RefusedError(message, status=status, detail=detail)
        raise MalformedError(f"{where} answered {method} {path} with HTTP {status}: is its URL right?")

    def _json(self, answer: _Answer, method: str, path: str) -> object:
        try:
            return parsed(answer.content)
        except (ValueError, RecursionError):
            where = f"{self._endpoint.name} at {self._endpoint.address}"
            raise MalformedError(
                f"{where} answered {method} {path} with something that is not JSON: is its URL right?"
            ) from None

    def _unauthorized(self, status: int, method: str, path: str) -> str:
        endpoint = self._endpoint
        given = "the token of" if endpoint.token else "no token is set in"
        fault = "is missing, wrong or expired" if status == 401 else "lacks the rights"
        return (
            f"{endpoint.name} at {endpoint.address} answered {method} {path} with HTTP {status}: {given}"
            f" {endpoint.token_setting}; a token {fault}. It must allow to {endpoint.rights}"
        )

    def _detail(self, answer: _Answer) -> str:
        """Return what the server said (problem+json or Kong's message), never with our token in it."""
        try:
            body = parsed(answer.content)
        except (ValueError, RecursionError):
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


@cache
def _no_tls() -> ssl.SSLContext:
    """Return settings for where there is no TLS; they trust nobody, should it come to that."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@lru_cache(maxsize=256)
def _url(text: str) -> httpx.URL:
    return httpx.URL(text)


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


def expect_objects(values: object, api: str, what: str, entry: str) -> list[dict[str, object]]:
    """Return `values` if it is a JSON array of objects, each called `entry`; raises MalformedError."""
    for value in (listed := expect_list(values, api, what)):
        if not isinstance(value, dict):
            raise MalformedError(f"{api}: {entry} is not a JSON object")
    return cast("list[dict[str, object]]", listed)


def _describe(error: httpx.RequestError) -> str:
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
