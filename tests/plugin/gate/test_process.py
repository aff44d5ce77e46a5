"""The gate's process against the sandbox, with the plugin's real input, spool and delivery."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from syncd.sandbox.testing import running_sandbox
from tests.plugin.gate.kong import FakeKong
from tests.plugin.outcomes import authenticated

pytestmark = pytest.mark.slow
DEADLINE = 20.0


def eventually(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


SUBJECT = f"consumer:{authenticated()['consumer']['id']}"


class Node:
    """A plugin server with a gate, its http-log input, and a Kong."""

    def __init__(self, folder: Path, url: str, **settings: Any) -> None:
        self.folder = folder
        self.api = httpx.Client(base_url=url, timeout=10)
        self.port = free_port()
        (folder / "plugin.yaml").write_text(f"ingest_endpoint: {url}/api/v1/events\n")
        self.socket = folder / "gate.sock"
        self.settings: dict[str, Any] = {
            "mode": "enforce",
            "metering": {"url": url},
            "features": [{"key": "api"}],
            "socket": str(self.socket),
            "counted_after": 1,
        }
        self.configure(**settings)
        self.sent = 0
        self.kongs: list[FakeKong] = []

    def configure(self, **settings: Any) -> None:
        """Change settings of the gate, for the next process."""
        self.settings |= settings
        (self.folder / "gate.yaml").write_text(json.dumps(self.settings))

    def kong(self, name: str = "0123456789abcdef") -> FakeKong:
        """Return a Kong with a new shared dict."""
        self.kongs.append(FakeKong(self.socket, name))
        return self.kongs[-1]

    def close(self) -> None:
        """Close all connections."""
        for kong in self.kongs:
            kong.client.close()
        self.api.close()

    @contextmanager
    def running(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "openmeter_plugin", "serve"]
        command += ["--http-log", f"127.0.0.1:{self.port}", "--spool", str(self.folder / "spool")]
        command += ["--http-log-config", str(self.folder / "plugin.yaml")]
        command += ["--gate", str(self.folder / "gate.yaml"), "--api", f"unix:{self.folder / 'api'}"]
        command += options
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            eventually(self.answers)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)

    def pids(self, event: str, process: str | None = None) -> list[int]:
        """Return the processes that logged an event, oldest first."""
        entries = [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]
        return [
            entry["pid"]
            for entry in entries
            if entry["event"] == event and process in (None, entry["process"])
        ]

    def answers(self) -> bool:
        """Return whether the gate's socket accepts; a bare connection, as httpcore leaks one that fails."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def customer(self, allowance: float | None, subject: str = SUBJECT, key: str = "acme") -> None:
        body = {"key": key, "name": key, "usageAttribution": {"subjectKeys": [subject]}}
        assert self.api.post("/api/v1/customers", json=body).is_success
        self.entitle(allowance, key)

    def entitle(self, allowance: float | None, key: str = "acme") -> None:
        wanted = {"feature_key": "api", "allowance": allowance}
        assert self.api.post(f"/sandbox/v1/customers/{key}/entitlements", json=wanted).is_success

    def log(self, number: int) -> None:
        """Post the logs of requests as Kong's http-log does."""
        logs = []
        for _ in range(number):
            self.sent += 1
            log = authenticated()
            log["request"]["id"] = f"{os.getpid()}-{self.sent}"
            log["started_at"] = time.time_ns() // 1_000_000
            logs.append(log)
        if logs:
            answer = httpx.post(f"http://127.0.0.1:{self.port}/", json=logs, timeout=10)
            assert answer.is_success, answer.text


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with running_sandbox() as url:
        made = Node(tmp_path, url)
        yield made
        made.close()


def meet(kong: FakeKong) -> None:
    """Let a subject be seen, as by an earlier Kong, and wait until the gate has a line for it."""
    kong.seen.add(SUBJECT)
    kong.report()
    eventually(lambda: kong.sync() and kong.ceilings)


def test_of_a_customer_with_100_requests_left_exactly_100_pass(node: Node) -> None:
    node.customer(100)
    with node.running():
        kong = node.kong()
        kong.sync()
        assert kong.settings["mode"] == "enforce"
        meet(kong)
        passed, stopped = 0, 0
        deadline = time.monotonic() + 40
        while passed < 100 or stopped < 50:
            assert time.monotonic() < deadline, (passed, stopped)
            allowed = sum(kong.request(SUBJECT, "api") is None for _ in range(7))
            passed, stopped = passed + allowed, stopped + 7 - allowed
            node.log(allowed)
            kong.report()
            kong.sync()
            time.sleep(0.1)
        assert passed == 100
        assert {kong.request(SUBJECT, "api") for _ in range(50)} == {"USAGE_LIMIT_REACHED"}
        meter = "/api/v1/meters/kong_api_requests/query"
        eventually(lambda: node.api.get(meter).json()["data"][0]["value"] == 100)
        kong.report()
        view = kong.client.get("/v1/gate").json()
        assert view["denied"][0]["reason"] == "USAGE_LIMIT_REACHED"
        assert view["stopped"][0]["count"] > 0


