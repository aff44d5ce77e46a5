"""Both halves of the gate: the Lua shells over a real socket to the gate's process, beside the sandbox."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from syncd.sandbox.testing import running_sandbox
from tests.plugin.gate.test_process import SUBJECT, Node
from tests.plugin.lua.both_halves import Gateway, usage
from tests.plugin.lua.gate_node import Shell, UnixPeer

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Node]:
    with running_sandbox() as url:
        made = Node(tmp_path, url)
        yield made
        made.close()


def test_a_customer_with_100_requests_left_is_stopped_at_the_101st(server: Node, shell: Shell) -> None:
    server.customer(100)
    with server.running(), UnixPeer() as peer:
        kong = Gateway(server, peer, shell)
        kong.until(kong.known)
        time.sleep(0.2)  # until no worker remembers the first line, without a limit
        # What a reading may have counted is taken off twice until the next one: the last may wait for it.
        kong.until(lambda: (kong.request(), kong.passed >= 100)[1], seconds=60)
        assert {kong.request() for _ in range(30)} == {429}
        assert kong.passed == 100
        kong.until(lambda: usage(server) == 100)
        assert {kong.request() for _ in range(30)} == {429}


def test_a_flip_in_the_metering_api_stops_and_lets_pass_within_two_seconds(server: Node) -> None:
    server.customer(100_000)
    with server.running(), UnixPeer() as peer:
        kong = Gateway(server, peer)
        kong.until(kong.known)
        for allowance, status in ((0, 429), (100_000, 200), (0, 429)):
            server.entitle(allowance)
            took = kong.until(lambda: kong.request(logged=False) == status)  # noqa: B023
            assert took < 4  # 2 s on a quiet machine


def test_a_gate_that_is_killed_or_stopped_changes_nothing_until_it_is_back(server: Node) -> None:
    server.customer(100_000)
    with UnixPeer() as peer:
        kong = Gateway(server, peer)
        with server.running():
            kong.until(kong.known)
            log = map(json.loads, (server.folder / "log").read_text().splitlines())
            child = next(one["pid"] for one in log if one["event"] == "gate_started")
            os.kill(child, signal.SIGSTOP)
            assert {kong.request(logged=False) for _ in range(50)} == {200}
            os.kill(child, signal.SIGCONT)
            os.kill(child, signal.SIGKILL)
            assert {kong.request(logged=False) for _ in range(50)} == {200}
            server.entitle(0)
            kong.until(lambda: kong.request(logged=False) == 429, seconds=30)


def test_after_a_restart_of_kong_the_state_file_stops_the_first_request(server: Node) -> None:
    server.customer(0)
    with server.running(), UnixPeer() as peer:
        kong = Gateway(server, peer)
        kong.until(lambda: kong.request(logged=False) == 429)
        kong.until(Path(f"{server.socket}.state").exists)
        kong.until(lambda: SUBJECT in Path(f"{server.socket}.state").read_text())
    with UnixPeer() as peer:  # the gate is away
        again = Gateway(server, peer)
        assert again.request(logged=False) == 429
