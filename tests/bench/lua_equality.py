"""`python -m tests.bench.lua_equality`: the Lua plugin's records against kong.log.serialize, in a real Kong.

A Kong gets about a hundred requests of unusual kinds: methods, bodies, broken HTTP, clients that hang up,
errors of Kong and of the upstream, values that other plugins set. For each, the Lua plugin writes its record
and a witness, another Lua plugin that runs right after it, what kong.log.serialize returns. Both have to make
the same events. With `--record FOLDER` the segments and the logs become test data. Needs `kong` in the PATH.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
from rich.console import Console

from tests.bench.kong import Lua, started
from tests.harness.process import eventually
from tests.plugin.lua.equality import CONFIG, compact, differences
from tests.plugin.lua.stand_in import lines

KEY: Final = "a-consumers-key"
ANONYMOUS: Final = "5f2e1d2c-0000-4000-8000-000000000001"

_WITNESS: Final = """
local cjson = require "cjson.safe"
local Witness = { PRIORITY = 14, VERSION = "1" }
function Witness:log(conf)
  local ok, log = pcall(kong.log.serialize)
  local named = kong.request.get_uri_captures and kong.request.get_uri_captures().named
  local file = io.open(conf.path, "a")
  file:write(cjson.encode({
    log = ok and log or nil, fault = not ok and tostring(log) or nil, captures = named,
    application = kong.ctx.shared.kaa_application_context,
  }), "\\n")
  file:close()
end
return Witness
"""
_WITNESS_SCHEMA: Final = """
return { name = "witness", fields = { { config = { type = "record", fields = {
  { path = { type = "string", required = true } } } } } } }
"""


class _Upstream(BaseHTTPRequestHandler):
    """Answers by the path: slowly, in chunks, with errors, not at all."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with suppress(ConnectionError, ValueError):
            self._answer()

    def _answer(self) -> None:
        if length := int(self.headers.get("content-length") or 0):
            self.rfile.read(length)
        path = self.path.partition("?")[0]
        if "slow" in path:
            time.sleep(1.5)
        if "hangup" in path:
            self.close_connection = True
            return
        if "switch" in path:
            self._head(101, [("upgrade", "websocket"), ("connection", "upgrade")])
            self.wfile.write(b"frames")
            self.close_connection = True
            return
        status = next((int(part) for part in path.split("/") if part.isdigit() and len(part) == 3), 200)
        if "chunks" in path or "events" in path:
            kind = "text/event-stream" if "events" in path else "text/plain"
            self._head(200, [("content-type", kind), ("transfer-encoding", "chunked")])
            for _ in range(3):
                self.wfile.write(b"5\r\nhello\r\n")
                self.wfile.flush()
                time.sleep(0.05)
            if "broken" in path:
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")
            return
        body = b"x" * 300_000 if "large" in path else b'{"forecast": "fair"}'
        extra = [("x-tier", "gold"), ("x-tier", "silver")] if "tiers" in path else [("x-tier", "gold")]
        sent = b"" if self.command == "HEAD" or status in (204, 304) else body
        self._head(status, [*extra, ("content-length", str(len(sent)))] if status != 204 else extra)
        self.wfile.write(sent[:10] if "short" in path else sent)
        if "short" in path:
            self.close_connection = True

    def __getattr__(self, name: str) -> Any:
        """Return the same for the other methods."""
        if name.startswith("do_"):
            return self.do_GET
        raise AttributeError(name)

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _upstream() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Upstream)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _lua(phase: str, *chunks: str) -> dict[str, Any]:
    return {"name": "pre-function", "config": {phase: list(chunks)}}


def _set(*calls: str) -> dict[str, Any]:
    return _lua("access", "\n".join(f"kong.log.set_serialize_value({call})" for call in calls))


USAGE: Final = "{ prompt_tokens = 7, completion_tokens = 11, total_tokens = 18 }"
META: Final = '{ provider_name = "openai", request_model = "gpt-4o", llm_latency = 12 }'

