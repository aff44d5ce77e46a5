"""The gate's process killed, stopped, and refused by the metering API, while requests go on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.plugin.gate.kong import FakeKong
from tests.plugin.gate.test_process import SUBJECT, Node, eventually, meet

pytestmark = pytest.mark.slow
ALLOWANCE = 60


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_sandbox() as url:
        made = Node(tmp_path, url)
        yield made
        made.close()


def talk(kong: FakeKong) -> None:
    """Report and ask as Kong's timer does: while the gate is away, nothing waits for it."""
    with contextlib.suppress(httpx.HTTPError):
        kong.report()
        kong.sync()


def load(node: Node, kong: FakeKong, until: Callable[[int, int], bool]) -> int:
    """Send requests and their logs until a condition of passed and stopped holds; returns how many passed."""
    passed, stopped = 0, 0
    deadline = time.monotonic() + 40
    while not until(passed, stopped):
        assert time.monotonic() < deadline, (passed, stopped)
        allowed = sum(kong.request(SUBJECT, "api") is None for _ in range(2))
        passed, stopped = passed + allowed, stopped + 2 - allowed
        node.log(allowed)
        talk(kong)
        time.sleep(0.05)
    return passed


def met(node: Node) -> FakeKong:
    kong = node.kong()
    kong.sync()
    meet(kong)
    kong.client.timeout = httpx.Timeout(1.0)
    return kong


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGSTOP, signal.SIGKILL]])
def test_a_gate_that_is_killed_or_stands_still_under_load_lets_exactly_what_is_left_pass(
    node: Node, signals: list[signal.Signals]
) -> None:
    node.customer(ALLOWANCE)
    with node.running():
        kong = met(node)
        first = load(node, kong, lambda passed, _: passed >= 20)
        state = node.folder / "spool" / "gate" / "state-1.json"
        eventually(lambda: SUBJECT in state.read_text())  # saved every 5 s; else it is unseen again
        [pid] = node.pids("gate_started")
        os.kill(pid, signals[0])
        during = load(node, kong, lambda passed, _: passed >= 10)  # with the ceilings of before
        for number in signals[1:]:
            os.kill(pid, number)
        eventually(lambda: len(node.pids("gate_started")) == 2)
        left = ALLOWANCE - first - during
        assert load(node, kong, lambda passed, _: passed >= left) == left
        assert load(node, kong, lambda _, stopped: stopped >= 60) == 0


def test_a_gate_that_hangs_is_replaced_after_the_hang_timeout_and_meanwhile_the_last_state_holds(
    node: Node,
) -> None:
    node.customer(ALLOWANCE)
    with node.running("--hang-timeout", "2"):
        kong = met(node)
        first = load(node, kong, lambda passed, _: passed >= 10)
        state = node.folder / "spool" / "gate" / "state-1.json"
        eventually(lambda: SUBJECT in state.read_text())
        [pid] = node.pids("gate_started")
        began = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        during = load(node, kong, lambda passed, _: passed >= 5)
        eventually(lambda: len(node.pids("gate_started")) == 2)
        assert time.monotonic() - began >= 2
        left = ALLOWANCE - first - during
        assert load(node, kong, lambda passed, _: passed >= left) == left
        assert load(node, kong, lambda _, stopped: stopped >= 20) == 0


def test_answers_429_are_waited_out_and_the_decisions_of_before_hold_meanwhile(node: Node) -> None:
    node.customer(ALLOWANCE)
    with node.running():
        kong = met(node)
        first = load(node, kong, lambda passed, _: passed >= 10)
        node.api.post("/sandbox/v1/faults", json={"status": 429, "retry_after": 2})
        calls = dict_of_calls(kong)
        rest = load(node, kong, lambda _, stopped: stopped >= 20)
        assert first + rest <= ALLOWANCE
        assert dict_of_calls(kong).get("429", 0) - calls.get("429", 0) <= 20  # not one for each tick


def dict_of_calls(kong: FakeKong) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, outcome, count in kong.client.get("/v1/gate").json()["figures"]["calls"]:
        found[outcome] = found.get(outcome, 0) + count
    return found
