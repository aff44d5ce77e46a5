"""Replacing a killed or hung worker, with real processes and Kong's own rules."""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from pathlib import Path

import pytest

from syncd.sandbox.testing import running_sandbox
from tests.harness.process import PluginServer, eventually, plugin_server
from tests.plugin.traffic import TOKEN, assert_nothing_lost, drive_through

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        (signal.SIGKILL, ()),
        (signal.SIGKILL, ("--workers", "2")),
        (signal.SIGSTOP, ("--hang-timeout", "2")),
    ],
    ids=["killed", "one of two killed", "hung"],
)
def test_nothing_is_lost_when_a_worker_is_replaced_under_load(
    tmp_path: Path, how: signal.Signals, arguments: tuple[str, ...]
) -> None:
    with running_sandbox(token=TOKEN) as sandbox, plugin_server(tmp_path, *arguments) as server:

        def strike() -> None:
            victim = server.child("worker")
            assert victim is not None
            serving = server.log_text().count('"serving"')
            os.kill(victim, how)
            eventually(partial(logged, server, "serving", serving + 1), what="the next worker")

        times = 5 if how == signal.SIGKILL else 1
        worker = drive_through(server.socket, sandbox, strike, times=times, pause=0.0)
        assert server.log_text().count('"connections_taken_over"') == times, "it was killed under load"
        assert_nothing_lost(worker, sandbox)


def logged(server: PluginServer, event: str, times: int) -> bool:
    """Return whether it has logged an event `times` times."""
    return server.log_text().count(f'"{event}"') == times


def open_sockets(pid: int) -> int:
    """Return how many sockets a process has open."""
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += str(descriptor.readlink()).startswith("socket:")
        except FileNotFoundError:
            continue
    return count


def test_no_process_holds_a_connection_for_longer_than_kong_does(tmp_path: Path) -> None:
    with plugin_server(tmp_path, "--workers", "2") as server:
        eventually(partial(logged, server, "serving", 2), what="serving")
        eventually(partial(logged, server, "delivery_started", 1), what="the delivery")

        def all_sockets() -> list[int]:
            return [open_sockets(server.process.pid), *map(open_sockets, server.children())]

        supervisor = open_sockets(server.process.pid)
        peers = []
        for _ in range(40):
            peers.append(socket.socket(socket.AF_UNIX))
            peers[-1].connect(str(server.socket))
        eventually(lambda: open_sockets(server.process.pid) == supervisor + 40, what="holding all")
        for name, sign, count in (("worker", "serving", 3), ("delivery", "delivery_started", 2)):
            victim = server.child(name)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            eventually(partial(logged, server, sign, count), what=f"the next {name}")
        assert open_sockets(server.process.pid) == supervisor + 40
        for peer in peers:
            peer.close()
        eventually(lambda: open_sockets(server.process.pid) == supervisor, what="letting go")
        eventually(lambda: max(all_sockets()) < 30, what="all processes letting go")
