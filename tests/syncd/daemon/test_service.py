"""The daemon's schedule, runs, API and signals."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from syncd.config import settings
from syncd.core.errors import DaemonError
from syncd.daemon.service import running
from tests.syncd.processes import Project, daemon_process, when_logged
from tests.syncd.servers import Answer, Asked, serving
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow

FINISHED = {"succeeded", "blocked", "failed"}


@contextmanager
def daemon(project: Project, extra: str = "", **headers: str) -> Iterator[httpx.Client]:
    listen = "listen: '127.0.0.1:0', state_dir: state"
    project.configure(f"daemon: {{{listen}{', ' + extra if extra else ''}}}\n")
    with (
        running(settings.load(project.config)) as running_daemon,
        httpx.Client(base_url=running_daemon.address.url, headers=headers) as client,
    ):
        yield client


def finished(client: httpx.Client, run_id: str) -> dict[str, object]:
    def probe() -> dict[str, object] | None:
        run: dict[str, object] = client.get(f"/v1/syncs/{run_id}").json()
        return run if run["state"] in FINISHED else None

    return eventually(probe, what="the end of the run")


def idle(client: httpx.Client) -> dict[str, object]:
    def probe() -> dict[str, object] | None:
        status: dict[str, object] = client.get("/v1/status").json()
        return status if status["state"] == "idle" and status["last"] and not status["queued"] else None

    return eventually(probe, what="an idle daemon")


def test_the_daemon_runs_once_at_start(project: Project, sandbox: httpx.Client) -> None:
    with daemon(project) as client:
        status = idle(client)
    last = status["last"]
    assert isinstance(last, dict)
    assert (last["trigger"], last["state"]) == ("schedule", "succeeded")
    assert status["last_success"] == last["finished_at"]
    assert status["next_run"]
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 2


def test_the_daemon_runs_again_after_each_interval(project: Project) -> None:
    project.settings = project.settings.replace("1h", "1s")
    with daemon(project) as client:
        first = idle(client)["last"]
        assert isinstance(first, dict)

        def another() -> bool:
            last = client.get("/v1/status").json()["last"]
            return bool(last["id"] != first["id"] and last["trigger"] == "schedule")

        assert eventually(another, what="the second sync")


def test_a_requested_run_can_be_followed_to_its_end(project: Project, sandbox: httpx.Client) -> None:
    with daemon(project) as client:
        idle(client)
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        answer = client.post("/v1/syncs", json={})
        assert answer.status_code == 202
        assert answer.headers["location"] == f"/v1/syncs/{answer.json()['id']}"
        run = finished(client, answer.json()["id"])
    assert (run["trigger"], run["state"], run["dry_run"]) == ("manual", "succeeded", False)
    assert isinstance(run["results"], list)
    assert len(run["results"]) == 5


def test_a_dry_run_shows_the_plan_and_changes_nothing(project: Project, sandbox: httpx.Client) -> None:
    with daemon(project) as client:
        idle(client)
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        run = finished(client, client.post("/v1/syncs", json={"dry_run": True}).json()["id"])
    assert run["in_sync"] is False
    assert run["results"] == []
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 0


def test_requests_during_a_run_are_queued_once_and_never_overlap(project: Project) -> None:
    gate, inside, most = threading.Event(), threading.Semaphore(0), []
    going = threading.Lock()

    def kong(asked: Asked) -> Answer:
        if asked.path != "/status":
            return Answer({"data": [], "next": None})
        most.append(going.acquire(blocking=False))
        inside.release()
        gate.wait(10)
        going.release()
        return Answer({})

    with serving(kong) as server:
        project.settings = (
            f"sources: [{{type: kong-admin, url: '{server.url}'}}]\nschedule: {{interval: 1h}}\n"
        )
        try:
            with daemon(project) as client:
                assert inside.acquire(timeout=10)
                waiting = [client.post("/v1/syncs", json={}).json() for _ in range(3)]
                dry = client.post("/v1/syncs", json={"dry_run": True}).json()
                assert len({run["id"] for run in waiting}) == 1
                assert waiting[0]["state"] == "queued"
                assert dry["id"] != waiting[0]["id"]
                assert client.get("/v1/status").json()["queued"] == 2
                gate.set()
                finished(client, waiting[0]["id"])
                finished(client, dry["id"])
        finally:
            gate.set()
    assert len(most) >= 3
    assert all(most)


def test_a_failed_run_is_reported_and_the_next_one_works(project: Project) -> None:
    with daemon(project) as client:
        idle(client)
        kong_yml = project.folder / "kong.yml"
        text = kong_yml.read_text()
        kong_yml.write_text("")
        failed = finished(client, client.post("/v1/syncs").json()["id"])
        assert failed["state"] == "failed"
        assert "kong.yml" in str(failed["error"])
        kong_yml.write_text(text)
        assert finished(client, client.post("/v1/syncs").json()["id"])["state"] == "succeeded"


def test_a_run_with_something_blocked_says_so(project: Project, sandbox: httpx.Client) -> None:
    taken = {"key": "other", "name": "by hand", "usageAttribution": {"subjectKeys": ["acme"]}}
    sandbox.post("/api/v1/customers", json=taken).raise_for_status()
    with daemon(project) as client:
        last = idle(client)["last"]
    assert isinstance(last, dict)
    assert last["state"] == "blocked"


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "Basic t0ken-of-16-chars", "Bearer"])
def test_with_a_token_everything_but_healthz_needs_it(project: Project, authorization: str) -> None:
    with daemon(project, "token: t0ken-of-16-chars", authorization=authorization) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.post("/v1/syncs", json={}).status_code == 401
        assert client.get("/v1/status").status_code == 401
        assert client.get("/v1/syncs/x").status_code == 401
        right = {"Authorization": "Bearer t0ken-of-16-chars"}
        assert client.get("/v1/status", headers=right).status_code == 200


def test_an_unknown_run_is_not_found_and_a_wrong_body_is_refused(project: Project) -> None:
    with daemon(project) as client:
        assert client.get("/v1/syncs/nope").status_code == 404
        assert client.post("/v1/syncs", json={"dryrun": True}).status_code == 422


def test_the_api_describes_itself(project: Project) -> None:
    with daemon(project) as client:
        paths = client.get("/openapi.json").json()["paths"]
    v1 = {"/v1/status", "/v1/plan", "/v1/syncs", "/v1/syncs/{run_id}"}
    assert set(paths) == {"/healthz", "/readyz", "/metrics"} | v1
    answers = paths["/v1/syncs"]["post"]["responses"]
    assert {"202", "401", "403", "409", "411", "413", "421", "422", "429"} == set(answers)
    assert all(answer["description"] not in {"", "Successful Response"} for answer in answers.values())


def test_metrics_have_no_series_that_nothing_reads(project: Project) -> None:
    with daemon(project) as client:
        eventually(lambda: client.get("/readyz").status_code == 200)
        text = client.get("/metrics").text
    assert "syncd_runs_total" in text
    assert "_created" not in text


def test_the_api_is_a_page_without_scripts(project: Project) -> None:
    with daemon(project) as client:
        page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "src=" not in page.text
    assert "https://" not in page.text
    for path in (
        "/healthz",
        "/readyz",
        "/metrics",
        "/v1/status",
        "/v1/plan",
        "/v1/syncs",
        "/v1/syncs/{run_id}",
    ):
        assert f" {path}</code>" in page.text
    assert "Authorization: Bearer" in page.text
    assert "the daemon has forgotten it" in page.text


def test_an_address_in_use_is_an_error_that_names_the_setting(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        project.configure(f"daemon: {{listen: '127.0.0.1:{port}', state_dir: state}}\n")
        with pytest.raises(DaemonError, match=r"daemon\.listen"), running(settings.load(project.config)):
            pass


def test_resync_starts_a_run_and_exits_with_its_result(project: Project, sandbox: httpx.Client) -> None:
    with daemon_process(project) as (process, log):
        when_logged(log, "run_finished", process)
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        dry = project.call("resync", "--dry-run", "--wait", "--output=json")
        assert dry.returncode == 2
        assert json.loads(dry.stdout)["planned"]["create-customer"] == 2
        assert json.loads(project.call("resync", "--output=json").stdout)["state"] in {"queued", "running"}
        assert project.call("resync", "--wait").returncode == 0
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        taken = {"key": "other", "name": "by hand", "usageAttribution": {"subjectKeys": ["acme"]}}
        sandbox.post("/api/v1/customers", json=taken).raise_for_status()
        assert project.run("resync", "--wait").returncode == 3
        (project.folder / "kong.yml").write_text("")
        failed = project.call("resync", "--wait")
        assert failed.returncode == 1
        assert "kong.yml" in failed.stderr


@pytest.mark.parametrize("concurrency", [1, 3])
def test_sigterm_finishes_the_changes_in_progress_and_starts_no_other(
    project: Project, concurrency: int
) -> None:
    gate, under_way, changes = threading.Event(), threading.Semaphore(0), []

    def metering(asked: Asked) -> Answer:
        if asked.method == "POST":
            changes.append(asked.path)
            under_way.release()
            gate.wait(10)
            return Answer({}, 201)
        if asked.path == "/api/v1/customers":
            return Answer({"items": [], "totalCount": 0, "page": 1, "pageSize": 1000})
        return Answer(status=404)

    names = "".join(f"- {{username: user-{number}}}\n" for number in range(10))
    (project.folder / "kong.yml").write_text(f'_format_version: "3.0"\nconsumers:\n{names}')
    project.concurrency = concurrency
    with serving(metering) as server:
        project.metering = server.url
        try:
            with daemon_process(project) as (process, log):
                for _ in range(concurrency):
                    assert under_way.acquire(timeout=10)
                process.send_signal(signal.SIGTERM)
                when_logged(log, "stopping", process)
                gate.set()
                assert process.wait(timeout=10) == 0
        finally:
            gate.set()
    assert changes == ["/api/v1/customers"] * concurrency
    assert "stopped by request" in log.read_text()
    run = json.loads(project.call("history", "--output=json").stdout)[0]
    assert run["outcomes"]["done"] == concurrency


def test_a_daemon_that_cannot_start_ends_with_1(project: Project) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        project.configure(f"daemon: {{listen: '127.0.0.1:{taken.getsockname()[1]}'}}\n")
        result = project.run("run")
    assert result.returncode == 1
    assert "cannot listen" in result.stderr