EDITED: Final = {
    "ai": [_set(f'"ai.proxy", {{ usage = {USAGE}, meta = {META}, payload = {{ request = "a prompt" }} }}')],
    "ai-parts": [
        _set(f'"ai.proxy.usage", {USAGE}', f'"ai.proxy.meta", {META}', '"ai.proxy.payload.request", "p"')
    ],
    "ai-mcp": [
        _set('"ai.mcp", { rpc = { { method = "tools/call", tool_name = "t", error = "e", latency = 3 } } }')
    ],
    "ai-empty": [_set('"ai", {}')],
    "ai-model-header": [
        _lua("header_filter", 'kong.response.set_header("X-Kong-LLM-Model", "openai/gpt-4o")')
    ],
    "ai-metrics": [_lua("access", "ngx.ctx.ai_llm_metrics = { prompt_tokens_count = 3 }")],
    "size": [_set('"request.size", 12345')],
    "remove": [_set('"consumer", nil', '"latencies.request", nil')],
    "consumer": [
        _set('"consumer", { id = "another", username = "one" }', '"authenticated_entity", { x = 1 }')
    ],
    "consumer-field": [_set('"consumer.username", "renamed"', '"consumer.tags", { "tier:silver" }')],
    "add": [_set('"request.method", "ADDED", { mode = "add" }', '"workspace_name", "w", { mode = "add" }')],
    "replace": [
        _set(
            '"request.headers.x-tenant", "replaced", { mode = "replace" }', '"ai.x", 1, { mode = "replace" }'
        )
    ],
    "header": [_set('"request.headers.x-tenant", "set"', '"response.headers.x-tier", { "a", "b" }')],
    "headers": [_set('"request.headers", { ["x-tenant"] = "all", authorization = "secret" }')],
    "query": [_set('"request.querystring.t", true')],
    "types": [_set('"response", "text"', '"started_at", "1795326543779"', '"upstream_status", 200')],
    "own": [_set('"correlation", "c"', '"my.own", { value = 1 }')],
    "source": [_set('"source", "kong"', '"workspace_name", "other"')],
    "route": [_set('"route", { id = "r", name = "other" }', '"service.name", "renamed"')],
}
ROUTES: Final[dict[str, list[dict[str, Any]]]] = {
    "plain": [],
    "application": [
        _lua("access", 'kong.ctx.shared.kaa_application_context = { application_id = "app-1", secret = "s" }')
    ],
    "terminated": [{"name": "request-termination", "config": {"status_code": 418}}],
    "exit": [_lua("access", 'return kong.response.exit(402, { message = "no" })')],
    "fails": [_lua("access", 'error("an error of a plugin")')],
    "fails-late": [_lua("header_filter", 'error("an error of a plugin")')],
    "limited": [{"name": "rate-limiting", "config": {"minute": 1, "policy": "local"}}],
    "correlated": [{"name": "correlation-id", "config": {"echo_downstream": True}}],
    "renamed-method": [_lua("access", 'kong.service.request.set_method("POST")')],
    "buffered": [_lua("access", "kong.service.request.enable_buffering()")],
    **{f"edited-{name}": plugins for name, plugins in EDITED.items()},
}


@dataclass
class Requests:
    """Sends bytes to Kong."""

    port: int
    sent: list[str] = field(default_factory=list)

    def raw(self, name: str, *parts: bytes, wait: float = 3, reset: bool = False, read: bool = True) -> bytes:
        """Send the parts, a moment apart, and return what Kong answers until it closes or is silent."""
        self.sent.append(name)
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), 5) as client:
            client.settimeout(wait)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for number, part in enumerate(parts):
                if number:
                    time.sleep(0.2)
                with suppress(ConnectionError):
                    client.sendall(part)
            if not read:
                time.sleep(0.3)
                return b""
            with suppress(TimeoutError, ConnectionError):
                while data := client.recv(65536):
                    answer += data
        return answer

    def get(
        self,
        path: str,
        *headers: str,
        method: str = "GET",
        body: bytes = b"",
        key: bool = True,
        version: str = "1.1",
        **options: Any,
    ) -> bytes:
        """Send a whole request."""
        fields = ["host: kong", "connection: close", *headers]
        fields += [f"apikey: {KEY}"] if key else []
        fields += [f"content-length: {len(body)}"] if body else []
        head = f"{method} {path} HTTP/{version}\r\n" + "".join(f"{one}\r\n" for one in fields) + "\r\n"
        name = f"{method} {path[:60]} {' '.join(headers)[:60]}"
        return self.raw(name, head.encode("latin-1") + body, **options)


