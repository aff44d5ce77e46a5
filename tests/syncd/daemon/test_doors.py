"""Who may reach the daemon, and what a stranger at its port can take from it."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from urllib.parse import urlsplit

import httpx
import pytest

from tests.syncd.dashboard.support import TOKEN, Site, site
from tests.syncd.processes import Project, daemon_process, when_logged
from tests.syncd.waiting import eventually

pytestmark = pytest.mark.slow

RIGHT = {"Authorization": f"Bearer {TOKEN}"}
WRONG = {"Authorization": "Bearer wrong"}
LIMIT = 5


@pytest.fixture
def guarded(project: Project) -> Iterator[Site]:
    with site(project) as found:
        yield found


def answer_to_head(url: str, *headers: str) -> int:
    """Send a request's head and nothing of its body; return the status of the answer."""
    place = urlsplit(url)
    head = "\r\n".join(["POST /v1/syncs HTTP/1.1", f"Host: {place.netloc}", *headers, "", ""])
    with socket.create_connection((str(place.hostname), place.port or 80), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = connection.makefile("rb").readline()
    return int(answer.split()[1])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Content-Length: 419430400",), 401),
        (("Content-Length: 419430400", f"Authorization: Bearer {TOKEN}"), 413),
        (("Transfer-Encoding: chunked", f"Authorization: Bearer {TOKEN}"), 411),
        (("Transfer-Encoding: chunked",), 401),
        ((f"Authorization: Bearer {TOKEN}",), 202),
    ],
)
def test_token_and_length_are_checked_before_a_body_is_read(
    guarded: Site, headers: tuple[str, ...], status: int
) -> None:
    assert answer_to_head(guarded.url, *headers) == status


def test_with_a_token_only_probes_and_the_login_are_answered_without_it(guarded: Site) -> None:
    open_paths = {"/healthz": 200, "/readyz": 200, "/": 307, "/dashboard": 307, "/dashboard/": 303}
    open_paths |= {"/dashboard/login": 200}
    with httpx.Client(base_url=guarded.url) as stranger:
        assert {path: stranger.get(path).status_code for path in open_paths} == open_paths
        for path in (
            "/openapi.json",
            "/docs",
            "/metrics",
            "/v1/status",
            "/v1/plan",
            "/v1/syncs/x",
            "/nothing",
        ):
            assert stranger.get(path).status_code == 401, path
            assert "daemon.token" in stranger.get(path).json()["detail"]
        described = stranger.get("/openapi.json", headers=RIGHT).json()
    assert described["paths"]["/v1/status"]["get"]["security"] == [{"HTTPBearer": []}]


def test_head_is_answered_as_get_without_a_body(guarded: Site) -> None:
    with httpx.Client(base_url=guarded.url) as client:
        for path, headers in (("/healthz", {}), ("/readyz", {}), ("/metrics", RIGHT), ("/v1/status", RIGHT)):
            answer, whole = client.head(path, headers=headers), client.get(path, headers=headers)
            assert (answer.status_code, answer.content) == (whole.status_code, b""), path
            assert answer.headers["content-type"] == whole.headers["content-type"]
        assert client.head("/metrics").status_code == 401


def test_wrong_tokens_are_limited_over_all_doors_together(guarded: Site) -> None:
    with guarded.visitor() as guesser:
        for _ in range(LIMIT - 1):
            assert guesser.client.get("/v1/status", headers=WRONG).status_code == 401
        assert guesser.log_in("wrong").status_code == 403
        refused = guesser.client.get("/v1/status", headers=WRONG)
        assert (refused.status_code, "try again in" in refused.json()["detail"]) == (429, True)
        assert guesser.log_in("wrong").status_code == 429


def test_wrong_tokens_of_a_stranger_never_lock_out_the_operator(guarded: Site) -> None:
    """Behind a reverse proxy both have one address."""
    with guarded.visitor() as visitor:
        for _ in range(3 * LIMIT):
            visitor.client.get("/v1/status", headers=WRONG)
            assert visitor.client.get("/v1/status", headers=RIGHT).status_code == 200
        assert visitor.client.get("/v1/status", headers=WRONG).status_code == 429
        assert visitor.log_in(TOKEN).status_code == 303
        assert visitor.client.get("/v1/status", headers=WRONG).status_code == 429, "a login clears no guess"


def test_requests_without_a_token_are_no_guesses(guarded: Site) -> None:
    with httpx.Client(base_url=guarded.url) as client:
        for _ in range(3 * LIMIT):
            assert client.get("/v1/status").status_code == 401
        assert client.get("/v1/status", headers=RIGHT).status_code == 200


def test_a_flood_of_silent_connections_stops_no_sync(project: Project, sandbox: httpx.Client) -> None:
    """The process may open 150 files: without a limit on connections it could open no other."""
    with daemon_process(project) as (process, log), ExitStack() as flood:
        url = str(when_logged(log, "listening", process)["url"])
        when_logged(log, "run_finished", process)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (150, 150))
        place = urlsplit(url)
        for _ in range(600):
            connection = socket.create_connection((str(place.hostname), place.port or 80), timeout=10)
            flood.enter_context(closing(connection))
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        with httpx.Client(base_url=url) as client:
            run = client.post("/v1/syncs").json()

            def ended() -> str | None:
                state = str(client.get(f"/v1/syncs/{run['id']}").json()["state"])
                return state if state not in {"queued", "running"} else None

            assert eventually(ended, what="the end of the run") == "succeeded"
    assert sandbox.get("/api/v1/customers").json()["totalCount"] == 2
    assert "Too many open files" not in log.read_text()
