"""Both halves of the gate: the Lua shells over a real socket to the gate's process, beside the sandbox."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from syncd.sandbox.testing import running_sandbox
from tests.plugin.gate.test_process import SUBJECT, Node
from tests.plugin.lua import gate_node
from tests.plugin.lua.gate_node import Shell, UnixPeer

pytestmark = pytest.mark.slow
CONSUMER: Final = SUBJECT.removeprefix("consumer:")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Node]:
    with running_sandbox() as url:
        made = Node(tmp_path, url)
        yield made
        made.close()


def usage(server: Node) -> int:
    """Return what the metering API counted."""
    found = server.api.get("/api/v1/meters/kong_api_requests/query").json()["data"]
    return int(found[0]["value"]) if found else 0


class Gateway:
    """A Kong with two workers in real time, whose requests are logged to the plugin server."""

    def __init__(self, server: Node, peer: UnixPeer, shell: Shell = "plugin") -> None:
        self.server = server
        self.kong = gate_node.Node(peer, shell=shell, path=str(server.socket), now=time.time())
        self.number = 0

    def request(self, *, logged: bool = True) -> int:
        """Send one request of the customer, by the workers in turn."""
        self.turn()
        self.number += 1
        consumer = {"id": CONSUMER, "username": "c"}
        answer = self.kong.request(worker=self.number % 2, authenticated_consumer=consumer)
        if answer.passed and logged:
            self.server.log(1)
        return answer.status

    def turn(self) -> None:
        """Let the workers do what is due."""
        self.kong.now = time.time()
        self.kong.turn()

    def until(self, condition: Callable[[], bool], seconds: float = 15) -> float:
        """Go on until the condition holds, and return how long that took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, "not in time"
            self.turn()
            time.sleep(0.005)
        return time.monotonic() - began

    def known(self) -> bool:
        """Return whether the gate has decided about the customer."""
        self.request(logged=False)  # post-function starts with a worker's first request
        return self.counted() is not None

    def counted(self) -> int | None:
        """Return Kong's counter of the customer."""
        account = self.kong.get(f"k\t{SUBJECT}")
        passed = account and self.kong.get(f"p\tapi\t{account.decode()}")
        return None if passed is None else int(passed)


def test_a_customer_with_100_requests_left_is_stopped_at_the_101st(server: Node, shell: Shell) -> None:
    server.customer(100)
    with server.running(), UnixPeer() as peer:
        kong = Gateway(server, peer, shell)
        kong.until(kong.known)
        time.sleep(0.2)  # until no worker remembers the first line, without a limit
        taken = kong.counted() or 0
        statuses: list[int] = []
        # One may be refused while its record is at the gate already, and its worker's report is not.
        while taken + statuses.count(200) < 100 or len(statuses) < 130:
            statuses.append(kong.request())
            assert len(statuses) < 5000
        assert taken + statuses.count(200) == 100
        kong.until(lambda: usage(server) == statuses.count(200))
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