def drive(send: Requests) -> None:
    """Send every request."""
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "FOO"):
        send.get("/plain", method=method)
    send.get("/plain", method="TRACE")
    send.get("/plain", method="POST", body=b"a body")
    send.get("/plain", method="POST", body=b"b" * 300_000)
    for path in ("/plain/204", "/plain/304", "/plain/404", "/plain/500", "/plain/tiers", "/plain/large"):
        send.get(path)
    send.get("/plain/large", "accept-encoding: gzip")
    for path in ("/plain/chunks", "/plain/events", "/plain/broken/chunks", "/plain/short", "/plain/hangup"):
        send.get(path)
    for query in ("t=1", "t=1&t=2", "t", "t=", "t=a%20b%C3%A9", "T=1", "other=1", "t[]=1", "t=" + "v" * 1100):
        send.get(f"/plain?{query}")
    send.get("/plain?" + "&".join(f"a{n}={n}" for n in range(150)) + "&t=late")
    for tenant in ("acme", "", "caf\xe9", '"quoted\\', "t" * 1100, "a, b"):
        send.get("/plain", f"X-Tenant: {tenant}")
    send.get("/plain", "x-tenant: first", "X-Tenant: second")
    send.get("/plain", "x_tenant: underscore")
    send.get("/plain", *(f"h{n}: {n}" for n in range(150)))
    send.get("/plain", "x-anonymous-consumer: true")
    send.get("/plain", key=False)
    send.get("/plain", "apikey: wrong", key=False)
    send.get("/open", key=False)
    send.get("/open", "x-anonymous-consumer: true", key=False)
    send.get("/anonymous", key=False)
    send.get("/anonymous")
    send.get("/captured/a%20b/rest")
    send.get("/captured/%C3%A9/rest")
    send.get("/nothing-here")
    send.get("/down")
    send.get("/timeout/slow")
    send.get("/plain", version="1.0")
    send.get("/plain", "expect: 100-continue", method="POST", body=b"later")
    send.get("/plain/switch", "upgrade: websocket", "connection: upgrade")
    for path in ROUTES:
        send.get(f"/{path}", "x-tenant: acme")
    send.get("/limited")
    head = f"GET /plain HTTP/1.1\r\nhost: k\r\napikey: {KEY}\r\n".encode()
    send.raw("three pipelined", (head + b"\r\n") * 2 + head + b"connection: close\r\n\r\n")
    send.raw("kept alive", head + b"\r\n", head + b"connection: close\r\n\r\n")
    chunked = head.replace(b"GET", b"POST") + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    send.raw("chunked", chunked + b"5\r\nhello\r\n", b"0\r\n\r\n")
    send.raw("broken chunk", chunked + b"zz\r\nhello\r\n")
    send.raw(
        "a body that ends early",
        head.replace(b"GET", b"POST") + b"content-length: 100\r\n\r\nhello",
        read=False,
    )
    send.raw(
        "reset in the body",
        head.replace(b"GET", b"POST") + b"content-length: 9999\r\n\r\nx",
        reset=True,
        read=False,
    )
    slow = head.replace(b"/plain", b"/plain/slow")
    send.raw("gone before the answer", slow + b"\r\n", read=False)
    send.raw("reset before the answer", slow + b"\r\n", reset=True, read=False)
    send.raw(
        "gone within the answer", head.replace(b"/plain", b"/plain/large") + b"\r\n", reset=True, read=False
    )
    send.raw("no HTTP", b"hello\r\n\r\n")
    send.raw("no host", b"GET /plain HTTP/1.1\r\n\r\n")
    send.raw("a bad host", b"GET /plain HTTP/1.1\r\nhost: a b\r\n\r\n")
    send.raw("a bad version", b"GET /plain HTTP/9.9\r\nhost: k\r\n\r\n")
    send.raw("a URI that is too long", b"GET /plain?t=" + b"u" * 40_000 + b" HTTP/1.1\r\nhost: k\r\n\r\n")
    send.raw("a header that is too long", head + b"x-tenant: " + b"v" * 40_000 + b"\r\n\r\n")
    send.raw("two lengths", head + b"content-length: 1\r\ncontent-length: 2\r\n\r\nx")
    send.raw("a null byte in a header", head + b"x-tenant: a\x00b\r\nconnection: close\r\n\r\n")
    send.raw(
        "an absolute URI", head.replace(b"/plain", b"http://k/plain?t=abs") + b"connection: close\r\n\r\n"
    )


