"""Redelivery and replay over the HTTP API, and its responses during failures."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from pathlib import Path

import httpx
import pytest

from openmeter_plugin.process.supervisor import Heartbeats
from tests.harness.process import eventually
from tests.plugin.deliveries import record, spooled
from tests.plugin.events_server import Answer, take_all
from tests.plugin.operations_api import ADMIN_TOKEN, NEW, OLD, api
from tests.plugin.spools import QUEUE

pytestmark = pytest.mark.slow

# Actions


def test_retained_events_of_a_span_are_redelivered(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        body = {
            "from": "2026-11-22T06:00:00Z",
            "to": "2026-11-22T08:00:00+00:00",
            "subject": "consumer:bob",
        }
        before = running.events.came.copy()
        answer = running.client.post("/v1/redeliver", json=body)
        assert answer.status_code == 202
        redelivery = answer.json()
        assert answer.headers["location"] == f"/v1/redeliver/{redelivery['id']}"
        assert (redelivery["state"], redelivery["subject"]) == ("waiting", "consumer:bob")
        done = eventually(
            lambda: (found := running.get(f"/v1/redeliver/{redelivery['id']}"))["state"] == "done" and found,
            what="the redelivery",
        )
        assert done["sent"] == 2
        redelivered = running.events.came - before
        assert redelivered == {"event-000004": 1, "event-000005": 1}
        label = f'{{destination="{QUEUE}"}}'
        assert running.metrics()[f"openmeter_plugin_events_redelivered_total{label}"] == 2


def test_replayed_dead_letters_are_delivered_once_the_cause_is_fixed(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        (letter,) = running.get("/v1/dead-letters")["dead_letters"]
        running.events.script = take_all
        answer = running.client.post("/v1/dead-letters/replay", json={"ids": [letter["id"]]})
        assert (answer.status_code, answer.json()["marked"]) == (202, 1)
        eventually(lambda: not running.get("/v1/dead-letters")["dead_letters"], what="the replay")
        books = running.get("/v1/spool")["total"]["books"]
        assert (books["delivered"], books["dead_lettered"]) == (6, 0)
        nothing = running.client.post("/v1/dead-letters/replay", json={"all": True})
        assert (nothing.json()["id"], nothing.json()["marked"]) == (None, 0)
        assert "location" not in nothing.headers


def test_waiting_events_are_visible_during_an_outage_of_the_metering_api(tmp_path: Path) -> None:
    with api(tmp_path, history=False) as running:
        running.events.script = lambda _: Answer(503)
        spooled(running.server.spool, [record(1, time=OLD), record(2, time=NEW)])
        label = f'{{destination="{QUEUE}"}}'
        retries = f"openmeter_plugin_delivery_retries_total{label}"
        eventually(lambda: running.metrics().get(retries), what="a retry")
        metrics = running.metrics()
        assert metrics[f"openmeter_plugin_backlog_events{label}"] == 2
        assert metrics[f"openmeter_plugin_oldest_waiting_event_age_seconds{label}"] > 3600
        assert metrics[f"openmeter_plugin_delivery_failures_in_a_row{label}"] >= 1
        assert running.get("/v1/ledger")["hours_with_waiting_events"] == ["2026-11-20T05", "2026-11-22T07"]
        assert running.get("/v1/spool")["total"]["oldest_waiting"]["time"] == OLD


# Failures


def test_a_killed_delivery_process_is_restarted_and_no_connection_is_refused(tmp_path: Path) -> None:
    with api(tmp_path) as running:
        refused: list[str] = []
        answered: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            headers = {"authorization": f"Bearer {ADMIN_TOKEN}"}
            while not stop.is_set():
                try:
                    answer = httpx.get(f"{running.url}/v1/spool", headers=headers, timeout=15)
                    answered.append(answer.status_code)
                except httpx.ConnectError as error:
                    refused.append(str(error))
                except httpx.TransportError:
                    pass  # the process was killed during this request

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for _ in range(2):
                victim = eventually(lambda: running.server.child("delivery"))
                assert victim
                os.kill(victim, signal.SIGKILL)
                before = len(answered)
                eventually(lambda n=before: len(answered) > n + 5, what="answers")  # type: ignore[misc]
        finally:
            stop.set()
            asking.join(20)
        assert refused == []
        assert set(answered) == {200}
        restarts = running.metrics()
        assert restarts['openmeter_plugin_process_restarts_total{child="delivery"}'] == 2
        assert restarts['openmeter_plugin_process_restarts_total{child="worker-0"}'] == 0
        eventually(lambda: running.client.get("/readyz").status_code == 200, what="readiness")


def test_a_delivery_process_that_waits_for_the_lock_is_alive_and_not_ready(tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    descriptor = os.open(tmp_path / "spool" / "delivery.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with api(tmp_path, history=False) as running:
            assert running.client.get("/healthz").status_code == 200
            answer = running.client.get("/readyz")
            assert answer.status_code == 503
            assert "waits for the lock" in answer.json()["problems"][0]
            os.close(descriptor)
            descriptor = -1
            eventually(lambda: running.client.get("/readyz").status_code == 200, what="readiness")
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def test_a_hung_worker_is_replaced_and_counted_in_the_metrics(tmp_path: Path) -> None:
    with api(tmp_path, "--hang-timeout", "2", history=False) as running:
        eventually(lambda: running.client.get("/readyz").status_code == 200, what="readiness")
        worker = eventually(lambda: running.server.child("worker"))
        assert worker
        os.kill(worker, signal.SIGSTOP)
        label = 'openmeter_plugin_process_restarts_total{child="worker-0"}'
        eventually(lambda: running.metrics()[label] == 1, what="the replacement")
        eventually(lambda: running.client.get("/readyz").status_code == 200, what="readiness again")


def test_a_process_without_a_heartbeat_makes_the_server_unready(tmp_path: Path) -> None:
    from openmeter_plugin.api.health import HealthMonitor

    heartbeats = Heartbeats(2)
    monitor = HealthMonitor(tmp_path, {"worker-0": 0, "delivery": 1}, heartbeats, hang_seconds=0.05)

    def silent() -> list[str]:
        heartbeats.beat(1)
        return [problem for problem in monitor.problems() if "no heartbeat" in problem]

    (problem,) = eventually(silent, what="the silence")
    assert problem.startswith("no heartbeat from worker-0 for")
    heartbeats.beat(0)
    assert [problem for problem in monitor.problems() if "worker-0" in problem] == []


def test_unreadable_books_leave_the_other_metrics(tmp_path: Path) -> None:
    from openmeter_plugin.api.health import HealthMonitor
    from openmeter_plugin.api.metrics import Metrics

    (tmp_path / "books.db").write_bytes(b"this is not a database, " * 100)
    text = Metrics(HealthMonitor(tmp_path)).scrape("")[0].decode()
    assert "openmeter_plugin_books_readable 0.0" in text
    assert "openmeter_plugin_build_info" in text
    assert any("cannot be read" in problem for problem in HealthMonitor(tmp_path).problems())
