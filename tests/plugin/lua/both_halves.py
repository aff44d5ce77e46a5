"""Both halves of the gate: the Lua shells in real time, over a real socket to the gate's process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from tests.plugin.gate.test_process import SUBJECT, Node
from tests.plugin.lua import gate_node
from tests.plugin.lua.gate_node import Answer, Shell, UnixPeer

CONSUMER: Final = SUBJECT.removeprefix("consumer:")


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
        self.passed = 0
        """Requests that passed and were logged."""

    def request(self, *, logged: bool = True) -> int:
        """Send one request of the customer, by the workers in turn, and return its status."""
        return self.answer(logged=logged).status

    def answer(self, *, logged: bool = True) -> Answer:
        """Send one request of the customer and return its answer."""
        self.turn()
        self.number += 1
        consumer = {"id": CONSUMER, "username": "c"}
        answer = self.kong.request(worker=self.number % 2, authenticated_consumer=consumer)
        if answer.passed and logged:
            self.server.log(1)
            self.passed += 1
        return answer

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
        if self.number < 2:
            self.request()  # post-function starts with a worker's first request
        return self.counted() is not None

    def counted(self) -> int | None:
        """Return Kong's counter of the customer."""
        account = self.kong.get(f"k\t{SUBJECT}")
        passed = account and self.kong.get(f"p\tapi\t{account.decode()}")
        return None if passed is None else int(passed)