def document(upstream: str, witness: Path) -> dict[str, Any]:
    """Return Kong's configuration."""

    def route(name: str, plugins: list[dict[str, Any]], *paths: str) -> dict[str, Any]:
        return {"name": name, "paths": list(paths) or [f"/{name}"], "strip_path": False, "plugins": plugins}

    key_auth = {"name": "key-auth"}
    anonymous = {"name": "key-auth", "config": {"anonymous": ANONYMOUS}}
    routes = [route(name, [key_auth, *plugins]) for name, plugins in ROUTES.items()]
    routes += [route("open", []), route("anonymous", [anonymous])]
    routes += [route("captured", [key_auth], "~/captured/(?<id>[^/]+)/rest")]
    return {
        "_format_version": "3.0",
        "services": [
            {"name": "s", "url": upstream, "retries": 1, "routes": routes},
            {"name": "down", "url": "http://127.0.0.1:9", "routes": [route("down", [key_auth])]},
            {
                "name": "late",
                "url": upstream,
                "read_timeout": 300,
                "retries": 0,
                "routes": [route("timeout", [key_auth])],
            },
        ],
        "consumers": [
            {
                "username": "alice",
                "custom_id": "acct-1",
                "tags": ["customer:acme", "tier:gold"],
                "keyauth_credentials": [{"key": KEY, "tags": ["tier:key"]}],
            },
            {"username": "nobody", "id": ANONYMOUS},
        ],
        "plugins": [
            {"name": "openmeter-lua", "config": CONFIG},
            {"name": "witness", "config": {"path": str(witness)}},
        ],
    }


def main() -> int:
    """Run it; the exit status is 1 if any request differs."""
    options = argparse.ArgumentParser(prog="python -m tests.bench.lua_equality")
    options.add_argument("--record", type=Path, help="write segments and logs to this folder")
    arguments = options.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary, _upstream() as upstream:
        folder = Path(temporary)
        folder.chmod(0o755)
        witness = folder / "witness"
        lua = Lua(folder / "lua", folder / "segments")
        lua.write()
        place = folder / "lua/kong/plugins/witness"
        place.mkdir()
        (place / "handler.lua").write_text(_WITNESS)
        (place / "schema.lua").write_text(_WITNESS_SCHEMA)
        plugins = ["bundled", "openmeter-lua", "witness"]
        settings = ["nginx_worker_processes = 1", "log_level = error"]
        with started(folder / "kong", document(upstream, witness), plugins, settings, lua=lua) as port:
            eventually(lambda: _routes(port), what="Kong's configuration")
            send = Requests(port)
            drive(send)
            eventually(lambda: _count(witness) >= len(send.sent), what="the witness")
            time.sleep(2)  # clients that hung up: their requests end when the upstream answers
        found = _compare(lua.segments, witness)
        console.print(
            f"{len(send.sent)} kinds of requests, {found.compared} requests, {len(found.differing)} differ"
        )
        for line in found.differing:
            console.print(line, markup=False)
        if arguments.record:
            _record(arguments.record, lua.segments, witness)
        return 1 if found.differing or not found.compared else 0


def _routes(port: int) -> bool:
    try:
        return (
            httpx.get(f"http://127.0.0.1:{port}/plain", trust_env=False).status_code
            == httpx.codes.UNAUTHORIZED
        )
    except httpx.TransportError:
        return False


def _count(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _record(folder: Path, segments: Path, witness: Path) -> None:
    """Keep the segments, and of each log what an event may be made of."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "instances").mkdir(parents=True)
    for file in [*segments.glob("*.segment"), *segments.glob("instances/*")]:
        shutil.copy(file, folder / file.relative_to(segments))
    kept = [compact(raw) for raw in witness.read_bytes().splitlines()]
    (folder / "logs.jsonl").write_bytes(b"".join(line + b"\n" for line in kept))


@dataclass
class Found:
    """What the comparison found."""

    compared: int
    differing: list[str]


def _compare(segments: Path, witness: Path) -> Found:
    logs = witness.read_bytes().splitlines()
    return Found(len(logs), differences(logs, lines(segments)))


if __name__ == "__main__":
    sys.exit(main())
