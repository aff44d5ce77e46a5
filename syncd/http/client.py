"""The HTTP client for all APIs that syncd talks to, and its counter of requests.

`ApiClient` returns decoded JSON or raises an error of `syncd.core.errors`. It retries network errors, 429,
500, 502, 503 and 504, but not what a retry cannot fix (`syncd.http.failures`).
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self, TypeVar
from urllib.parse import quote, urlencode

import httpcore

from syncd.core.errors import StoppedError
from syncd.http.connection import Answer, AnswerError, Connections
from syncd.http.endpoint import Api, Endpoint, no_tls
from syncd.http.failures import REQUEST_ERRORS, Failures
from syncd.http.json import decode_json, encode_json
from syncd.http.retry import Retry

Params = Mapping[str, str | int | list[str]]
_T = TypeVar("_T")

_TRANSIENT_STATUS = frozenset({429, 500, 502, 503, 504})
_JSON = "application/json"

_counter_lock = threading.Lock()
_request_counts: Counter[tuple[str, str, str]] = Counter()


def request_counts() -> dict[tuple[str, str, str], int]:
    """Return the requests since the start of the process by API, method and status.

    The status is ``none`` for a request without an answer.
    """
    with _counter_lock:
        return dict(_request_counts)


def _count_request(api: Api, method: str, status: str) -> None:
    with _counter_lock:
        _request_counts[api, method, status] += 1


class ApiClient:
    """Client of one API; answers are decoded JSON. Safe to share between threads.

    The constructor raises ConfigError for a token, certificate or proxy that cannot be used.
    """

    def __init__(self, endpoint: Endpoint, retry: Retry) -> None:
        url = endpoint.parsed_url()
        self._endpoint = endpoint
        self._proxy = endpoint.resolved_proxy()
        self._failures = Failures(endpoint, self._proxy)
        scheme, host, port = url.raw_scheme, url.raw_host, url.port
        self._origin = (scheme, host, port)
        self._prefix = url.raw_path.decode().rstrip("/")
        self._tls = endpoint.tls_context() if scheme == b"https" else no_tls()
        self._retry = retry.at_pace_of(endpoint.unix_socket or f"{url.scheme}://{url.netloc.decode()}")
        self._headers = [(b"Host", url.netloc), (b"Accept-Encoding", b"gzip")]
        self._headers += [(name.encode(), value.encode()) for name, value in endpoint.headers().items()]
        # One for each request in flight (see Connections).
        self._idle: deque[Connections] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        while self._idle:
            self._idle.pop().close()

    def repeat(self, attempt: Callable[[], _T]) -> _T:
        """Repeat several requests as one, by the policy and at the pace of this client.

        For writes that have to read again before they are repeated; their requests have `repeat=False`.
        """
        return self._retry.run(attempt)

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
        content_type: str = _JSON,
    ) -> object:
        """Send one request and return the decoded answer, None for an empty one.

        `path` is percent-encoded. `repeat=False` sends it once: for writes whose repetition could undo the
        edit of someone else. `expected` are statuses other than 2xx whose body is an answer too.
        """
        what = f"{method} {path}"
        content = None if body is None else encode_json(body)
        url = self._url(path, params)

        def attempt() -> Answer:
            answer = self._send(method, url, content, content_type, what)
            if answer.status in _TRANSIENT_STATUS and answer.status not in expected:
                raise self._failures.transient(answer, what)
            return answer

        answer = self._retry.run(attempt, once=not repeat)
        if answer.status in expected or (answer.content and 200 <= answer.status < 300):
            return self._json(answer, what)
        if 200 <= answer.status < 300:
            return None
        raise self._failures.refused(answer, what)

    def header(self, name: str) -> str | None:
        """Return a header of an answer of any status to GET of the URL itself, None if it has none.

        Sent once; raises UnreachableError, MalformedError or StoppedError.
        """
        answer = self._send("GET", self._url("" if self._prefix else "/", None), None, _JSON, "GET /")
        return answer.header(name)

    def _send(
        self, method: str, url: httpcore.URL, content: bytes | None, content_type: str, what: str
    ) -> Answer:
        headers = self._headers
        if content is not None:
            length = str(len(content)).encode()
            headers = [*headers, (b"Content-Type", content_type.encode()), (b"Content-Length", length)]
        elif method in {"POST", "PUT", "PATCH"}:
            headers = [*headers, (b"Content-Length", b"0")]
        status = "none"
        try:
            with self._exclusive_connections() as connections:
                answer = connections.send(method, url, headers, content)
            status = str(answer.status)
        except AnswerError as error:
            raise self._failures.unreadable(error, what) from None
        except StoppedError:
            message = f"stopped by request while {self._endpoint.location} was asked {what}"
            raise StoppedError(message) from None
        except REQUEST_ERRORS as error:
            raise self._failures.unanswered(error, what) from None
        finally:
            _count_request(self._endpoint.api, method, status)
        return answer

    @contextmanager
    def _exclusive_connections(self) -> Iterator[Connections]:
        """Take connections that no other thread uses; there are as many as requests in flight."""
        try:
            connections = self._idle.pop()
        except IndexError:
            connections = Connections(self._endpoint, self._proxy, self._tls, self._retry)
        try:
            yield connections
        finally:
            self._idle.append(connections)

    def _url(self, path: str, params: Params | None) -> httpcore.URL:
        scheme, host, port = self._origin
        target = self._prefix + (path if path.isascii() else quote(path, safe="/%:@!$&'()*+,;=~"))
        if params:
            target += f"?{urlencode(params, doseq=True)}"
        return httpcore.URL(scheme=scheme, host=host, port=port, target=target.encode())

    def _json(self, answer: Answer, what: str) -> object:
        try:
            return decode_json(answer.content)
        except (ValueError, RecursionError):
            raise self._failures.not_json(what) from None
