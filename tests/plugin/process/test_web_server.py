"""The embedded web server: what it costs while nobody asks for anything, and how soon it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from openmeter_plugin.process.web_server import EmbeddedServer
from tests.harness.ports import free_port

TICKS = 3


class CountingServer(EmbeddedServer):
    """A server that counts its ticks."""

    def __init__(self, port: int) -> None:
        super().__init__(hello, port=port)
        self.ticked = threading.Semaphore(0)

    async def on_tick(self, counter: int) -> bool:
        self.ticked.release()
        return await super().on_tick(counter)


async def hello(_scope: Any, _receive: Any, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@contextmanager
def serving() -> Iterator[tuple[CountingServer, threading.Thread, str]]:
    port = free_port()
    server = CountingServer(port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server, thread, f"http://127.0.0.1:{port}/"
    finally:
        server.end()
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.slow
def test_an_idle_server_wakes_once_a_second_and_its_date_stays_right() -> None:
    with serving() as (server, _, url):
        assert server.ticked.acquire(timeout=20)
        began = time.monotonic()
        first = httpx.get(url).headers["date"]
        for _ in range(TICKS):
            assert server.ticked.acquire(timeout=20)
        assert time.monotonic() - began > 0.9 * TICKS
        assert httpx.get(url).headers["date"] != first


def test_a_server_ends_without_waiting_for_its_next_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openmeter_plugin.process.web_server._TICK_SECONDS", 3600.0)
    with serving() as (server, thread, url):
        assert server.ticked.acquire(timeout=20)
        assert httpx.get(url).text == "hello"
        server.end()
        thread.join(20)
        assert not thread.is_alive()


def test_an_end_before_the_start_is_not_missed() -> None:
    server = EmbeddedServer(hello, port=free_port())
    server.end()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
