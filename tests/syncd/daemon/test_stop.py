"""The end of the daemon: within 5 seconds, whatever it waits for."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest

from tests.harness.ports import free_port
from tests.syncd.processes import Project, daemon_process, started_daemon, when_logged
from tests.syncd.servers import Answer, Asked, Server, serving

pytestmark = pytest.mark.slow

SECONDS = 5.0


@contextmanager
def hanging(answer: Answer | None = None) -> Iterator[tuple[Server, threading.Event]]:
    """A server that answers so, or not until the test has ended; the event: it was asked."""
    asked, ended = threading.Event(), threading.Event()

    def hang(_asked: Asked) -> Answer:
        asked.set()
        if answer is None:
            ended.wait(60)
        return answer or Answer(cut=True)

    with serving(hang) as server:
        try:
            yield server, asked
        finally:
            ended.set()


def seconds_to_end(process: subprocess.Popen[str], *signals: signal.Signals) -> float:
    begun = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    assert process.wait(timeout=30) == 0
    return time.monotonic() - begun


def run_of(project: Project) -> dict[str, object]:
    run: dict[str, object] = json.loads(project.call("history", "--output=json").stdout)[0]
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_ends_the_daemon_within_5_s_while_a_source_does_not_answer(
    project: Project, number: signal.Signals
) -> None:
    with hanging() as (kong, asked):
        source = f"{{type: kong-admin, url: '{kong.url}', timeout: 20s}}"
        project.settings = f"sources: [{source}]\nschedule: {{interval: 1h}}\n"
        with daemon_process(project) as (process, log):
            assert asked.wait(20)
            assert seconds_to_end(process, number) < SECONDS
    assert "stopped by request" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert run_of(project)["state"] == "failed"


def test_a_second_signal_ends_the_daemon_at_once(project: Project) -> None:
    with hanging() as (kong, asked):
        project.settings = f"sources: [{{type: kong-admin, url: '{kong.url}'}}]\nschedule: {{interval: 1h}}\n"
        with daemon_process(project) as (process, _log):
            assert asked.wait(20)
            assert seconds_to_end(process, signal.SIGINT, signal.SIGINT, signal.SIGINT) < 2


def test_sigterm_ends_the_daemon_within_5_s_while_the_metering_api_asks_for_a_long_wait(
    project: Project,
) -> None:
    with hanging(Answer({}, 503, {"Retry-After": "60"})) as (metering, asked):
        project.metering = metering.url
        project.configure(f"daemon: {{listen: '127.0.0.1:{free_port()}'}}\n")
        project.config.write_text(project.config.read_text().replace("attempts: 1", "attempts: 5"))
        with started_daemon(project) as (process, _log):
            assert asked.wait(20)
            assert seconds_to_end(process, signal.SIGTERM) < SECONDS


def test_sigterm_ends_the_daemon_within_5_s_while_a_page_and_a_change_wait_for_an_answer(
    project: Project,
) -> None:
    """A change that was sent is not waited for longer either; the run is recorded with what it had done."""
    changing, ended, changes = threading.Event(), threading.Event(), []

    def metering(asked: Asked) -> Answer:
        if asked.method == "POST":
            changes.append(asked.path)
            if len(changes) > 1:
                changing.set()
                ended.wait(60)
                return Answer(cut=True)
            return Answer({"id": "01", "key": "acme", "name": "acme"}, 201)
        if changing.is_set():
            ended.wait(60)
        if asked.path == "/api/v1/customers":
            return Answer({"items": [], "totalCount": 0, "page": 1, "pageSize": 1000})
        return Answer(status=404)

    project.concurrency = 1
    with serving(metering) as server:
        project.metering = server.url
        try:
            with daemon_process(project) as (process, log):
                url = str(when_logged(log, "listening", process)["url"])
                assert changing.wait(20)
                page = threading.Thread(target=_read, args=(f"{url}/dashboard/customers",))
                page.start()
                time.sleep(0.3)
                assert seconds_to_end(process, signal.SIGTERM) < SECONDS
                page.join()
        finally:
            ended.set()
    assert "Traceback" not in log.read_text(), log.read_text()
    run = run_of(project)
    assert run["state"] == "failed"
    assert run["outcomes"]["done"] == 1  # type: ignore[index]


def _read(url: str) -> None:
    with suppress(httpx.HTTPError):  # the daemon ends meanwhile
        httpx.get(url, timeout=30)
