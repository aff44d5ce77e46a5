"""The gate's process: a child of the supervisor, so that a gate that fails or hangs delays nobody.

It serves a Unix socket: feed and reports of Kong's workers, view and overrides for operators.
"""

from __future__ import annotations

import asyncio
import gc
import re
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final

import uvloop
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse

from openmeter_plugin import __version__
from openmeter_plugin.gate.kongs import Place
from openmeter_plugin.gate.lines import ReportError
from openmeter_plugin.gate.overrides import OverrideRequest
from openmeter_plugin.gate.service import Gate
from openmeter_plugin.gate.settings import Settings
from openmeter_plugin.gate.view import view
from openmeter_plugin.log import get_logger
from openmeter_plugin.process.web_server import EmbeddedServer, forward_log

MAX_REPORT: Final = 1024 * 1024
_SINCE: Final = re.compile(r"([0-9a-f]+)(?:z(\d+))?\.(\d+)")
"""Epoch, where the full state began if it is not complete yet, and number: `Kongs.feed` makes it."""
_Kong = Annotated[str, Query(pattern="^[0-9a-zA-Z_-]{1,64}$")]


def create_app(gate: Gate) -> FastAPI:
    """Return the application behind the socket."""
    app = FastAPI(title="openmeter-gate", version=__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(OSError)
    async def unwritable(_: Request, error: OSError) -> JSONResponse:
        """Refuse what cannot be kept: nothing has changed then."""
        return JSONResponse({"detail": f"the overrides cannot be written: {error.strerror}"}, 503)

    @app.get("/v1/feed")
    async def feed(
        kong: _Kong,
        since: str = "0.0",
        wait: Annotated[float, Query(ge=0, le=25)] = 10.0,
        lua: Annotated[str, Query(max_length=64)] = "",
    ) -> Response:
        """Return what changed since a number, as soon as there is something."""
        found = _SINCE.fullmatch(since)
        if found is None:
            raise HTTPException(400, "since: must be an epoch, a dot and a number, as an answer has them")
        place = Place(found[1], int(found[3]), int(found[2] or 0))
        body = await gate.kongs.feed(kong, place, wait, lua)
        return Response(body, media_type="text/plain; charset=utf-8")

    @app.post("/v1/report", status_code=204)
    async def report(request: Request, kong: _Kong) -> Response:
        """Take what a worker has to report."""
        content = await request.body()
        if len(content) > MAX_REPORT:
            raise HTTPException(413, f"a report has at most {MAX_REPORT} bytes")
        try:
            gate.kongs.report(kong, content.decode("utf-8", "replace"))
        except ReportError as error:
            raise HTTPException(400, str(error)) from None
        return Response(status_code=204)

    @app.get("/v1/gate")
    async def state() -> dict[str, Any]:
        """Return the gate's state."""
        return await view(gate)

    @app.post("/v1/gate/overrides", status_code=201)
    async def allow(body: OverrideRequest) -> dict[str, Any]:
        """Allow a subject everything for a time."""
        override = gate.allow(body.subject, body.seconds, body.why, body.by)
        return {"subject": override.subject, "until": override.until}

    @app.delete("/v1/gate/overrides", status_code=204)
    async def end(subject: str) -> Response:
        """End an override."""
        if not gate.end_override(subject):
            raise HTTPException(404, "there is no override of this subject")
        return Response(status_code=204)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Return 200 while the event loop runs."""
        return {"status": "ok"}

    return app


async def serve(gate: Gate, listener: socket.socket) -> None:
    """Serve the socket until cancelled."""
    forward_log("gate_server")
    server = EmbeddedServer(create_app(gate), timeout_keep_alive=60, timeout_graceful_shutdown=1)
    await server.serve(sockets=[listener])


def run_gate(
    listener: socket.socket, settings: Settings, spool: Path, heartbeat: Coroutine[Any, Any, None]
) -> None:
    """Run the gate until SIGTERM or SIGINT; `heartbeat` runs on its event loop."""
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(listener, settings, spool, heartbeat))


async def _run(
    listener: socket.socket, settings: Settings, spool: Path, heartbeat: Coroutine[Any, Any, None]
) -> None:
    gate = Gate(settings, spool)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tasks = [loop.create_task(each) for each in (heartbeat, gate.run(), serve(gate, listener))]
    stopping = loop.create_task(stop.wait())
    get_logger().info("gate_started", mode=settings.mode, features=[it.key for it in settings.features])
    done, _ = await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if stopping not in done:
        for result in results:
            if isinstance(result, Exception):
                raise result
    get_logger().info("gate_stopped")
