"""A scripted metering API's events endpoint over real HTTP."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Post:
    """A received POST."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of its body."""
        found: list[dict[str, Any]] = json.loads(self.body)
        return found

    @property
    def ids(self) -> list[str]:
        """The ids of its events."""
        return [event["id"] for event in self.events]


@dataclass(frozen=True)
class Answer:
    """An answer; `taken` is how many events of the batch are stored first (None: all for a 2xx)."""

    status: int = 204
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    taken: int | None = None
    cut: bool = False
    """Reset the connection instead of answering."""


Script = Callable[[Post], Answer]


def refusal(status: int = 400, detail: str = "invalid event", **members: Any) -> Answer:
    """Return a refusal as OpenMeter v1 sends it; nothing of the batch is stored."""
    problem = {"type": "about:blank", "title": "Bad Request", "status": status, "detail": detail, **members}
    return Answer(status, json.dumps(problem), {"content-type": "application/problem+json"})


def take_all(_: Post) -> Answer:
    """Accept everything, as OpenMeter v1 does."""
    return Answer()


class EventsServer:
    """Records the POSTs and events received.

    `taken` lists the stored event ids, each once; `came` counts how often each was received.
    """

    def __init__(self, script: Script = take_all) -> None:
        self.script = script
        self.posts: list[Post] = []
        self.taken: list[str] = []
        self.came: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.url = ""

    def handle(self, post: Post) -> Answer:
        """Record the post and answer according to the script."""
        with self._lock:
            self.posts.append(post)
        answer = self.script(post)
        taken = answer.taken
        if taken is None:
            taken = len(post.events) if 200 <= answer.status < 300 else 0
        with self._lock:
            for event_id in post.ids[:taken]:
                self.came[event_id] += 1
                if self.came[event_id] == 1:
                    self.taken.append(event_id)
        return answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    events_server: EventsServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.events_server.handle(Post(self.path, headers, body, time.monotonic()))
        if answer.cut:
            # A reset, as a killed process causes it.
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return
        content = answer.body.encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "content-length" not in answer.headers:
            self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = self.close_connection or "content-length" in answer.headers

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Suppress the log."""


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: a stopped delivery abandons its connections."""


@contextmanager
def serving(
    server: EventsServer | None = None, port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[EventsServer]:
    """Serve on 127.0.0.1."""
    server = server or EventsServer()
    handler = type("Handler", (_Handler,), {"events_server": server})
    http = _HttpServer(("127.0.0.1", port), handler)
    if tls is not None:
        http.socket = tls.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
    server.url = f"{'https' if tls else 'http'}://127.0.0.1:{http.server_address[1]}/api/v1/events"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join(10)
        http.server_close()
