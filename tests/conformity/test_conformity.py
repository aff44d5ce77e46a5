"""The suite itself, against the sandbox over a real socket: it passes, cleans up and notices faults."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console

from syncd.sandbox.testing import running_sandbox
from tests.conformity.__main__ import DIFFERS, OK, REFUSED, main
from tests.conformity.stage import Stage
from tests.syncd.targets import by_hand, fault
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow

FAST = ("--flush", "0.2", "--arrival", "10")


@pytest.fixture
def server() -> Iterator[httpx.Client]:
    with running_sandbox() as url, httpx.Client(base_url=url) as client:
        yield client


def conformity(server: httpx.Client, *arguments: str) -> tuple[int, str]:
    """Run the suite, and return its exit status and what it printed."""
    printed = io.StringIO()
    status = main([str(server.base_url).rstrip("/"), *FAST, *arguments], Console(file=printed, width=500))
    return status, printed.getvalue()


def everything(server: httpx.Client) -> dict[str, Any]:
    """Return what a server has, without events."""
    return {
        "customers": server.get("/api/v1/customers", params={"pageSize": 1000}).json()["items"],
        "subjects": server.get("/api/v1/subjects").json(),
        "meters": [meter["slug"] for meter in server.get("/api/v1/meters").json()],
    }


@pytest.mark.parametrize(("dialect", "not_offered"), [("v1", 0), ("v3", 1)])  # v3 has no subject entities
def test_all_scenarios_hold_and_leave_nothing_behind(
    server: httpx.Client, dialect: str, not_offered: int
) -> None:
    by_hand(server, key="somebody", name="Somebody", usageAttribution={"subjectKeys": ["hers"]})
    meter = server.get("/api/v1/meters/kong_llm_events").json()
    server.delete(f"/api/v1/meters/{meter['id']}").raise_for_status()
    before = everything(server)
    status, printed = conformity(server, "--with-customers", "--dialect", dialect)
    assert status == OK, printed
    assert "differs" not in printed
    assert printed.count("not offered:") == not_offered
    assert everything(server) == before


def test_a_server_with_customers_of_somebody_else_is_left_alone(server: httpx.Client) -> None:
    by_hand(server, key="somebody", name="Somebody")
    requests = server.get("/sandbox/v1/stats").json()["requests_by_endpoint"]
    status, printed = conformity(server)
    assert status == REFUSED
    assert "1 customers of somebody else" in printed
    after = server.get("/sandbox/v1/stats").json()["requests_by_endpoint"]
    assert all(name.startswith("GET ") for name in after.keys() - requests.keys()), after


def test_what_a_server_does_otherwise_is_shown_and_ends_with_1(server: httpx.Client) -> None:
    fault(server, method="PUT", status=500)
    status, printed = conformity(server, "--dialect", "v1", "--only", "odd keys")
    assert status == DIFFERS
    assert "odd keys and subjects come back as they were sent: differs:" in printed
    assert "500" in printed
    assert everything(server)["customers"] == []


def test_a_change_to_somebody_elses_customer_is_shown_and_ends_with_1(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    somebody = by_hand(server, key="somebody", name="Somebody")

    def a_fault_of_syncd(stage: Stage) -> None:
        mine = {
            "key": "somebody",
            "name": "Mine",
            "usageAttribution": {"subjectKeys": [stage.named("subject")]},
        }
        stage.server.made("PUT", f"/api/v1/customers/{somebody['id']}", mine)

    monkeypatch.setattr("tests.conformity.__main__.SCENARIOS", (a_fault_of_syncd,))
    status, printed = conformity(server, "--with-customers", "--dialect", "v1")
    assert status == DIFFERS
    assert f"CHANGED, and not of this run: customer {somebody['id']}" in printed
    assert [each["key"] for each in everything(server)["customers"]] == ["somebody"]


def test_a_server_without_deduplication_is_recognised() -> None:
    with running_sandbox(dedupe=False) as url, httpx.Client(base_url=url) as server:
        for words in ("doubles", "plugin is counted"):
            status, printed = conformity(server, "--only", words)
            assert status == OK, printed


def test_an_interrupted_run_cleans_up(server: httpx.Client) -> None:
    command = [sys.executable, "-m", "tests.conformity", str(server.base_url), *FAST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        eventually(lambda: everything(server)["customers"], seconds=60, what="a first customer")
        running.send_signal(signal.SIGINT)
        printed, _ = running.communicate(timeout=60)
    assert running.returncode == DIFFERS, printed
    assert "the run was interrupted" in printed
    left = everything(server)
    assert (left["customers"], left["subjects"]) == ([], [])


def test_a_url_that_is_no_metering_api_is_refused() -> None:
    with httpx.Client(base_url="http://127.0.0.1:9") as nothing:
        status, printed = conformity(nothing)
    assert status == REFUSED
    assert "does not answer" in printed
