"""The sandbox's HTTP server, on a real socket."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from syncd.sandbox.api.app import create_app
from syncd.sandbox.middleware import ABORT
from syncd.sandbox.settings import Settings

GRACE_SECONDS = 5
"""How long requests in progress may take after a stop was requested."""


def listen(host: str, port: int) -> socket.socket:
    """Bind the address, which fixes its port and reserves it. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def url_of(listener: socket.socket) -> str:
    """Return the base URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class SandboxServer(uvicorn.Server):
    """A uvicorn server that calls `on_start` once it accepts connections."""

    def __init__(
        self, settings: Settings, on_start: Callable[[], None], *, grace_seconds: int = GRACE_SECONDS
    ) -> None:
        config = uvicorn.Config(
            create_app(settings),
            http=_AbortableProtocol,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            headers=[("server", "kong-openmeter-sandbox"), ("x-kong-openmeter", "sandbox")],
            timeout_graceful_shutdown=grace_seconds,
        )
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `on_start`."""
        await super().startup(sockets)
        self._on_start()


def run_until_signalled(host: str, port: int, settings: Settings) -> None:
    """Serve in this thread until SIGTERM or SIGINT, as `syncd.sandbox.serve` describes."""
    with listen(host, port) as listener:
        _run(listener, settings)


def _run(listener: socket.socket, settings: Settings) -> None:
    def announce() -> None:
        print(f"sandbox: {url_of(listener)} (development only)", file=sys.stderr, flush=True)

    server = SandboxServer(settings, announce)
    # uvicorn raises the signal again after it has stopped; here that is a normal exit.
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(_signal: int, _frame: object) -> None:
    """Replace the default handler, which would kill the process."""


class _AbortableProtocol(H11Protocol):
    """HTTP/1.1 whose handlers can abort the connection: faults need that, and ASGI has no message for it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        application: Any = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            scope[ABORT] = transport.abort
            await application(scope, receive, send)

        self.app = with_abort
