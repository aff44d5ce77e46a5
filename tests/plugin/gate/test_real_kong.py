"""The whole chain on a real Kong from the PATH: gate, plugin server, sandbox, both shells, two workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.harness.recordings import WIRE
from tests.plugin.gate.gateway import PATHS, Kong, Traffic, consumer_id, kong
from tests.plugin.gate.test_process import Node, eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("kong") is None, reason="there is no kong on the PATH"),
]

HANG_SECONDS: Final = 3
WAITS: Final = 1.0
"""A request that waits for one of our processes waits for at least a second, its shortest time-out."""
CREDIT: Final = 3_000
MANY: Final = 10_000_000
METERED: Final = {"plugin": "metered", "post-function": "counted"}
CONSUMERS: Final = ("payer", "spent", *METERED.values())


RECORDED: Final = WIRE / "gate-failures.json"
"""What this Kong answered when something failed; `RECORD=1` writes it anew."""


def hold_to_recording(chain: Chain, what: str) -> None:
    """Compare the answers of this moment with the recorded ones: status, names of our headers, and reason."""
    answers: dict[str, dict[str, Any]] = {}
    for shell in PATHS:
        answers[shell] = {}
        for name in ("payer", "spent"):
            answer = chain.kong.get(name, shell)
            ours = sorted(set(answer.headers) & {"ratelimit", "ratelimit-policy", "retry-after"})
            reason = None if answer.is_success else answer.json()["reason"]
            answers[shell][name] = {"status": answer.status_code, "headers": ours, "reason": reason}
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("RECORD"):
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in (known | {what: answers}).items()
        ]
        RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    else:
        assert answers == known[what]


class Chain:
    """A node, its Kong, and the plugin server of the moment."""

    def __init__(self, node: Node, kong: Kong) -> None:
        self.node = node
        self.kong = kong
        self._server = ExitStack()
        self.supervisor = 0
        self.passed: dict[str, int] = {}
        """Requests of consumers before their test began."""

    def start(self, **settings: object) -> None:
        """Start the plugin server, with other settings of the gate if there are any."""
        self._server.close()
        self.node.configure(**settings)
        running = self.node.running("--hang-timeout", str(HANG_SECONDS))
        self.supervisor = self._server.enter_context(running).pid

    def stop(self) -> None:
        """Stop the plugin server, or see that it has ended."""
        self._server.close()

    def status(self, consumer: str, shell: str = "plugin") -> int:
        """Return the status that a consumer gets."""
        return self.kong.get(consumer, shell).status_code

    def flips(self) -> float:
        """Let the consumer that is stopped pass for a moment; returns the seconds of the slower change."""
        took = []
        for allowance, status in ((MANY, 200), (0, 429)):
            self.node.entitle(allowance, "spent")
            began = time.monotonic()
            for shell in PATHS:
                eventually(lambda: self.status("spent", shell) == status)  # noqa: B023
            took.append(time.monotonic() - began)
        return max(took)

    def saved(self) -> None:
        """Wait until the state of this moment is on disk: until then, a new gate has that of before."""
        state = self.node.folder / "spool/gate/state-1.json"
        now = time.time() + 0.5  # one that is being written now may lack it
        eventually(lambda: min(it.stat().st_mtime for it in (state, self._for_kong())) > now)

    def _for_kong(self) -> Path:
        return Path(f"{self.node.socket}.state")

    def meet(self, consumer: str, shell: str) -> None:
        """Have the gate decide about a consumer, of whom one request passes unseen."""
        self.passed[consumer] = 0
        known = self.view()["subjects"]

        def answer() -> httpx.Response:
            self.passed[consumer] += 1
            return self.kong.get(consumer, shell)

        for _ in self.kong.workers():
            answer()  # post-function starts with the first request of a worker
        eventually(lambda: self.view()["subjects"] > known and self.billed(consumer) == self.passed[consumer])
        eventually(lambda: "ratelimit" in answer().headers)

    def view(self) -> dict[str, Any]:
        """Return what the gate shows."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.node.socket))) as client:
            found: dict[str, Any] = client.get("http://gate/v1/gate", timeout=10).json()
            return found

    def billed(self, consumer: str) -> int:
        """Return what the metering API counted of a consumer."""
        where = {"subject": f"consumer:{consumer_id(consumer)}"}
        found = self.node.api.get("/api/v1/meters/kong_api_requests/query", params=where).json()["data"]
        return int(found[0]["value"]) if found else 0

    def child(self, process: str) -> int:
        """Return the newest process of a kind."""
        return self.node.pids(STARTED[process], process)[-1]


