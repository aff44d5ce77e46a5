"""A daemon reads the configuration hash of a DB-less Kong first, and the consumers only if it changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from syncd.config import settings
from syncd.daemon.service import running
from tests.syncd.daemon.test_service import daemon, finished, idle
from tests.syncd.processes import Project
from tests.syncd.servers import Answer, Asked, Server, serving

pytestmark = pytest.mark.slow


class Kong:
    """The Admin API of a DB-less Kong; `hash` is its configuration hash."""

    def __init__(self) -> None:
        self.hash = "a" * 32
        self.names = ["alice", "bob"]

    def __call__(self, asked: Asked) -> Answer:
        if asked.path == "/status":
            return Answer({"configuration_hash": self.hash})
        if asked.path == "/plugins":
            return Answer({"data": [], "next": None})
        listed = [{"id": f"id-{name}", "username": name, "tags": None} for name in self.names]
        return Answer({"data": listed, "next": None})


@pytest.fixture
def kong() -> Kong:
    return Kong()


@pytest.fixture
def admin(kong: Kong) -> Iterator[Server]:
    with serving(kong) as server:
        yield server


@pytest.fixture
def project(tmp_path: Path, sandbox: httpx.Client, admin: Server) -> Project:
    there = f"sources: [{{type: kong-admin, url: '{admin.url}'}}]\nschedule: {{interval: 1h}}\n"
    return Project(tmp_path, str(sandbox.base_url), there)


def sync(client: httpx.Client, admin: Server) -> dict[str, object]:
    """Perform one run; `admin.asked` then has its requests to Kong."""
    admin.asked.clear()
    return finished(client, client.post("/v1/syncs").json()["id"])


def names(sandbox: httpx.Client) -> list[str]:
    return sorted(customer["name"] for customer in sandbox.get("/api/v1/customers").json()["items"])


def test_with_an_unchanged_hash_a_run_reads_no_consumers_and_still_does_its_work(
    project: Project, sandbox: httpx.Client, admin: Server
) -> None:
    with daemon(project) as client:
        idle(client)
        assert "GET /consumers" in admin.paths()
        sandbox.post("/sandbox/v1/reset").raise_for_status()
        assert sync(client, admin)["state"] == "succeeded"
    assert admin.paths() == ["GET /status"]
    assert names(sandbox) == ["alice", "bob"]


def test_with_a_changed_hash_the_consumers_are_read_again(
    project: Project, sandbox: httpx.Client, admin: Server, kong: Kong
) -> None:
    with daemon(project) as client:
        idle(client)
        kong.hash, kong.names = "b" * 32, ["alice", "carol"]
        assert sync(client, admin)["state"] == "succeeded"
        assert "GET /consumers" in admin.paths()
        sync(client, admin)
        assert admin.paths() == ["GET /status"]
    assert names(sandbox) == ["alice", "bob", "carol"]


def test_a_hash_of_zeros_means_not_ready_and_never_unchanged(
    project: Project, sandbox: httpx.Client, admin: Server, kong: Kong
) -> None:
    kong.hash = "0" * 32
    with daemon(project) as client:
        for _ in range(2):
            idle(client)
            run = sync(client, admin)
            assert run["state"] == "failed"
            assert "has not loaded its configuration yet" in str(run["error"])
        kong.hash = "a" * 32
        assert sync(client, admin)["state"] == "succeeded"
        kong.hash = "0" * 32
        assert sync(client, admin)["state"] == "failed"
    assert names(sandbox) == ["alice", "bob"]


def test_a_configuration_reload_reads_the_consumers_again(project: Project, admin: Server) -> None:
    project.configure("daemon: {listen: '127.0.0.1:0', state_dir: state}\n")
    with (
        running(settings.load(project.config)) as there,
        httpx.Client(base_url=there.address.url) as client,
    ):
        idle(client)
        there.reload(lambda: settings.load(project.config))
        sync(client, admin)
        assert "GET /consumers" in admin.paths()
        sync(client, admin)
        assert admin.paths() == ["GET /status"]
