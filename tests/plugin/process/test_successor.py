"""A killed supervisor: its worker serves until the next server has the socket."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.bench.beside import hand_over
from tests.bench.driver import ProtoBuf, connect
from tests.harness.process import PluginServer, eventually, plugin_server

pytestmark = pytest.mark.slow

CONFIG = {"ingest_endpoint": "http://127.0.0.1:9/events", "__plugin_id": "successor"}


def answers(server: PluginServer, number: int) -> None:
    """Require that a call on a new connection has its answer."""
    protocol = ProtoBuf()
    with connect(server.socket) as connection:
        connection.settimeout(5)
        protocol.start(connection, CONFIG)
        hand_over(connection, protocol, number)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


def test_a_worker_serves_until_the_next_server_has_the_socket(tmp_path: Path) -> None:
    with plugin_server(tmp_path) as first:
        answers(first, 0)
        worker = eventually(lambda: first.child("worker") or 0, what="the worker")
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        killed, number = time.monotonic(), 1
        while time.monotonic() < killed + 1:
            answers(first, number)
            number += 1
        with plugin_server(tmp_path) as second:
            answers(second, number)
            eventually(lambda: not is_running(worker), what="the end of the first worker")
            answers(second, number + 1)


def test_a_worker_that_nobody_succeeds_ends(tmp_path: Path) -> None:
    with plugin_server(tmp_path) as server:
        answers(server, 0)
        worker = eventually(lambda: server.child("worker") or 0, what="the worker")
        server.process.kill()
        eventually(lambda: not is_running(worker), what="the end of the worker", seconds=20)
