"""The daemon over time: reloads, restarts, kills, a second daemon, and its metrics."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import httpx
import pytest

from syncd.config import settings
from syncd.daemon.service import running
from syncd.runs.options import RunOptions
from syncd.runs.run import RunState, new_run
from tests.harness.service_manager import notified
from tests.syncd.daemon.test_service import daemon, finished, idle
from tests.syncd.processes import KONG_YML, Project, command, logged, started_daemon, when_logged
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.states import opened_history
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow


def metric_values(client: httpx.Client) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def customers(sandbox: httpx.Client) -> list[dict[str, object]]:
    items: list[dict[str, object]] = sandbox.get("/api/v1/customers").json()["items"]
    return items


def test_the_metrics_count_runs_changes_blocked_and_unbilled(project: Project, sandbox: httpx.Client) -> None:
    sandbox.post("/api/v1/customers", json={"key": "acme", "name": "by hand"}).raise_for_status()
    event = {"specversion": "1.0", "id": "1", "source": "kong", "type": "kong.api_request", "subject": "x"}
    headers = {"Content-Type": "application/cloudevents+json"}
    sandbox.post("/api/v1/events", json=event, headers=headers).raise_for_status()
    with daemon(project) as client:
        idle(client)
        found = metric_values(client)
        assert client.get("/v1/plan").json()["plan"]["unbilled"]["events"] == 1
    assert found['syncd_runs_total{dry_run="false",result="succeeded",trigger="schedule"}'] == 1
    assert found['syncd_changes_total{kind="create-customer",outcome="done"}'] == 1
    assert found["syncd_blocked"] == 0, "a customer made by hand is a decision of people"
    assert found['syncd_planned_changes{kind="blocked"}'] == 2
    assert found["syncd_in_sync"] == 0, "carol was to be created"
    assert found['syncd_unbilled_events{status="unknown"}'] == 1
    assert found["syncd_last_success_timestamp_seconds"] >= found["syncd_last_attempt_timestamp_seconds"] > 0
    assert found['syncd_api_calls_total{api="metering",method="POST",status="201"}'] >= 1


def test_a_failed_run_is_not_ready_and_is_counted_by_its_reason(project: Project) -> None:
    (project.folder / "kong.yml").write_text("")
    with daemon(project) as client:
        idle(client)
        assert client.get("/readyz").status_code == 503
        assert client.get("/v1/plan").status_code == 404
        assert metric_values(client)['syncd_run_failures_total{reason="source"}'] == 1
        assert metric_values(client)["syncd_last_success_timestamp_seconds"] == 0
        (project.folder / "kong.yml").write_text(KONG_YML)
        finished(client, client.post("/v1/syncs").json()["id"])
        assert client.get("/readyz").status_code == 200


def test_a_guard_stops_the_daemon_until_a_person_forces_the_run(
    project: Project, sandbox: httpx.Client
) -> None:
    project.settings += "guards: {min_changes: 1}\n"
    with daemon(project) as client:
        idle(client)
        (carol,) = (c for c in customers(sandbox) if c["key"] != "acme")
        body = {name: carol[name] for name in ("key", "metadata", "usageAttribution")} | {"name": "old"}
        sandbox.put(f"/api/v1/customers/{carol['id']}", json=body).raise_for_status()
        stopped = finished(client, client.post("/v1/syncs").json()["id"])
        assert stopped["state"] == "failed"
        assert "1 of 2 customers (50.0 %)" in str(stopped["error"])
        assert metric_values(client)['syncd_run_failures_total{reason="guard"}'] == 1
        forced = finished(client, client.post("/v1/syncs", json={"force": True}).json()["id"])
        assert forced["state"] == "succeeded"


def test_a_run_for_one_principal_changes_nothing_else(project: Project, sandbox: httpx.Client) -> None:
    with daemon(project) as client:
        idle(client)
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        asked = client.post("/v1/syncs", json={"principal": "carol"}).json()
        assert finished(client, asked["id"])["state"] == "succeeded"
        assert [customer["name"] for customer in customers(sandbox)] == ["carol"]
        lost = finished(client, client.post("/v1/syncs", json={"principal": "nobody"}).json()["id"])
        assert "no principal matches" in str(lost["error"])


def test_a_restarted_daemon_still_knows_its_runs(project: Project) -> None:
    with daemon(project) as client:
        last = idle(client)["last"]
    assert isinstance(last, dict)
    with daemon(project) as client:
        run = client.get(f"/v1/syncs/{last['id']}").json()
        assert run["plan"]["summary"]["create-customer"] == 2
        assert len(run["results"]) == 5


def test_a_reload_takes_the_new_configuration_and_refuses_a_bad_one(
    project: Project, sandbox: httpx.Client
) -> None:
    project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state}\n")
    with (
        running(settings.load(project.config)) as there,
        httpx.Client(base_url=there.address.url) as client,
    ):
        idle(client)
        good = project.config.read_text()
        project.config.write_text(good.replace("group_by: tag", "group_by: nobody"))
        there.reload(lambda: settings.load(project.config))
        assert "mapping.group_by" in client.get("/v1/status").json()["configuration_refused"]
        assert metric_values(client)["syncd_config_current"] == 0
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        assert finished(client, client.post("/v1/syncs").json()["id"])["state"] == "succeeded"
        assert len(customers(sandbox)) == 2

        sandbox.post("/sandbox/v1/reset").raise_for_status()
        changed = good.replace("group_by: tag", "group_by: none").replace("1h", "2h")
        project.config.write_text(changed + "\n")
        there.reload(lambda: settings.load(project.config))
        assert client.get("/v1/status").json()["configuration_refused"] is None
        assert metric_values(client)["syncd_config_current"] == 1
        finished(client, client.post("/v1/syncs").json()["id"])
        assert len(customers(sandbox)) == 3


def test_a_mapping_file_that_cannot_be_read_is_refused_at_the_start_and_at_a_reload(project: Project) -> None:
    project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state}\n")
    good = project.config.read_text()
    bad = good.replace("group_by: tag", "group_by: file, file: groups.csv")
    assert bad != good
    with running(settings.load(project.config)) as there:
        project.config.write_text(bad)
        there.reload(lambda: settings.load(project.config))
        assert "mapping.file" in str(there.describe()["configuration_refused"])
    ended = project.run("run")
    assert ended.returncode == 1
    assert "mapping.file: cannot read" in ended.stderr
    assert "groups.csv" in ended.stderr


def test_a_reload_cannot_remove_the_token_of_an_address_beyond_loopback(project: Project) -> None:
    """The socket stays open until a restart, whatever address the new configuration has."""
    project.configure("daemon: {listen: '0.0.0.0:0', state_dir: state, token: open-sesame-please}\n")
    with running(settings.load(project.config)) as there:
        url = f"http://127.0.0.1:{there.address.port}"
        project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state}\n")
        there.reload(lambda: settings.load(project.config))
        assert httpx.get(f"{url}/v1/status").status_code == 401
        authorized = {"Authorization": "Bearer open-sesame-please"}
        status = httpx.get(f"{url}/v1/status", headers=authorized).json()
        assert "daemon.token must stay set" in status["configuration_refused"]
        project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state, token: another-of-16-chars}\n")
        there.reload(lambda: settings.load(project.config))
        assert httpx.get(f"{url}/v1/status", headers=authorized).status_code == 401
        assert (
            httpx.get(f"{url}/v1/status", headers={"Authorization": "Bearer another-of-16-chars"}).status_code
            == 200
        )


def test_an_address_beyond_loopback_without_a_token_is_refused_before_anything_is_read(
    project: Project,
) -> None:
    project.configure("daemon: {listen: '0.0.0.0:0'}\n")
    for variables in ({}, {"SYNCD_DAEMON__TOKEN": ""}):
        ended = project.run("run", **variables)
        assert ended.returncode == 1
        assert "token" in ended.stderr
        assert "SYNCD_DAEMON__TOKEN" in ended.stderr


def test_a_reload_changes_how_long_runs_are_kept(project: Project, tmp_path: Path) -> None:
    project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state}\n")
    with opened_history(tmp_path / "state") as history:
        old = new_run("manual", RunOptions())
        old = replace(old, state=RunState.SUCCEEDED, requested_at=old.requested_at - timedelta(days=7))
        history.save(old.summary())
        for _ in range(100):
            history.save(replace(new_run("manual", RunOptions()), state=RunState.SUCCEEDED).summary())
        with (
            running(settings.load(project.config)) as there,
            httpx.Client(base_url=there.address.url) as client,
        ):
            idle(client)
            assert history.run(old.id)
            project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state, keep_runs: 5d}\n")
            there.reload(lambda: settings.load(project.config))
            finished(client, client.post("/v1/syncs").json()["id"])
            assert history.run(old.id) is None


def test_the_status_shows_the_next_run_of_a_cron_schedule_with_jitter(project: Project) -> None:
    project.settings = project.settings.replace("interval: 1h", "cron: '0 3 * * *', jitter: 1m")
    with daemon(project) as client:
        status = idle(client)
    assert "T03:0" in str(status["next_run"])


def test_sighup_reloads_and_an_invalid_configuration_is_logged_and_refused(project: Project) -> None:
    project.configure("daemon: {listen: '127.0.0.1:0'}\n")
    with started_daemon(project) as (started, log):
        when_logged(log, "run_finished", started)
        good = project.config.read_text()
        project.config.write_text("polciy: sync\n")
        started.send_signal(signal.SIGHUP)
        assert "polciy" in str(when_logged(log, "configuration_refused", started)["error"])
        project.config.write_text(good)
        started.send_signal(signal.SIGHUP)
        when_logged(log, "configuration_reloaded", started)
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 0


def test_the_service_manager_hears_of_the_start_a_reload_and_the_stop(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    project.configure("daemon: {listen: '127.0.0.1:0'}\n")
    with notified(address) as manager, started_daemon(project) as (started, log):
        assert manager.recv(100) == b"READY=1"
        assert when_logged(log, "listening", started)
        started.send_signal(signal.SIGHUP)
        assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(100) == b"READY=1"
        started.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert started.wait(10) == 0


def test_a_signal_in_the_moment_in_which_the_daemon_begins_to_wait_is_heard(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler interrupts the code that waits: it must need no lock which that code may hold."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    project.configure("daemon: {listen: '127.0.0.1:0'}\n")
    with notified(str(tmp_path / "notify")) as manager, started_daemon(project) as (started, _):
        assert manager.recv(100) == b"READY=1"
        for pause in range(2_000):
            started.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1")
            assert manager.recv(100) == b"READY=1"
            end = time.perf_counter_ns() + pause % 60 * 1_000  # up to 60 us after the daemon said so
            while time.perf_counter_ns() < end:
                pass
        started.send_signal(signal.SIGTERM)
        assert manager.recv(100) == b"STOPPING=1"
        assert started.wait(10) == 0


class Slow:
    """A metering API that blocks the second creation until `gate` is set."""

    def __init__(self, sandbox: httpx.Client) -> None:
        self.gate, self.reached = threading.Event(), threading.Event()
        self._sandbox = sandbox
        self.creations: list[object] = []

    def __call__(self, asked: Asked) -> Answer:
        if asked.method == "POST" and asked.path == "/api/v1/customers":
            self.creations.append(asked.body)
            if len(self.creations) == 2:
                self.reached.set()
                self.gate.wait(20)
        answer = self._sandbox.request(asked.method, asked.path, params=asked.query, json=asked.body)
        return Answer(answer.content, answer.status_code, {"Content-Type": "application/json"})


def test_a_daemon_killed_mid_run_leaves_a_correct_history_and_the_next_run_completes_it(
    project: Project, sandbox: httpx.Client
) -> None:
    slow = Slow(sandbox)
    project.concurrency = 1
    with serving(slow) as server:
        project.metering = server.url
        project.configure("daemon: {listen: '127.0.0.1:0'}\n")
        try:
            with started_daemon(project) as (started, _):
                assert slow.reached.wait(20)
                started.kill()
                started.wait()
        finally:
            slow.gate.set()
        listed = json.loads(project.call("history", "--output=json").stdout)
        assert [run["state"] for run in listed] == ["failed"]
        assert listed[0]["error"].startswith("interrupted: ")
        assert listed[0]["outcomes"]["done"] == 1
        done = json.loads(project.call("history", listed[0]["id"], "--output=json").stdout)["results"]
        assert [result["status"] for result in done] == ["done", "begun"]
        assert project.call("apply", "--yes").returncode == 0
        assert project.call("plan").returncode == 0
    assert len(customers(sandbox)) == 2
    states = [run["state"] for run in json.loads(project.call("history", "--output=json").stdout)]
    assert states == ["succeeded", "failed"]


def test_two_daemons_take_turns_and_create_no_customer_twice(project: Project, sandbox: httpx.Client) -> None:
    project.configure("daemon: {listen: '127.0.0.1:0'}\n")
    with started_daemon(project, "1") as (one, log1), started_daemon(project, "2") as (other, log2):
        for started, log in ((one, log1), (other, log2)):
            assert when_logged(log, "run_finished", started)["state"] == "succeeded"
    assert len(customers(sandbox)) == 2
    runs = json.loads(project.call("history", "--output=json").stdout)
    assert sorted(run["outcomes"]["done"] for run in runs) == [0, 5]


def test_apply_waits_for_a_daemon_that_is_writing(project: Project, sandbox: httpx.Client) -> None:
    slow = Slow(sandbox)
    with serving(slow) as server:
        project.metering = server.url
        project.configure("daemon: {listen: '127.0.0.1:0'}\n")
        try:
            with started_daemon(project) as (started, log):
                assert slow.reached.wait(20)
                concurrent = subprocess.Popen(
                    command("apply", "--yes"),
                    cwd=project.folder,
                    env=project.environment(),
                    stdout=subprocess.PIPE,
                    text=True,
                )
                with pytest.raises(subprocess.TimeoutExpired):
                    concurrent.wait(1.5)
                slow.gate.set()
                out, _ = concurrent.communicate(timeout=20)
                assert concurrent.returncode == 0
                assert "nothing to do" in out
                assert logged(log, "run_finished")
                assert started.poll() is None
        finally:
            slow.gate.set()
    assert len(slow.creations) == 2


def test_a_token_revoked_mid_run_ends_the_run_and_names_the_setting(
    project: Project, sandbox: httpx.Client
) -> None:
    fault = {"method": "POST", "path": "/api/v1/subjects", "status": 401}
    sandbox.post("/sandbox/v1/faults", json=fault).raise_for_status()
    with daemon(project) as client:
        last = idle(client)["last"]
        assert isinstance(last, dict)
        assert last["state"] == "failed"
        assert "metering.token" in str(last["error"])
        assert last["outcomes"]["done"] == 2
        sandbox.delete("/sandbox/v1/faults").raise_for_status()
        assert finished(client, client.post("/v1/syncs").json()["id"])["state"] == "succeeded"
    assert eventually(lambda: len(customers(sandbox)) == 2)


def test_status_asks_the_daemon_and_ends_with_1_after_a_failed_run(project: Project) -> None:
    (project.folder / "kong.yml").write_text("")
    project.configure("daemon: {listen: '127.0.0.1:9'}\n")
    assert project.call("status").returncode == 1
    with daemon(project) as client:
        idle(client)
        port = client.base_url.port
        project.configure(f"daemon: {{listen: '127.0.0.1:{port}'}}\n")
        result = project.call("status", "--output=json")
        assert result.returncode == 1
        assert json.loads(result.stdout)["last"]["state"] == "failed"
        (project.folder / "kong.yml").write_text(KONG_YML)
        assert project.call("resync", "--wait", "--principal", "carol").returncode == 0
        assert project.call("status").returncode == 0
