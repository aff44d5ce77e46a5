"""The HTTP client for all APIs that syncd talks to, its JSON codec, and its counter of requests.

`ApiClient` returns decoded JSON or raises an error of `syncd.core.errors`. It retries network errors, 429,
500, 502, 503 and 504 (see `syncd.http.retry`).
"""

from __future__ import annotations

import json
import ssl
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache
from typing import Literal, Self, cast

import httpx
import orjson

from syncd import __version__
from syncd.core.errors import MalformedError, RefusedError, UnauthorizedError, UnreachableError
from syncd.http.retry import Retry

Api = Literal["metering", "kong-admin", "konnect", "plugin", "daemon"]
"""An API by the identifier that the metrics label it with."""

_NAMES: dict[Api, str] = {
    "metering": "metering API",
    "kong-admin": "Kong's Admin API",
    "konnect": "Konnect",
    "plugin": "the plugin's API",
    "daemon": "the daemon",
}
"""How messages call each API."""

Params = Mapping[str, str | int | list[str]]

_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
_MAX_DETAIL = 300

_counter_lock = threading.Lock()
_request_counts: Counter[tuple[str, str, str]] = Counter()


class Closable(ABC):
    """Base class that closes its HTTP client at the end of a `with`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


def encode_json(value: object) -> bytes:
    """Encode with orjson, and with the slower json module what orjson refuses."""
    try:
        return orjson.dumps(value)
    except TypeError:  # a number beyond 64 bits, or half a surrogate pair, that another client wrote
        return json.dumps(value).encode()


def decode_json(content: bytes) -> object:
    """Decode with orjson, and with the slower json module what orjson refuses.

    Raises ValueError or RecursionError.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        # A name with half a surrogate pair must fail that one consumer, not the whole page.
        return json.loads(content)


def request_counts() -> dict[tuple[str, str, str], int]:
    """Return the requests since the start of the process by API, method and status.

    The status is ``none`` for a request without an answer.
    """
    with _counter_lock:
        return dict(_request_counts)


