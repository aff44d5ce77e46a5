"""`make demo KONG=1`: a real `kong` from the PATH in the place of the recordings.

The plugin server is there before Kong, as the README recommends. Started by Kong itself, it comes after
Kong's workers, and the requests of those first moments would be missing from the bill.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Final

import httpx

from openmeter_plugin.config.lua_plugin import FOLDER, lua_files
from tests.demo.gateway import Gateway
from tests.demo.traffic import APPLICATION_SUBJECT, Expected
from tests.harness.ports import free_port

CONCURRENCY: Final = 16
_TOKENS: Final = (12, 30)  # what kong.yml's pre-function reports for each request to /chat


class KongMissing(RuntimeError):
    """There is no kong, or it does not start; the message says what to do."""


@contextmanager
def upstream() -> Iterator[str]:
    """Serve an API to put behind the gateway."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = b'{"forecast": "fair"}'
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def kong(
    directory: Path,
    gateway: Gateway,
    plugin_socket: Path,
    token: str,
    segments: Path | None = None,
    query: str | None = None,
) -> Iterator[str]:
    """Start Kong with the plugin enabled as the README has it; yields the URL of its proxy.

    With `segments` the plugin is the one in Lua, which writes there; otherwise Kong calls the plugin server,
    and `query` is its query command.
    """
    program = shutil.which("kong")
    if program is None:
        raise KongMissing("there is no `kong` in the PATH; `make demo` without KONG=1 needs none")
    gateway.write(directory / "kong.yml")
    port = free_port()
    # Kong's workers drop root, and the demo's directory is open to its owner only.
    user = "nginx_user = root root" if os.geteuid() == 0 else ""
    info = query or f"{Path(sys.executable).with_name('openmeter-plugin')} info"
    settings = f"""
pluginserver_names = openmeter
pluginserver_openmeter_socket = {plugin_socket}
pluginserver_openmeter_query_cmd = {info}
"""
    if segments is not None:
        place = directory / "lua" / FOLDER
        place.mkdir(parents=True)
        for name, text in lua_files().items():
            (place / name).write_text(text)
        settings = f"""
lua_package_path = {directory}/lua/?.lua;;
nginx_main_env = OPENMETER_PLUGIN_SEGMENTS={segments}
"""
    (directory / "kong.conf").write_text(
        f"""
database = off
declarative_config = {directory}/kong.yml
plugins = key-auth, pre-function, openmeter
proxy_listen = 127.0.0.1:{port}
admin_listen = off
status_listen = off
admin_gui_listen = off
anonymous_reports = off
nginx_worker_processes = 2
{user}
log_level = info
{settings}"""
    )
    prefix = str(directory / "kong")
    run = [program, "start", "-p", prefix, "-c", str(directory / "kong.conf")]
    environment = os.environ | {"OPENMETER_API_TOKEN": token}
    started = subprocess.run(run, env=environment, capture_output=True, text=True)
    if started.returncode:
        raise KongMissing(f"kong does not start: {started.stderr.strip() or started.stdout.strip()}")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([program, "stop", "-p", prefix], capture_output=True)


def drive(proxy: str, gateway: Gateway, count: int, expected: Expected, advance: Callable[[], None]) -> None:
    """Send so many requests through Kong and note what they must come to."""
    asyncio.run(_drive(proxy, gateway, count, expected, advance))


async def _drive(
    proxy: str, gateway: Gateway, count: int, expected: Expected, advance: Callable[[], None]
) -> None:
    pending = iter(list(_requests(gateway, count, expected)))

    async with httpx.AsyncClient(base_url=proxy, timeout=30, trust_env=False) as client:
        await _until_configured(client)

        async def lane() -> None:
            for path, key, status in pending:
                answer = await client.get(path, headers={"apikey": key} if key else {})
                if answer.status_code != status:
                    raise KongMissing(f"GET {path} answered {answer.status_code} instead of {status}")
                advance()

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(lane())


async def _until_configured(client: httpx.AsyncClient) -> None:
    """Wait for Kong to route; the path that is asked for belongs to nobody, so it is billed to nobody."""
    try:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/")).status_code == httpx.codes.NOT_FOUND:
                        return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise KongMissing("kong has started, but does not route within 30 s") from None


def _requests(gateway: Gateway, count: int, expected: Expected) -> Iterator[tuple[str, str | None, int]]:
    """Yield (path, API key, expected status)."""
    random = Random(1)
    paying = [consumer for consumer in gateway.consumers if consumer.key]
    for _ in range(count):
        kind = random.choices(("weather", "chat", "application", "visitor", "refused"), (10, 3, 2, 1, 1))[0]
        consumer = random.choices(paying, weights=range(1, len(paying) + 1))[0]
        if kind == "weather":
            expected.bill(consumer.subject)
            yield "/weather", consumer.key, httpx.codes.OK
        elif kind == "chat":
            expected.bill(consumer.subject, _TOKENS)
            yield "/chat", consumer.key, httpx.codes.OK
        elif kind == "application":
            expected.bill(APPLICATION_SUBJECT)
            yield "/apps/weather", None, httpx.codes.OK
        else:
            expected.skipped += 1
            refused = kind == "refused"
            yield (
                "/chat" if refused else "/weather",
                None,
                httpx.codes.UNAUTHORIZED if refused else httpx.codes.OK,
            )
