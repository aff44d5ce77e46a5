"""Web server of the HTTP API, on the event loop of the delivery process; imported only if it is enabled."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

import uvicorn

from openmeter_plugin.api.access import Access, AccessMiddleware
from openmeter_plugin.api.app import create_app
from openmeter_plugin.api.health import HealthMonitor
from openmeter_plugin.log import get_logger
from openmeter_plugin.process.web_server import EmbeddedServer, forward_log, limited_protocol

_MAX_CONNECTIONS: Final = 64
_ACCEPTED_AT_ONCE: Final = 16
"""asyncio accepts `backlog` connections in one turn, and closes one over the limit three turns later:
with 64 at once, a burst took 256 descriptors."""
_READ_TIMEOUT: Final = 10.0  # seconds for a request's head
_KEEP_ALIVE: Final = 30  # seconds
_RETRY_SECONDS: Final = 5.0


async def serve_api(listener: socket.socket, monitor: HealthMonitor, access: Access) -> None:
    """Serve until cancelled. After an exception it starts again, so that the delivery is not affected."""
    forward_log("api_server")
    while True:
        config = uvicorn.Config(
            AccessMiddleware(create_app(monitor), access),
            http=limited_protocol(_READ_TIMEOUT, _MAX_CONNECTIONS),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_ACCEPTED_AT_ONCE,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        try:
            await EmbeddedServer(config).serve([socket.socket(fileno=socket.dup(listener.fileno()))])
        except Exception:
            get_logger().exception("api_failed")
        await asyncio.sleep(_RETRY_SECONDS)
