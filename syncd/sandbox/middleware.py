"""ASGI middleware around every request: checks the token, injects faults, counts requests."""

import hmac
import re
from collections import Counter
from urllib.parse import quote, unquote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from syncd.sandbox.api.common import PLACEHOLDER
from syncd.sandbox.faults import Action, Fault, Faults
from syncd.sandbox.problems import ProblemError

_UNESCAPED_BY_GO = "/$&+,:;=@"
ABORT = "syncd.sandbox.abort"
"""Key in the ASGI scope of a function that aborts the client's connection; set in server.py."""


class SandboxMiddleware:
    """The ASGI application around the API."""

    def __init__(self, api: ASGIApp, faults: Faults, requests: Counter[str], token: str | None) -> None:
        self._api = api
        self._faults = faults
        self._requests = requests
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or make it fail if a fault matches."""
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        if not self._is_allowed(scope):
            problem = ProblemError(401, "unauthorized error: a bearer token is required")
            await problem.response()(scope, receive, send)
            return
        fault = self._faults.take(scope["method"], scope["path"])
        try:
            scope["path"] = _path_with_encoded_slashes(scope)
        except ProblemError as problem:
            await problem.response()(scope, receive, send)
            return
        if fault is None:
            await self._api(scope, receive, send)
        else:
            await self._fail(fault, scope, receive, send)
        # The router stores the matched route in the scope: one entry for all customers, not one per customer.
        path = getattr(scope.get("route"), "path", scope["path"])
        self._requests[f"{scope['method']} {path}"] += 1

    def _is_allowed(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] == "/healthz":
            return True
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode("latin-1"), self._expected)

    async def _fail(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        if fault.action is Action.ANSWER:
            headers = {} if fault.retry_after is None else {"retry-after": str(fault.retry_after)}
            problem = ProblemError(fault.status, "injected by a test", headers=headers)
            await problem.response()(scope, receive, send)
            return
        if fault.action in (Action.ACCEPT_THEN_CUT, Action.ACCEPT_THEN_TIMEOUT):
            await self._api(scope, receive, _discard)
        if fault.action in (Action.CUT, Action.ACCEPT_THEN_CUT):
            scope[ABORT]()
        # If this returned without an answer, uvicorn would send one, so wait until the client has gone.
        while (await receive())["type"] != "http.disconnect":
            pass


def _path_with_encoded_slashes(scope: Scope) -> str:
    """Return the path with a placeholder for each %2F: OpenMeter's router matches before it decodes."""
    raw = scope["raw_path"].partition(b"?")[0].decode("latin-1")
    # Go keeps the path as it was sent only if that is not the shortest encoding. Without it OpenMeter's
    # router matches the decoded path, whose parts are then decoded once more.
    if raw == quote(unquote(raw), safe=_UNESCAPED_BY_GO):
        raw = unquote(raw)
        if broken := re.search("%(?![0-9A-Fa-f]{2}).{0,2}", raw):
            raise ProblemError(400, f"invalid param format: invalid URL escape {broken[0]!r}")
    return unquote(re.sub("%2f", quote(PLACEHOLDER), raw, flags=re.IGNORECASE))


async def _discard(_message: Message) -> None:
    """Drop the answer."""
