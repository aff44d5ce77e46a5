"""An HTTP proxy in front of a metering API that spoils one request in one way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import httpx

Mishap = Literal["fail", "delay", "cut", "cut-answer", "repeat"]
MISHAPS: tuple[Mishap, ...] = ("fail", "delay", "cut", "cut-answer", "repeat")
"""503 without forwarding; late answer; cut without forwarding; forwarded, then cut; forwarded twice."""

DELAY = 1.0


@dataclass
class Proxy:
    """`at` is the number of the request to spoil, counted from 0; None spoils none."""

    url: str
    upstream: httpx.Client
    mishap: Mishap = "fail"
    at: int | None = None
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    late: threading.Event = field(default_factory=threading.Event)

    def spoil(self, mishap: Mishap, at: int) -> None:
        self.mishap, self.at, self.seen = mishap, at, 0

    def next(self) -> Mishap | None:
        with self.lock:
            number, self.seen = self.seen, self.seen + 1
        return self.mishap if number == self.at else None


@contextmanager
def proxying(upstream: str) -> Iterator[Proxy]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 65536

        def _handle(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length") or 0))
            mishap = proxy.next()
            if mishap == "cut":
                self.close_connection = True
                return
            if mishap == "fail":
                self._send(503, b"", "text/plain")
                return
            headers = {"Content-Type": self.headers.get("content-type") or "application/json"}
            if mishap == "repeat":
                proxy.upstream.request(self.command, self.path, content=content, headers=headers)
            answer = proxy.upstream.request(self.command, self.path, content=content, headers=headers)
            if mishap == "cut-answer":
                self.close_connection = True
                return
            if mishap == "delay":
                proxy.late.wait(DELAY)
            self._send(answer.status_code, answer.content, answer.headers.get("content-type", ""))

        do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815

        def _send(self, status: int, body: bytes, kind: str) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()
            except OSError:  # the client has given up waiting
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with httpx.Client(base_url=upstream) as client:
        proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}", client)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield proxy
        finally:
            proxy.late.set()
            server.shutdown()
            thread.join()
            server.server_close()
