"""What every request passes before and after its handler: the token, the faults and the count of requests."""

import hmac
from collections import Counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from syncd.sandbox.faults import Action, Fault, Faults
from syncd.sandbox.problems import ProblemError

ABORT = "syncd.sandbox.abort"
"""The scope's key for a function that closes the client's connection at once: see server.py."""


class Gate:
    """The ASGI application around the API."""

    def __init__(self, api: ASGIApp, faults: Faults, requests: Counter[str], token: str | None) -> None:
        self._api = api
        self._faults = faults
        self._requests = requests
        self._expected = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or fail it as a fault demands."""
        if scope["type"] != "http":
            await self._api(scope, receive, send)
            return
        if not self._is_allowed(scope):
            problem = ProblemError(401, "unauthorized error: a bearer token is required")
            await problem.response()(scope, receive, send)
            return
        fault = self._faults.take(scope["method"], scope["path"])
        if fault is None:
            await self._api(scope, receive, send)
        else:
            await self._fail(fault, scope, receive, send)
        # The router leaves its choice in the scope: one entry for all customers, not one for each.
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
            problem = ProblemError(fault.status, "a failure on a test's demand", headers=headers)
            await problem.response()(scope, receive, send)
            return
        if fault.action in (Action.ACCEPT_THEN_CUT, Action.ACCEPT_THEN_TIMEOUT):
            await self._api(scope, receive, _swallow)
        if fault.action in (Action.CUT, Action.ACCEPT_THEN_CUT):
            scope[ABORT]()
        # Without an answer of ours the server would make one, unless the client has gone by then.
        while (await receive())["type"] != "http.disconnect":
            pass


async def _swallow(_message: Message) -> None:
    """Answer nobody."""