def _count_request(api: Api, method: str, status: str) -> None:
    with _counter_lock:
        _request_counts[api, method, status] += 1


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an API is, and the token for it.

    `token_setting` is the name of the setting that holds the token, and `rights` are the permissions that
    the token needs; both are for the message of a 401 or 403. With `unix_socket`, a path, the requests go
    there.
    """

    api: Api
    url: str
    token_setting: str
    rights: str
    token_header: str = "Authorization"  # noqa: S105 - a header's name
    token: str | None = None
    timeout: float = 10.0
    unix_socket: str | None = None

    @property
    def location(self) -> str:
        """Return name and address of the API, for messages."""
        return f"{_NAMES[self.api]} at {f'unix:{self.unix_socket}' if self.unix_socket else self.url}"

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
    """Client of one API; answers are decoded JSON. Safe to share between threads."""

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        self._endpoint = endpoint
        self._retry = retry
        self._client = self._open_client()
        # Each request takes an httpx client of its own: a pool of httpcore (1.0.9) that threads share may
        # close a connection on which one of them waits for its answer (encode/httpcore#1110).
        self._idle = deque([self._client])
        # Built once: letting httpx merge them for each request costs a third of a request.
        self._base = endpoint.url.rstrip("/")
        self._headers = self._client.headers.raw
        self._json_headers = [*self._headers, (b"Content-Type", b"application/json")]
        self._extensions = {"timeout": self._client.timeout.as_dict()}

    def close(self) -> None:
        """Close the connections."""
        while self._idle:
            self._idle.pop().close()

    def _open_client(self) -> httpx.Client:
        socket = self._endpoint.unix_socket
        return httpx.Client(
            base_url=self._endpoint.url,
            headers=self._endpoint.headers(),
            timeout=self._endpoint.timeout,
            verify=_tls() if httpx.URL(self._endpoint.url).scheme == "https" else _no_tls(),
            transport=httpx.HTTPTransport(uds=socket) if socket else None,
        )

    @contextmanager
    def _exclusive_client(self) -> Iterator[httpx.Client]:
        """Take a client that no other thread uses; there are as many as requests in flight."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = self._open_client()
        try:
            yield client
        finally:
            self._idle.append(client)

    def get(self, path: str, params: Params | None = None) -> object:
        """Send a GET request and return the decoded answer; raises an ApiError."""
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

        `repeat=False` sends it once: for writes whose repetition could undo the edit of someone else.
        `expected` are statuses other than 2xx whose body is an answer too.
        """

        def attempt() -> _Answer:
            return self._try_once(method, path, params, body, expected)

        answer = self._retry.run(attempt) if repeat else attempt()
        return self._decode(answer, method, path, expected)

    def _try_once(
        self, method: str, path: str, params: Params | None, body: object, expected: frozenset[int]
    ) -> _Answer:
        unanswered = f"{self._endpoint.location} did not answer {method} {path}"
        try:
            answer = self._send(method, path, params, body)
        except httpx.RequestError as error:
            _count_request(self._endpoint.api, method, "none")
            raise UnreachableError(f"{unanswered}: {_describe(error)}") from None
        _count_request(self._endpoint.api, method, str(answer.status))
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
            content=None if body is None else encode_json(body),
            extensions=self._extensions,
        )
        # httpx's own read() keeps the content in a reference cycle, so that pages pile up in memory.
        with self._exclusive_client() as client, closing(client.send(request, stream=True)) as response:
            content = b"".join(response.iter_bytes())
        return _Answer(response.status_code, response.headers, content)

    def _decode(self, answer: _Answer, method: str, path: str, expected: frozenset[int]) -> object:
        status = answer.status
        if status in expected:
            return self._json(answer, method, path)
        if 200 <= status < 300:
            return self._json(answer, method, path) if answer.content else None
        if status in {401, 403}:
            raise UnauthorizedError(self._unauthorized(status, method, path))
        where = self._endpoint.location
        if 400 <= status < 500:
            detail = self._detail(answer)
            message = f"{where} refused {method} {path}: HTTP {status} {detail}".rstrip()
            raise RefusedError(message, status=status, detail=detail)
        raise MalformedError(f"{where} answered {method} {path} with HTTP {status}: is its URL right?")

    def _json(self, answer: _Answer, method: str, path: str) -> object:
        try:
            return decode_json(answer.content)
        except (ValueError, RecursionError):
            raise MalformedError(
                f"{self._endpoint.location} answered {method} {path} with something that is not JSON:"
                " is its URL right?"
            ) from None

    def _unauthorized(self, status: int, method: str, path: str) -> str:
        endpoint = self._endpoint
        if endpoint.token:
            fault = "is wrong or expired" if status == 401 else "lacks the rights"
            problem = f"the token of {endpoint.token_setting} {fault}"
        else:
            problem = f"no token is set in {endpoint.token_setting}"
            problem += "" if status == 401 else ", and access without one lacks the rights"
        return (
            f"{endpoint.location} answered {method} {path} with HTTP {status}: {problem}."
            f" The token needs permission to {endpoint.rights}"
        )

    def _detail(self, answer: _Answer) -> str:
        """Return the server's explanation (problem+json or Kong's message), with the token masked."""
        try:
            body = decode_json(answer.content)
        except (ValueError, RecursionError):
            body = None
        detail = ""
        if isinstance(body, dict):
            text = body.get("detail") or body.get("message") or body.get("title")
            detail = str(text) if text else ""
        if self._endpoint.token:
            detail = detail.replace(self._endpoint.token, "***")
        return " ".join(detail.split())[:_MAX_DETAIL]


@cache
def _tls() -> ssl.SSLContext:
    """Return the TLS settings that all clients share: loading the certificates is slow."""
    return httpx.create_ssl_context()


@cache
def _no_tls() -> ssl.SSLContext:
    """Return TLS settings for plain HTTP: they trust no certificate, should one ever be needed."""
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
    """Return `values` if it is a JSON array of objects; raises MalformedError, which calls one `entry`."""
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