_LOCK = threading.Lock()
STARTED: Final = {"gate": "gate_started", "http-log": "serving", "delivery": "delivery_started"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    for part in (folder, folder.parent):
        part.chmod(0o755)
    with running_sandbox() as url, ExitStack() as stack:
        node = Node(folder, url, socket_mode="0666")
        stack.callback(node.close)
        node.customer(MANY, f"consumer:{consumer_id('payer')}", "payer")
        node.customer(0, f"consumer:{consumer_id('spent')}", "spent")
        for name in METERED.values():
            node.customer(CREDIT, f"consumer:{consumer_id(name)}", name)
        chain = Chain(node, stack.enter_context(kong(node, CONSUMERS)))
        stack.callback(chain.stop)
        chain.start()
        yield chain


@pytest.fixture
def chain(running: Chain) -> Chain:
    """Return a chain in which all is well: one customer passes, one is stopped."""
    running.node.api.delete("/sandbox/v1/faults")
    for shell in PATHS:
        eventually(lambda: running.status("spent", shell) == 429)  # noqa: B023
        eventually(lambda: "ratelimit" in running.kong.get("payer", shell).headers)  # noqa: B023
    return running


@pytest.mark.parametrize("shell", PATHS)
def test_exactly_3000_of_6000_requests_pass_over_two_workers(chain: Chain, shell: str) -> None:
    name = METERED[shell]
    chain.meet(name, shell)
    statuses, threads = Counter[int](), []
    for _ in range(32):
        thread = threading.Thread(target=_send, args=(chain, name, shell, 2 * CREDIT // 32, statuses))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    passed = chain.passed[name] + statuses[200]
    assert 0.99 * CREDIT <= passed <= CREDIT
    # What a reading may have counted is taken off twice until the next one: the last few pass after that.
    deadline = time.monotonic() + 10
    while passed < CREDIT:
        assert time.monotonic() < deadline
        passed += chain.status(name, shell) == 200
    eventually(lambda: chain.billed(name) == CREDIT)
    assert {chain.status(name, shell) for _ in range(50)} == {429}


def _send(chain: Chain, name: str, shell: str, requests: int, statuses: Counter[int]) -> None:
    found = Counter[int]()
    with httpx.Client(base_url=chain.kong.url, headers={"apikey": name}, trust_env=False) as client:
        for _ in range(requests):
            found[client.get(PATHS[shell], timeout=30).status_code] += 1
    with _LOCK:
        statuses.update(found)


def test_a_flip_in_the_metering_api_reaches_kong_within_two_seconds(chain: Chain) -> None:
    assert sorted(chain.flips() for _ in range(5))[2] < 2.0


def replaced(process: str, *signals: signal.Signals) -> Callable[[Chain], None]:
    """Return what signals a process and waits for the next one."""

    def act(chain: Chain) -> None:
        event, before = STARTED[process], chain.child(process)
        for number in signals:
            os.kill(before, number)
        eventually(lambda: chain.node.pids(event, process)[-1] != before)

    return act


def _supervisor_killed(chain: Chain) -> None:
    os.kill(chain.supervisor, signal.SIGKILL)
    time.sleep(1)  # requests go on without a plugin server
    chain.start()


def _supervisor_stopped(chain: Chain) -> None:
    os.kill(chain.supervisor, signal.SIGSTOP)
    time.sleep(HANG_SECONDS + 1)
    os.kill(chain.supervisor, signal.SIGCONT)


def _all_stopped(chain: Chain) -> None:
    pids = [chain.supervisor, *(chain.child(process) for process in STARTED)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * HANG_SECONDS)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGCONT)


def _nginx_killed(chain: Chain) -> None:
    for _ in range(3):
        for pid in chain.kong.workers():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.7)


def _reloaded(chain: Chain) -> None:
    for _ in range(2):
        chain.kong.command("reload")
        time.sleep(1)


def _restarted(chain: Chain) -> None:
    chain.start()


ACTIONS: Final[dict[str, Callable[[Chain], None]]] = {
    "the gate is killed": replaced("gate", signal.SIGKILL),
    "the gate hangs": replaced("gate", signal.SIGSTOP),
    "the http-log process is killed": replaced("http-log", signal.SIGKILL),
    "the http-log process hangs": replaced("http-log", signal.SIGSTOP),
    "the delivery process is killed": replaced("delivery", signal.SIGKILL),
    "the delivery process hangs": replaced("delivery", signal.SIGSTOP),
    "the supervisor is killed": _supervisor_killed,
    "the supervisor hangs": _supervisor_stopped,
    "all of them hang": _all_stopped,
    "the plugin server is restarted": _restarted,
    "kong reload": _reloaded,
    "nginx workers are killed": _nginx_killed,
}


@pytest.mark.parametrize("what", ACTIONS)
def test_no_request_fails_or_waits_and_every_decision_holds_when(chain: Chain, what: str) -> None:
    chain.saved()
    with Traffic(chain.kong, ("payer", "spent")) as traffic:
        eventually(lambda: all(lane.statuses for lane in traffic.lanes))
        ACTIONS[what](chain)
        hold_to_recording(chain, what)
        seen = min(len(lane.statuses) for lane in traffic.lanes)
        eventually(lambda: min(len(lane.statuses) for lane in traffic.lanes) >= seen + 100)
    assert traffic.statuses("payer") == {shell: {200} for shell in PATHS}
    assert traffic.statuses("spent") == {shell: {429} for shell in PATHS}
    if what != "nginx workers are killed":  # a request in a killed worker has no answer, whoever killed it
        assert traffic.failures() == []
        assert traffic.slowest() < WAITS
    if what not in ("kong reload", "nginx workers are killed"):
        assert traffic.closed() == 0
    chain.flips()


AWAY: Final[list[tuple[str, dict[str, Any], str]]] = [
    ("is away", {"action": "cut"}, "allow"),
    ("is away", {"action": "cut"}, "deny"),
    ("hangs", {"action": "timeout"}, "deny"),
    ("refuses the token", {"status": 401}, "allow"),
    ("fails", {"status": 500}, "deny"),
]
SHORTEST: Final = 10
"""Seconds of `max_stale`, in the place of an hour."""


@pytest.mark.parametrize(("what", "fault", "on_stale"), AWAY, ids=[f"{it[0]}-{it[2]}" for it in AWAY])
def test_the_last_readings_hold_until_max_stale_and_then_on_stale_when_the_metering_api(
    chain: Chain, what: str, fault: dict[str, Any], on_stale: str
) -> None:
    then = 200 if on_stale == "allow" else 503
    chain.start(max_stale=SHORTEST, on_stale=on_stale)
    try:
        chain.flips()
        with Traffic(chain.kong, ("payer", "spent")) as traffic:
            chain.node.api.post("/sandbox/v1/faults", json=fault)
            time.sleep(SHORTEST / 2)  # readings are younger than max_stale
            assert traffic.statuses("payer") == {shell: {200} for shell in PATHS}
            assert traffic.statuses("spent") == {shell: {429} for shell in PATHS}
            for shell in PATHS:
                for name in ("payer", "spent"):
                    eventually(lambda: chain.status(name, shell) == then)  # noqa: B023
            hold_to_recording(chain, f"readings are too old, {on_stale}")
        assert traffic.failures() == []
        assert traffic.slowest() < WAITS
        chain.node.api.delete("/sandbox/v1/faults")
        for shell in PATHS:
            eventually(lambda: chain.status("payer", shell) == 200)  # noqa: B023
            eventually(lambda: chain.status("spent", shell) == 429)  # noqa: B023
    finally:
        chain.start(max_stale=300, on_stale="allow")


def test_after_a_restart_of_kong_the_plugin_has_the_last_state_before_the_first_request(chain: Chain) -> None:
    chain.saved()
    chain.stop()
    chain.kong.restart()
    hold_to_recording(chain, "Kong is restarted, without the gate")
    answers = {(name, chain.status(name)) for name in ("payer", "spent") for _ in range(20)}
    chain.start()
    assert answers == {("payer", 200), ("spent", 429)}
    chain.flips()


def test_after_a_restart_of_kong_post_function_stops_within_a_second_or_two(chain: Chain) -> None:
    chain.kong.restart()
    assert chain.status("spent", "post-function") in (200, 429)  # its workers start with their first request
    began = time.monotonic()
    eventually(lambda: chain.status("spent", "post-function") == 429)
    assert time.monotonic() - began < 2


def test_a_kong_without_the_shared_dict_lets_everything_pass_and_names_the_line_to_add(chain: Chain) -> None:
    settings = chain.kong.folder / "kong.conf"
    before = settings.read_text()
    settings.write_text("".join(x for x in before.splitlines(True) if "shared_dict" not in x))
    try:
        chain.kong.restart()
        hold_to_recording(chain, "the shared dict is missing")
        assert {chain.status("spent", shell) for shell in PATHS for _ in range(5)} == {200}
        log = (chain.kong.folder / "prefix/logs/error.log").read_text()
        assert "nginx_http_lua_shared_dict = openmeter_gate 10m" in log
    finally:
        settings.write_text(before)
        chain.kong.restart()