def test_a_flip_in_the_metering_api_reaches_kong_within_two_seconds(node: Node) -> None:
    node.customer(50)
    with node.running():
        kong = node.kong()
        kong.sync()
        meet(kong)
        assert kong.request(SUBJECT, "api") is None
        for allowance, reason in ((0, "USAGE_LIMIT_REACHED"), (50, None), (0, "USAGE_LIMIT_REACHED")):
            node.entitle(allowance)
            flipped = time.monotonic()
            while kong.request(SUBJECT, "api") != reason:
                kong.sync(wait=1)
            assert time.monotonic() - flipped < 3.0  # 2 s on a quiet machine


def test_the_last_state_is_served_at_once_after_a_restart_while_the_metering_api_is_away(
    node: Node, tmp_path: Path
) -> None:
    node.customer(0)
    with node.running():
        kong = node.kong()
        kong.sync()
        meet(kong)
        eventually(lambda: kong.sync() is not None and kong.request(SUBJECT, "api") is not None)
        state = tmp_path / "spool" / "gate" / "state-1.json"
        eventually(state.exists)
        node.api.post("/sandbox/v1/faults", json={"action": "cut"})
    with node.running():  # the one before had seconds to save its state, and ended without the API
        again = node.kong("fedcba9876543210")
        again.sync()
        assert again.request(SUBJECT, "api") == "USAGE_LIMIT_REACHED"


def test_an_override_opens_the_gate_until_it_ends_and_is_listed(node: Node) -> None:
    node.customer(0)
    command = [sys.executable, "-m", "openmeter_plugin", "gate"]
    where = ["--socket", str(node.socket)]
    with node.running():
        assert "no Kong asks" in subprocess.check_output([*command, "status", *where], text=True)
        kong = node.kong()
        kong.sync()
        meet(kong)
        assert kong.request(SUBJECT, "api") == "USAGE_LIMIT_REACHED"
        allow = [*command, "allow", SUBJECT, "--for", "2h", "--why", "ticket 7", *where]
        assert "is allowed until" in subprocess.check_output(allow, text=True)
        kong.sync()
        assert kong.request(SUBJECT, "api") is None
        shown = subprocess.check_output([*command, "status", *where], text=True)
        assert "ticket 7" in shown
        assert "no Kong asks" not in shown
        whole = json.loads(subprocess.check_output([*command, "status", "-o", "json", *where], text=True))
        assert [one["why"] for one in whole["overrides"]] == ["ticket 7"]
        subprocess.check_call([*command, "end", SUBJECT, *where])
        kong.sync()
        assert kong.request(SUBJECT, "api") == "USAGE_LIMIT_REACHED"
        refused = subprocess.run([*command, "end", SUBJECT, *where], capture_output=True, check=False)
        assert refused.returncode != 0


def test_the_operations_api_shows_the_gate_and_sets_overrides(node: Node) -> None:
    node.customer(0)
    with node.running():
        kong = node.kong()
        kong.sync()
        meet(kong)
        kong.request(SUBJECT, "api")
        kong.report()
        transport = httpx.HTTPTransport(uds=str(node.folder / "api"))
        with httpx.Client(transport=transport, base_url="http://api", timeout=10) as api:
            labels = 'feature="api",mode="enforce",reason="USAGE_LIMIT_REACHED"'
            eventually(lambda: f"gate_decisions_total{{{labels}}} 1.0" in api.get("/metrics").text)
            assert api.get("/v1/gate").json()["denied"][0]["subjects"] == [SUBJECT]
            body = {"subject": SUBJECT, "seconds": 60, "why": "a test"}
            assert api.post("/v1/gate/overrides", json=body).status_code == 201
            kong.sync()
            assert kong.request(SUBJECT, "api") is None
            assert api.delete("/v1/gate/overrides", params={"subject": SUBJECT}).status_code == 204
            assert api.delete("/v1/gate/overrides", params={"subject": SUBJECT}).status_code == 404


def test_wrong_settings_are_named_at_start(node: Node) -> None:
    wrong = json.loads((node.folder / "gate.yaml").read_text())
    wrong |= {"mode": "block", "max_calls": 0, "apply": [{"features": ["api"], "rout": "chat"}]}
    (node.folder / "gate.yaml").write_text(json.dumps(wrong))
    command = [sys.executable, "-m", "openmeter_plugin", "serve", "--http-log", f"127.0.0.1:{node.port}"]
    command += ["--spool", str(node.folder / "spool"), "--gate", str(node.folder / "gate.yaml")]
    command += ["--http-log-config", str(node.folder / "plugin.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode != 0
    for name in ("--gate", "mode", "max_calls", "apply.0.rout"):
        assert name in ended.stderr
